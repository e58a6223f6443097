"""The learning rate's schedule by hand, and a small training that must learn."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.distributed import Ranks
from model.step.config import OptimizerConfig
from model.step.optimizers import Optimizers
from model.training.agreement import NOTHING, SAVE, TIMED_OUT, Agreement
from model.training.config import TrainingConfig
from model.training.progress import HostThrottle
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain, assert_one_line, read_log


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        # Warm-up over the first 20 %, from 0.
        ("linear", 0.0, 0.0),
        ("linear", 0.05, 0.25),
        ("cosine", 0.1, 0.5),
        ("constant", 0.15, 0.75),
        # Then over the remaining 80 %: half of them are over at 60 %.
        ("linear", 0.2, 1.0),
        ("linear", 0.6, 0.5),
        ("linear", 0.8, 0.25),
        ("linear", 1.0, 0.0),
        ("cosine", 0.2, 1.0),
        ("cosine", 0.6, 0.5),
        ("cosine", 0.4, (1 + 2**-0.5) / 2),  # a quarter: (1 + cos 45°) / 2
        ("cosine", 1.0, 0.0),
        ("constant", 0.2, 1.0),
        ("constant", 0.99, 1.0),
    ],
)
def test_lr_factor_by_hand(schedule: str, progress: float, expected: float) -> None:
    config = TrainingConfig(warmup_share=0.2, lr_schedule=schedule)
    assert config.lr_factor(progress, epoch=0) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    for schedule in ("linear", "cosine", "constant"):
        config = TrainingConfig(warmup_share=0, lr_schedule=schedule)
        assert config.lr_factor(0.0, epoch=0) == 1.0


def test_stairs_every_decay_step_epochs() -> None:
    # As torch.optim.lr_scheduler.StepLR(decay_step, gamma) stepped once an epoch.
    config = TrainingConfig(warmup_share=0, lr_schedule="constant", decay_step=25, gamma=0.1)
    found = [config.lr_factor(0.5, epoch) for epoch in (0, 24, 25, 49, 50)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    # The stairs multiply any schedule.
    config = TrainingConfig(warmup_share=0, lr_schedule="linear", decay_step=1, gamma=0.5)
    assert config.lr_factor(0.75, epoch=2) == pytest.approx(0.25 * 0.25)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_epochs": 0}, "--num_epochs must be at least 1, not 0"),
        ({"warmup_share": 1.0}, "--warmup_share must be at least 0 and below 1, not 1.0"),
        ({"gamma": 0.0}, "--gamma must be above 0 and at most 1, not 0.0"),
        ({"patience": 0}, "--patience must be at least 1, not 0"),
        ({"max_steps": 0}, "--max_steps must be at least 1, not 0"),
        ({"decay_step": 0}, "--decay_step must be at least 1, not 0"),
        (
            {"lr_schedule": "stairs"},
            "--lr_schedule must be one of linear, cosine, constant, not 'stairs'",
        ),
    ],
)
def test_flags_out_of_range(flags: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingConfig(**flags)


def test_metrics_jsonl_of_a_run(run_main: RunMain, tmp_path: Path, cache_dir: Path) -> None:
    outcome = run_main(
        "train",
        *TINY,
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
        "--lr=0.01",
        "--warmup_share=0",
        "--num_epochs=4",
        "--eval_every=2",
    )
    assert outcome.code == 0, outcome.err
    lines = read_log(tmp_path)
    trained = [line for line in lines if "loss" in line]
    # 60 users of at most 38 training items are 3 windows of 16 at most: some 160, 32 a step.
    steps = len(trained)
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    epochs = [line["epoch"] for line in trained]
    assert steps % 4 == 0 and epochs == sorted(list(range(1, 5)) * (steps // 4))
    # The rate of a step is that of the samples before it: 1, then almost down to 0.
    rates = [line["lr"] for line in trained]
    assert rates[0] == 0.01 and rates == sorted(rates, reverse=True)
    assert rates[steps // 2] == pytest.approx(0.005)
    assert 0 < rates[-1] < 0.01 * 4 / steps
    assert all(line["records_per_second"] > 0 for line in trained)
    assert all(line["data_wait_ms"] >= 0 for line in trained)
    # 32 windows a step, but for the 15 that an epoch of 143 ends with.
    for line in trained:
        windows = line["records_per_second"] * line["step_ms"] / 1000
        assert windows == pytest.approx(15 if line["step"] % 5 == 0 else 32)
    peaks = [line["peak_memory_gb"] for line in trained]
    assert peaks[0] > 0.1 and peaks == sorted(peaks) and peaks[-1] < 10

    validated = [line for line in lines if line["event"] == "validation"]
    assert [line["step"] for line in validated] == [steps // 2, steps]
    assert [line["epoch"] for line in validated] == [2, 4]
    assert all("NDCG@10" in line["sampled"] for line in validated)
    assert outcome.out.count("validation NDCG@10") == 2


def test_patience_stops_a_run_without_improvement(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    # Without a learning rate all evaluations are equal: the first is the best, two more are stale.
    outcome = run_main(
        "train",
        *TINY,
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
        "--lr=0",
        "--num_epochs=9",
        "--patience=2",
    )
    assert outcome.code == 0, outcome.err
    lines = read_log(tmp_path)
    validated = [line for line in lines if line["event"] == "validation"]
    assert [line["epoch"] for line in validated] == [1, 2, 3]
    assert len({line["full"]["NDCG@10"] for line in validated}) == 1
    lines = outcome.out.splitlines()
    assert ["best so far" in line for line in lines if "validation NDCG" in line] == [
        True,
        False,
        False,
    ]


def test_max_steps_ends_in_the_middle_of_an_epoch(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", "--num_epochs=3", "--eval_every=3"]
    whole = run_main("train", *flags, f"--run_dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    for steps in (7, 10):  # epochs have 5
        run_dir = tmp_path / str(steps)
        outcome = run_main("train", *flags, f"--max_steps={steps}", f"--run_dir={run_dir}")
        assert outcome.code == 0, outcome.err
        assert outcome.out.splitlines()[-1] == f"ended after step {steps} (--max_steps), saved"
        expected = read_log(tmp_path / "whole")[:steps]
        found = read_log(run_dir)
        assert [line["step"] for line in found] == list(range(1, steps + 1))
        for name in ("epoch", "loss", "lr"):
            assert [line[name] for line in found] == [line[name] for line in expected]
        assert [path.name for path in run_dir.glob("checkpoints/*")] == [f"step-{steps:08d}"]
        assert not (run_dir / "model").exists()
        message = f"{run_dir} has no evaluated model yet: train until the first evaluation"
        assert_one_line(run_main("eval", f"--checkpoint={run_dir}"), "eval", message)
        # Nothing is lost: it goes on as if it had not ended, and saves no step twice.
        again = [*flags, f"--run_dir={run_dir}", "--resume=auto"]
        outcome = run_main("train", *again, f"--max_steps={steps}")
        assert outcome.out.splitlines()[-1] == f"ended after step {steps} (--max_steps)"
        assert run_main("train", *again).code == 0
        curves = [
            [(each["step"], each.get("loss")) for each in read_log(folder)]
            for folder in (run_dir, tmp_path / "whole")
        ]
        assert curves[0] == curves[1]
        weights = [tmp_path / each / "model" / "model.safetensors" for each in ("whole", run_dir)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_max_steps_after_an_evaluation_leaves_its_model(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}"]
    outcome = run_main("train", *flags, "--max_steps=6")
    assert outcome.code == 0, outcome.err
    names = sorted(path.name for path in tmp_path.glob("checkpoints/step-*"))
    assert names == ["step-00000005", "step-00000006"]
    assert (tmp_path / "eval_test.json").exists() and (tmp_path / "model").exists()


def test_max_steps_where_an_evaluation_is_due_makes_it(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    for steps, epochs in ((5, 1), (10, 2)):  # of 2 epochs of 5
        run_dir = tmp_path / str(steps)
        flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}"]
        outcome = run_main("train", *flags, f"--max_steps={steps}")
        assert outcome.code == 0, outcome.err
        assert ("(--max_steps), saved" in outcome.out) == (steps == 5)
        assert sum("full" in line for line in read_log(run_dir)) == epochs
        assert (run_dir / "eval_test.json").exists() and (run_dir / "model").exists()
    # Ended twice after step 5, then continued: as if it had never ended.
    again = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / '5'}", "--resume=auto"]
    assert run_main("train", *again, "--max_steps=5").code == 0
    assert run_main("train", *again).code == 0
    logs = [read_log(tmp_path / name) for name in ("5", "10")]
    curves = [[(each["step"], each.get("loss"), each.get("full")) for each in log] for log in logs]
    assert curves[0] == curves[1]
    weights = [tmp_path / each / "model" / "model.safetensors" for each in ("5", "10")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_max_steps_saves_a_last_model_that_is_not_better(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}", "--lr=0"]
    outcome = run_main("train", *flags, "--num_epochs=3", "--max_steps=10")
    assert outcome.code == 0, outcome.err
    names = sorted(path.name for path in tmp_path.glob("checkpoints/step-*"))
    assert names == ["step-00000005", "step-00000010"]
    assert json.loads((tmp_path / "eval_test.json").read_text())["step"] == 5


def test_a_nan_loss_ends_the_run(run_main: RunMain, tmp_path: Path, cache_dir: Path) -> None:
    outcome = run_main(
        "train",
        *TINY,
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
        "--lr=1e28",
        "--warmup_share=0",
        "--max_grad_norm=0",
        "--logit_temperature=0",
    )
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("train.py: the loss became nan") and "lower --lr" in last
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_training_approaches_the_best_possible_metrics(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    """About ten seconds of training; seeds 0 to 2 gave HR@10 from .80 to .83 of a possible .87.

    Popularity gives .23. The lower bounds are for what breaks learning: with targets off by one
    it reached .14, with positions mixed up .15, with tables that do not move .17, with an encoder
    that does not move .23. The upper ones are for what makes ranking easier than it is: targets
    or unseen items missing among the ranked ones, the target among the input.
    """
    outcome = run_main(
        "train",
        "--recipe=none",
        "--synthetic_user_count=1000",
        "--synthetic_item_count=100",
        "--max_len=40",
        "--mask_prob=0.3",
        "--left_context_share=1",
        "--emb_dim=32",
        "--nhead=2",
        "--num_layers=1",
        "--dropout=0",
        "--logit_temperature=0",
        "--train_batch_size=16",
        "--lr=0.01",
        "--embedding_lr=0.05",
        "--embedding_optimizer=rowwise_adagrad",
        "--lr_schedule=linear",
        "--warmup_share=0.05",
        "--num_epochs=8",
        "--eval_every=8",
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "eval_test.json").read_text())
    (best,) = (line for line in outcome.out.splitlines() if line.startswith("full, best possible"))
    best_hr, best_ndcg = map(float, best.split()[-2:])
    assert 0.2 < result["popularity"]["full"]["HR@10"] < 0.26
    assert 0.75 < result["full"]["HR@10"] < best_hr + 0.02
    assert 0.45 < result["full"]["NDCG@10"] < best_ndcg + 0.02
    assert result["sampled"]["HR@10"] > 0.75
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert lines[0]["loss"] > lines[-1]["loss"] + 1


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """AdamW's first parameter group as it was at each step of a training in this process."""
    groups: list[dict[str, Any]] = []
    set_lr = Optimizers.set_lr

    def remember(optimizers: Optimizers, factor: float) -> None:
        set_lr(optimizers, factor)
        groups.append(dict(optimizers.dense.param_groups[0]))

    monkeypatch.setattr(Optimizers, "set_lr", remember)
    return groups


