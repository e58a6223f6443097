"""Private and unstable names of libraries that the project uses, and their purposes.

These tests use only the libraries. After an upgrade they fail in seconds, with a message that names
the part of the project to change. Names are listed by library.
"""

import inspect
import io
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    construct_split_state,
)
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.rendezvous import rendezvous
from torchdata.nodes import BaseNode, IterableWrapper, Prefetcher
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel, batched_embedding_kernel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import NoWait

from model.distributed import Ranks

CPU = torch.device("cpu")


def has(owner: Any, name: str, purpose: str) -> Any:
    """The attribute; the test fails with its purpose where there is none."""
    assert hasattr(owner, name), f"{owner!r:.80} has no {name} any more: {purpose}"
    return getattr(owner, name)


def takes(function: Callable[..., Any], names: list[str], purpose: str) -> None:
    """The function's parameters still begin with ``names``."""
    found = list(inspect.signature(function).parameters)
    assert found[: len(names)] == names, f"{function} takes {found}: {purpose}"


# TorchRec -------------------------------------------------------------------------------------


class Tables(nn.Module):
    """One table of 10 rows that two features look up in."""

    def __init__(self) -> None:
        super().__init__()
        table = EmbeddingConfig(
            name="item", num_embeddings=10, embedding_dim=4, feature_names=["item", "candidate"]
        )
        self.embeddings = EmbeddingCollection(tables=[table], device=CPU)


@pytest.fixture
def sharded(one_rank: Ranks) -> DistributedModelParallel:
    """The table, updated by FBGEMM in the backward pass."""
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.25, "eps": 1e-8}
    sharders = [EmbeddingCollectionSharder(fused_params=fused)]
    return DistributedModelParallel(Tables(), device=CPU, sharders=sharders)


def lookup_of(sharded: DistributedModelParallel) -> tuple[ShardedEmbeddingCollection, Any]:
    collection = sharded.module.embeddings
    assert isinstance(collection, ShardedEmbeddingCollection)
    (lookup,) = has(collection, "_lookups", "the lookup is replaced or reset")
    return collection, lookup


def test_the_parts_of_a_lookup(sharded: DistributedModelParallel) -> None:
    collection, _ = lookup_of(sharded)
    purpose = "replaced by the item table"
    takes(ShardedEmbeddingCollection.input_dist, ["self", "ctx"], purpose)
    takes(ShardedEmbeddingCollection.compute_and_output_dist, ["self", "ctx", "input"], purpose)
    takes(ShardedEmbeddingCollection.create_context, ["self"], purpose)
    purpose = "tells the pipeline that input_dist is ready, TorchRec's that it is not"
    assert has(collection, "_has_uninitialized_input_dist", purpose) is True
    sent = KJTListSplitsAwaitable([NoWait(NoWait(torch.arange(3)))], None)
    purpose = "what input_dist returns; after two waits it is a list"
    assert has(sent, "awaitables", purpose)
    assert sent.wait().wait()[0].tolist() == [0, 1, 2], purpose


def test_a_sharded_collection(sharded: DistributedModelParallel) -> None:
    collection, lookup = lookup_of(sharded)
    names = has(
        collection, "_embedding_names_per_sharding", "the features of a lookup, in its order"
    )
    assert [*map(list, names)] == [["item", "candidate"]], "features of each lookup, in its order"
    assert has(collection, "_embedding_dim", "the width of a lookup's rows") == 4
    assert "forward" not in vars(collection), "forward is replaced on the instance"
    has(lookup, "purge", "drops rows that UVM caching keeps on the GPU when a table is loaded")
    features = KeyedJaggedTensor(
        keys=["item", "candidate"], values=torch.tensor([3, 1, 2]), lengths=torch.tensor([1, 2])
    )
    purpose = "a lookup called on its own returns the rows of all features, in their order"
    assert lookup(features).view(-1, 4).shape == (3, 4), purpose


