#!/bin/bash
# Several ranks per GPU, to test that many ranks agree on few GPUs. Their speed means nothing.
#
#     torchrun --standalone --nproc_per_node 8 --no-python benchmarks/shared_gpus.sh train.py --mode dmp ...
#
# Each GPU gets a block of ranks; each rank acts as a host with one GPU. Needs NCCL 2.30 or newer: if
# torch has an older one, set LD_PRELOAD=.../libnccl.so.2.
GPUS=${GPUS:-$(nvidia-smi -L | wc -l)}
export CUDA_VISIBLE_DEVICES=$((LOCAL_RANK * GPUS / LOCAL_WORLD_SIZE))
export LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MIN_CTAS=1 NCCL_MAX_CTAS=2
exec "${PYTHON:-python3}" -u "$@"
