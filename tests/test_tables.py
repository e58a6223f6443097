"""Half-precision tables, and tables too large to be built whole on one host."""

import json
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)

from model.distributed import Ranks
from model.run import build as model_run
from model.run.execution import plan_execution
from model.tables.config import ShardingConfig
from model.tables.sharding_plan import table_optimizer
from model.tables.upstream import set_table_steps
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain, whole_and_in_parts


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "eval_test.json").read_text())["full"]


def test_fp16_tables_train_resume_and_are_evaluated(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    whole, parts = whole_and_in_parts(run_main, tmp_path, cache_dir, "--table_precision=fp16")
    table = "embeddings.embeddings.item.weight"
    assert {name for name, weight in whole.items() if weight.dtype == torch.float16} == {table}
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name

    trained = results(tmp_path / "whole")
    (tmp_path / "whole" / "eval_test.json").unlink()
    outcome = run_main("eval", f"--checkpoint={tmp_path / 'whole'}", f"--cache_dir={cache_dir}")
    assert outcome.code == 0, outcome.err
    assert results(tmp_path / "whole") == trained

    outcome = run_main(
        "train",
        *TINY,
        f"--run_dir={tmp_path / 'whole'}",
        "--resume=auto",
        f"--cache_dir={cache_dir}",
    )
    assert outcome.code == 2
    assert "was trained with --table_precision fp16, not fp32" in outcome.err


def test_tables_too_large_to_be_built_whole(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_run, "WHOLE_TABLE_BYTES", 1000)  # 82 rows of 16 are more
    places = []
    built = model_run.BERT4Rec
    monkeypatch.setattr(
        model_run,
        "BERT4Rec",
        lambda *a, **k: places.append(k["table_device"]) or built(*a, **k),
    )
    outcome = run_main(
        "train",
        *TINY,
        "--loss=sampled_softmax",
        "--train_negatives=30",
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    trained = results(tmp_path)
    (tmp_path / "eval_test.json").unlink()
    outcome = run_main("eval", f"--checkpoint={tmp_path}", f"--cache_dir={cache_dir}")
    assert outcome.code == 0, outcome.err
    # The trained rows, not new ones: eval.py's table is that of the portable model.
    assert results(tmp_path) == trained
    assert set(places) == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table_precision": "fp8"}, "--table_precision must be one of fp32, fp16"),
        ({"compute_kernel": "dense"}, "--compute_kernel must be one of fused, fused_uvm, "),
        ({"mode": "ddp", "table_precision": "fp16"}, "--table_precision fp16 needs --mode dmp"),
        ({"mode": "ddp", "compute_kernel": "fused_uvm"}, "fused_uvm needs --mode dmp"),
    ],
)
def test_flags_out_of_range(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShardingConfig(**options)


def test_tables_in_half_precision_have_no_adam() -> None:
    assert table_optimizer(ShardingConfig()) == "adam"
    assert table_optimizer(ShardingConfig(mode="ddp", embedding_optimizer="sgd")) == "adam"
    assert table_optimizer(ShardingConfig(table_precision="fp16")) == "rowwise_adagrad"
    asked = ShardingConfig(table_precision="fp16", embedding_optimizer="adam")
    with pytest.raises(UserError, match="adam needs --table_precision fp32, not fp16: use rowwise"):
        table_optimizer(asked)


def test_the_step_count_of_the_tables_is_set(one_rank: Ranks) -> None:
    config = model_run.RunConfig()
    plan = plan_execution(config, 50, one_rank)
    model = model_run.build_model(config, 50, one_rank, plan)
    set_table_steps(model, 7)
    tables = [
        module
        for lookup in model.module.embeddings._lookups
        for module in lookup.modules()
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
    ]
    assert [(int(table.iter), int(table.iter_cpu)) for table in tables] == [(7, 7)]