def test_the_table_of_a_lookup(sharded: DistributedModelParallel) -> None:
    _, lookup = lookup_of(sharded)
    (kernel,) = has(lookup, "_emb_modules", "FBGEMM's table inside TorchRec's lookup")
    table = has(kernel, "emb_module", "FBGEMM's table inside TorchRec's kernel")
    assert isinstance(table, SplitTableBatchedEmbeddingBagsCodegen)
    (config,) = has(kernel.config, "embedding_tables", "the tables, in the order of their weights")
    assert config.name == "item"
    rows, purpose = table.split_embedding_weights(), "the weights that the project's kernels update"
    assert [tuple(part.shape) for part in rows] == [(10, 4)], purpose
    assert rows[0].data_ptr() == table.split_embedding_weights()[0].data_ptr(), purpose
    (states,) = table.split_optimizer_states()
    assert [state.numel() for state in states] == [10], "the optimizer's state of each row"
    assert table.get_learning_rate() == 0.25, "the learning rate that the optimizer wrapper set"
    arguments = has(table, "optimizer_args", "the constants of Adam's update")
    for name in ("beta1", "beta2", "eps"):
        has(arguments, name, "a constant of Adam's update")
    assert arguments.eps == 1e-8, "the value given in fused_params"


def test_adam_on_cpu_can_be_added_to_fbgemms_module() -> None:
    on_cpu = [(10, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    with pytest.raises(AssertionError, match="not supported in CPU mode"):
        SplitTableBatchedEmbeddingBagsCodegen(on_cpu, optimizer=EmbOptimType.ADAM)
        pytest.fail("FBGEMM has Adam on CPU: model/tables/cpu_adam.py can go")
    purpose = "made by TorchRec; replaced by the class with Adam"
    name = SplitTableBatchedEmbeddingBagsCodegen.__name__
    assert has(batched_embedding_kernel, name, purpose) is SplitTableBatchedEmbeddingBagsCodegen
    table = SplitTableBatchedEmbeddingBagsCodegen(on_cpu, optimizer=EmbOptimType.EXACT_ADAGRAD)
    for part in ("weights_host", "momentum1_host"):
        assert has(table, part, "all tables' values, in one tensor").numel() == 40
    assert has(table, "feature_table_map", "the table of each feature") == [0]
    has(table, "placeholder_autograd_tensor", "lets autograd call the backward pass")
    takes(table._apply_split, ["split", "prefix", "dtype"], "allocates Adam's squares")
    takes(
        construct_split_state,
        ["embedding_specs", "rowwise", "cacheable"],
        "the layout of Adam's squares",
    )


def test_the_step_count_of_a_table() -> None:
    purpose = "Adam's step count, which FBGEMM leaves out of the state dict"
    source = inspect.getsource(SplitTableBatchedEmbeddingBagsCodegen)
    for name in ("iter", "iter_cpu"):
        assert f'"{name}"' in source or f"self.{name}:" in source, f"{name}: {purpose}"


def test_wrappers_of_the_model(sharded: DistributedModelParallel) -> None:
    purpose = "the module that Unwrapped moves to the device instead of wrapping it in DDP"
    assert has(sharded, "_dmp_wrapped_module", purpose) is sharded.module
    takes(DataParallelWrapper.wrap, ["self", "dmp", "env", "device"], purpose)
    has(sharded, "fused_optimizer", "the tables' optimizer")
    (of_tables,) = sharded.plan.plan.values()
    assert of_tables["item"].sharding_type, "the kind of sharding, printed at the start"


def test_the_train_pipeline(sharded: DistributedModelParallel) -> None:
    takes(TrainPipelineSparseDist._backward, ["self", "losses"], "replaced: a scalar loss, no sum")
    purpose = "replaced: a model of replicas is not traced"
    has(TrainPipelineSparseDist, "_pipeline_model", purpose)
    takes(TrainPipelineSparseDist.detach, ["self"], "restores the model's forward")
    has(TrainPipelineSparseDist, "progress", "replaced: a step is one call")
    purpose = "called by our progress"
    for name in ("fill_pipeline", "enqueue_batch", "attach"):
        has(TrainPipelineSparseDist, name, purpose)
    purpose = "replaced but for a profile: a copy without names of ranges"
    takes(TrainPipelineSparseDist.copy_batch_to_gpu, ["self", "dataloader_iter"], purpose)
    takes(TrainPipelineSparseDist.start_sparse_data_dist, ["self", "batch", "context"], purpose)
    takes(TrainPipelineSparseDist.wait_sparse_data_dist, ["self", "context"], purpose)
    takes(TrainPipelineSparseDist._set_module_context, ["self", "context"], purpose)

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    pipeline = TrainPipelineSparseDist(sharded, optimizer, CPU, execute_all_batches=True)
    assert isinstance(has(pipeline, "contexts", "the context of each batch"), deque)
    context = has(pipeline, "_create_context", "holds what the table requested")()
    purpose = "what the table requested, for a step that does not call the model"
    assert has(context, "module_contexts", purpose) == {}
    assert isinstance(has(pipeline, "batches", "batches on the device"), deque)
    with has(pipeline, "_stream_context", "the copy's stream is the current one inside")(None):
        pass
    assert has(pipeline, "_model_attached", "False after detach") is True
    for name in ("_data_dist_stream", "_memcpy_stream"):
        assert has(pipeline, name, "the stream that a step waits for") is None, "CPU has no streams"
    assert pipeline._device == CPU, "where requests are made"
    assert pipeline._model is sharded, "the model that release() takes the graphs from"
    pipelined = has(pipeline, "_pipelined_modules", "counted by the tests of the exchange")
    assert len(pipelined) == 0, "modules are traced at the first batch"
    purpose = "the profile's stages are found by the names of their ranges"
    stages = "next_batch", "copy_batch_to_gpu", "start_sparse_data_dist", "wait_sparse_data_dist"
    for name in stages:
        assert f"## {name} " in inspect.getsource(TrainPipelineSparseDist), purpose


# torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "results", "purpose"),
    [
        (
            "_scaled_dot_product_flash_attention",
            "query key value dropout_p is_causal return_debug_mask scale",
            9,
            "the backward pass of the exact softmax on CUDA",
        ),
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "query key value dropout_p is_causal attn_mask scale",
            2,
            "the backward pass of the exact softmax on CPU",
        ),
    ],
)
def test_attention_operators(name: str, arguments: str, results: int, purpose: str) -> None:
    schema = has(torch.ops.aten, name, purpose).default._schema
    found = [argument.name for argument in schema.arguments]
    wanted = arguments.split()
    assert found[: len(wanted)] == wanted, purpose
    assert all(argument.has_default_value() for argument in schema.arguments[len(wanted) :]), (
        f"{name} has a new argument without a default: {purpose}"
    )
    assert len(schema.returns) == results, purpose


