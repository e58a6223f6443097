"""The execution plan by flags, catalog and device."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.distributed import Ranks
from model.execution import ExecutionPlan
from model.kernels import varlen_attention
from model.network.config import EncoderConfig, HeadConfig
from model.run.execution import plan_execution
from model.settings.config import OutputConfig, RunConfig
from model.tables.config import ShardingConfig
from pipeline.errors import UserError
from pipeline.training.config import LoaderConfig, MaskConfig, NegativesConfig, WindowConfig


def planned(
    device: str = "cpu",
    world_size: int = 1,
    items: int = 30,
    width: int = 8,
    positions: int = 30,
    negatives: int = 7,
    local_world_size: int | None = None,
    **changed: Any,
) -> ExecutionPlan:
    """The plan of a batch of ``positions`` rows of one item; ``changed`` are flags."""

    def given(config: type, **more: Any) -> Any:
        fields = config.__dataclass_fields__
        return config(**more, **{name: changed[name] for name in changed if name in fields})

    config = RunConfig(
        windows=WindowConfig(max_len=1),
        mask=given(MaskConfig),
        loader=LoaderConfig(train_batch_size=positions),
        encoder=given(EncoderConfig, emb_dim=width),
        head=given(HeadConfig),
        negatives=NegativesConfig(train_negatives=negatives),
        sharding=given(ShardingConfig),
        output=given(OutputConfig),
    )
    assert all(
        name
        in {f for group in vars(config).values() if hasattr(group, "__dict__") for f in vars(group)}
        for name in changed
    )
    ranks = Ranks(0, world_size, local_world_size or world_size, torch.device(device))
    return plan_execution(config, items, ranks)


@pytest.mark.parametrize(
    ("changed", "lookup", "exchange", "in_place"),
    [
        ({}, "own", "none", True),
        ({"sharding": "table_wise"}, "own", "none", True),
        ({"mode": "ddp"}, "replicated", "none", False),
        ({"table_precision": "fp16"}, "own", "none", True),
        ({"head": "linear"}, "own", "none", True),
        ({"loss": "sampled_softmax"}, "own", "none", False),
        ({"positions": 31}, "own", "none", False),  # more than items: cheap to look up
        ({"two_stream": True}, "own", "none", False),  # two positions an item
        ({"world_size": 3}, "own", "gather", True),
        ({"world_size": 3, "mode": "ddp"}, "replicated", "all_reduce", False),
        ({"world_size": 3, "positions": 31}, "own", "gather", False),
        ({"world_size": 3, "loss": "gbce"}, "own", "gather", False),
        ({"world_size": 3, "table_precision": "fp16"}, "own", "gather", True),
        ({"embedding_optimizer": "rowwise_adagrad"}, "own", "none", True),
        ({"world_size": 3, "head": "linear"}, "own", "gather", True),
        ({"world_size": 3, "sharding": "table_wise"}, "torch", "torchrec", False),
        ({"world_size": 3, "sharding": "auto"}, "torch", "torchrec", False),
        ({"world_size": 3, "items": 2, "positions": 1}, "torch", "torchrec", False),  # 0 1 | 2 3 |
        ({"world_size": 3, "items": 3, "positions": 1}, "own", "gather", True),  # 0 1 | 2 3 | 4
        # 131,072 rows of all ranks, and a few more.
        ({"world_size": 4, "items": 40_000, "positions": 1 << 15}, "own", "gather", True),
        ({"world_size": 4, "items": 40_000, "positions": (1 << 15) + 1}, "own", "all_to_all", True),
        ({"world_size": 4, "local_world_size": 2}, "own", "all_to_all", True),
    ],
)
def test_the_lookup_and_the_exchange(
    changed: dict[str, Any], lookup: str, exchange: str, in_place: bool
) -> None:
    plan = planned(**changed)
    assert (plan.lookup, plan.exchange, plan.in_place) == (lookup, exchange, in_place)
    assert (plan.precision, plan.graphs) == ("fp32", "none")


@pytest.fixture
def as_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CUDA kernels were available."""
    monkeypatch.setattr(varlen_attention, "takes", lambda width: width % 8 == 0)


@pytest.mark.parametrize(
    ("changed", "graphs"),
    [
        ({}, "step"),
        ({"world_size": 2}, "step"),
        ({"embedding_optimizer": "sgd"}, "step"),
        ({"embedding_optimizer": "rowwise_adagrad", "world_size": 2}, "step"),
        ({"table_precision": "fp16"}, "step"),
        ({"compute_kernel": "fused_uvm_caching"}, "encoder"),
        ({"table_precision": "fp16", "world_size": 2}, "step"),
        ({"head": "linear", "world_size": 2}, "step"),
        ({"sharding": "table_wise", "world_size": 2}, "encoder"),
        ({"mode": "ddp"}, "encoder"),
        ({"mode": "ddp", "world_size": 2}, "encoder"),
        ({"acceleration": "none"}, "none"),
        ({"precision": "fp32"}, "none"),
        ({"width": 12}, "none"),  # heads of 6
    ],
)
def test_graphs_follow_precision_lookup_and_head_width(
    as_with_cuda: None, changed: dict[str, Any], graphs: str
) -> None:
    plan = planned("cuda", **{"width": 16, "nhead": 2} | changed)
    assert plan.graphs == graphs
    assert plan.precision == changed.get("precision", "bf16")
    assert plan.has_static_gradients == (graphs == "encoder" and "mode" not in changed)


def test_rates_of_the_tables() -> None:
    for device in ("cpu", "cuda"):
        assert (planned(device).table_optimizer, planned(device).table_lr) == ("adam", 1e-3)
        for kind in ("adagrad", "rowwise_adagrad"):
            assert planned(device, embedding_optimizer=kind).table_lr == pytest.approx(20 * 1e-3)
        half = planned(device, table_precision="fp16")
        assert (half.table_optimizer, half.table_lr) == ("rowwise_adagrad", pytest.approx(0.02))
    assert planned(embedding_optimizer="sgd").table_lr == 1e-3
    assert planned(embedding_lr=0.5).table_lr == 0.5
    assert planned(mode="ddp").table_lr == 1e-3


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_compute_kernels_that_need_cuda(kernel: str) -> None:
    with pytest.raises(UserError, match=f"--compute_kernel {kernel} needs CUDA"):
        planned(compute_kernel=kernel)
    with pytest.raises(UserError, match="--precision bf16 needs CUDA"):
        planned(precision="bf16")


def test_the_line_of_the_log() -> None:
    plan = planned(world_size=3)
    assert plan.describe("item row_wise") == (
        "item row_wise: looked up and updated by this project's code, every rank looks up the "
        "ids of all ranks in its shard, the exact softmax scores the shard in place; encoder fp32; "
        "no CUDA graphs"
    )
    replicas = replace(planned(mode="ddp"), graphs="encoder", precision="bf16").describe("")
    assert replicas == "replicated as an ordinary weight; encoder bf16; CUDA graphs of the encoder"