def test_every_step_takes_the_rate_of_the_schedule(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, applied: list[dict[str, Any]]
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}"]
    flags += ["--num_epochs=2", "--lr=0.5", "--warmup_share=0", "--lr_schedule=linear"]
    outcome = run_main("train", *flags)
    assert outcome.code == 0, outcome.err
    # The 60 users have 143 windows, so an epoch's steps begin after 0, 32, ... 128 of them.
    begun = [epoch * 143 + sample for epoch in (0, 1) for sample in range(0, 143, 32)]
    expected = [0.5 * (1 - samples / 286) for samples in begun]
    assert [group["lr"] for group in applied] == pytest.approx(expected)


def test_beta2_reaches_adamw(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, applied: list[dict[str, Any]]
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}"]
    outcome = run_main("train", *flags, "--beta2=0.5")
    assert outcome.code == 0, outcome.err
    assert {group["betas"] for group in applied} == {(0.9, 0.5)}


def test_beta2_out_of_range() -> None:
    with pytest.raises(UserError, match="--beta2 must be above 0 and below 1, not 1"):
        OptimizerConfig(beta2=1)


def test_a_pipeline_over_several_epochs_changes_nothing(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    """Epochs without an evaluation between them go through one pipeline, without a stop."""
    curves = []
    for eval_every in (1, 3):
        run_dir = tmp_path / str(eval_every)
        flags = [f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", f"--eval_every={eval_every}"]
        outcome = run_main("train", *TINY, *flags, "--num_epochs=4", "--lr=0.01")
        assert outcome.code == 0, outcome.err
        lines = read_log(run_dir)
        assert sum(line["event"] == "validation" for line in lines) == (4 if eval_every == 1 else 2)
        curves.append(
            [(line["step"], line["epoch"], line["loss"]) for line in lines if "loss" in line]
        )
    assert curves[0] == curves[1]


def test_on_gpus_ranks_agree_at_every_fourth_step(one_rank: Ranks) -> None:
    agreement = Agreement(replace(one_rank, device=torch.device("cuda", 0)))
    agreement._group = dist.group.WORLD  # as with several ranks
    assert [agreement.exchange(SAVE if step == 1 else NOTHING) for step in range(1, 13)] == [
        *[NOTHING] * 7,
        SAVE,
        *[NOTHING] * 4,
    ]


class _Steps:
    """A fake GPU event; the first ``_Steps.done`` events have happened."""

    recorded = done = 0

    def record(self) -> None:
        _Steps.recorded += 1
        self.number = _Steps.recorded

    def query(self) -> bool:
        return self.number <= _Steps.done


def test_waiting_for_the_gpu_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Steps)
    throttle = HostThrottle(torch.device("cuda"), timedelta(seconds=0.02), ahead=2)
    throttle.after_step()
    throttle.after_step()
    for wait in (throttle.after_step, throttle.wait_for_all):
        with pytest.raises(RuntimeError, match="timed out") as error:
            wait()
        assert TIMED_OUT.search(str(error.value))  # so that silent ranks are named
    _Steps.done = 2
    throttle.wait_for_all()