def test_the_second_result_of_attention_is_the_log_of_the_sum() -> None:
    query = key = torch.eye(2)[None, None]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, log_sums = attend(query, key, key, scale=1.0)
    assert torch.allclose(log_sums, torch.tensor([[[1.0, 0.0]]]).exp().sum(-1, True).log()), (
        "the exact softmax takes its normaliser from attention's log-sum-exp"
    )


def test_private_names_of_tensors_and_modules() -> None:
    whole = torch.arange(4.0)
    assert whole[1:]._base is whole, "two views are recognised as parts of one tensor"
    linear = nn.Linear(1, 1)
    assert linear._parameters["weight"] is linear.weight, "parameters replaced during a capture"
    copies = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(copies, [torch.ones(2), torch.ones(3)])
    assert [int(copy.sum()) for copy in copies] == [2, 3], "many small copies in one kernel"
    assert isinstance(torch.default_generator, torch.Generator), "dropout's generator on CPU"
    assert isinstance(torch.cuda.default_generators, tuple), "dropout's generators on GPUs"


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this build of torch has no NCCL")
def test_options_of_nccl() -> None:
    options = dist.ProcessGroupNCCL.Options()
    for name in ("min_ctas", "max_ctas"):
        has(options.config, name, "a group that takes one multiprocessor from the step")
    has(options, "_timeout", "the timeout of that group, which options hold")


def test_the_rendezvous_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    describes = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in describes.items():
        monkeypatch.setenv(name, value)
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=5)))
    assert (rank, world_size) == (0, 1), "ranks join by a store, with a prefix for each attempt"
    dist.PrefixStore("attempt 1", store).set("key", "value")
    has(dist.distributed_c10d, "_get_default_store", "where a failing rank tells the others why")


@pytest.fixture
def two_ranks() -> Iterator[list[dist.ProcessGroup]]:
    """Two ranks of gloo, both in this process."""
    store, made = dist.HashStore(), [None, None]

    def join(rank: int) -> None:
        prefix = dist.PrefixStore("two", store)
        made[rank] = dist.ProcessGroupGloo(prefix, rank, 2, timedelta(seconds=5))

    other = threading.Thread(target=join, args=(1,))
    other.start()
    join(0)
    other.join()
    yield made


