#!/bin/bash
# Several ranks a GPU: that many ranks agree can be seen on few GPUs. How fast they are cannot.
#
#     torchrun --standalone --nproc_per_node 8 --no-python benchmarks/shared_gpus.sh train.py --mode dmp ...
#
# Ranks are dealt out to the GPUs in blocks, each as a host of its own with one GPU. It takes NCCL 2.30
# or newer, which may be given as LD_PRELOAD=.../libnccl.so.2 where torch's own is older.
GPUS=${GPUS:-$(nvidia-smi -L | wc -l)}
export CUDA_VISIBLE_DEVICES=$((LOCAL_RANK * GPUS / LOCAL_WORLD_SIZE))
export LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MIN_CTAS=1 NCCL_MAX_CTAS=2
exec "${PYTHON:-python3}" -u "$@"