def test_gloos_message_about_silent_ranks(two_ranks: list[dist.ProcessGroup]) -> None:
    purpose = "errors about other ranks are recognised by their text"
    with pytest.raises(RuntimeError, match=r"Ranks? 1 failed to pass"):
        two_ranks[0].monitored_barrier(timedelta(milliseconds=50), True)
    with pytest.raises(RuntimeError) as raised:
        two_ranks[0].allreduce([torch.ones(1)]).wait(timedelta(milliseconds=50))
    assert "timeout" in str(raised.value).lower(), purpose


def test_gloos_message_about_ended_ranks(two_ranks: list[dist.ProcessGroup]) -> None:
    del two_ranks[1:]
    with pytest.raises(RuntimeError, match=r"(?i)closed by peer|connection (reset|refused|closed)"):
        two_ranks[0].allreduce([torch.ones(1)]).wait(timedelta(seconds=2))


# Checkpoints of torch -------------------------------------------------------------------------


def test_files_of_a_checkpoint(one_rank: Ranks, tmp_path: Path) -> None:
    dcp.save({"weight": torch.arange(3.0)}, checkpoint_id=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".metadata", "__0_0.distcp"], "each rank checks its own files: __<rank>_*"

    reader = dcp.FileSystemReader(tmp_path)
    purpose = "the index is read by an unpickler that allows only these classes"
    path = has(reader, "_get_metadata_path", purpose)(None)
    has(reader, "load_id", "marks the index as read by this reader")
    with reader.fs.create_stream(path, "rb") as file:
        pickled = file.read()
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    stored = reader.storage_data[MetadataIndex("weight", (0,))]
    purpose_of_parts = "an export reads a checkpoint part by part"
    with reader.fs.create_stream(tmp_path / "__0_0.distcp", "rb") as file:
        part = has(reader, "_slice_file", purpose_of_parts)(file, stored)
        assert torch.load(part, "cpu", weights_only=True).tolist() == [0, 1, 2], purpose_of_parts
    has(pickle.loads(pickled).storage_meta, "load_id", "marks the index as read by this reader")
    classes = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            classes.add((module.removeprefix("torch.distributed.checkpoint."), name))
            return super().find_class(module, name)

    Recorder(io.BytesIO(pickled)).load()
    assert {name for module, name in classes if module == "metadata"} <= {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    }, purpose
    others = {each for each in classes if each[0] not in ("metadata", "pathlib", "pathlib._local")}
    assert others == {
        ("filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "float32"),
    }, purpose


def test_sharded_tensors(one_rank: Ranks) -> None:
    purpose = "a shard is copied to host memory before a thread writes it"
    shard = Shard.from_tensor_and_offsets(torch.arange(6.0).view(3, 2), [0, 0], rank=0)
    value = ShardedTensor._init_from_local_shards([shard], (3, 2))
    placement = value.metadata().shards_metadata[0].placement
    assert has(placement, "_device", purpose) == CPU
    copied = ShardedTensor._init_from_local_shards_and_global_metadata(
        value.local_shards(),
        sharded_tensor_metadata=value.metadata(),
        process_group=has(value, "_process_group", purpose),
    )
    assert torch.equal(copied.local_shards()[0].tensor, shard.tensor), purpose


# torchdata and TensorBoard --------------------------------------------------------------------


def test_the_prefetcher_resumes_from_its_state() -> None:
    class Counter(BaseNode):
        """Counts up to 4 from its state."""

        def reset(self, initial_state: Any = None) -> None:
            super().reset(initial_state)
            self.number = initial_state["begin"] if initial_state else 0

        def next(self) -> int:
            if self.number == 4:
                raise StopIteration
            self.number += 1
            return self.number

        def get_state(self) -> dict[str, int]:
            return {"begin": self.number}

    prefetcher = Prefetcher(Counter(), prefetch_factor=2)
    prefetcher.reset({"snapshot": {"begin": 2}, "steps_since_snapshot": 0})
    assert list(prefetcher) == [3, 4], "the loader starts in the middle of an epoch"
    assert list(Prefetcher(IterableWrapper([1, 2]), prefetch_factor=2)) == [1, 2]


def test_the_thread_that_tensorboard_writes_in() -> None:
    from tensorboard.summary.writer import event_file_writer

    has(
        event_file_writer,
        "_AsyncWriterThread",
        "its traceback is not shown: its error is raised at the next write, and reported there",
    )
