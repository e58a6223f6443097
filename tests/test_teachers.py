"""Distillation: the loss by its formula, valid teachers, one rank and two."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.bert4rec import BERT4Rec, ModelConfig
from model.execution import ExecutionPlan
from model.losses import linear_cross_entropy as core
from model.losses.sharded_softmax import (
    Beside,
    TeacherLogits,
    TeacherTargets,
    linear_cross_entropy,
)
from model.network.config import EncoderConfig, HeadConfig, TeachersConfig
from model.network.dense_step import DenseStep, StepInput
from model.network.distillation import Teacher, Teachers
from model.network.head import CatalogSlice
from model.run import build as run
from model.run.teachers import as_teacher
from model.settings.config import RunConfig
from pipeline.errors import UserError
from tests.conftest import ROOT, TINY, RunMain, losses_of, torchrun

SCALE = 1 / 0.07


def teacher_logits(positions: int, items: int, widths: list[int]) -> list[TeacherLogits]:
    """Of cosines, so that their logits are bounded."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for width in widths:
        vectors = torch.randn(positions + items, width, generator=generator, dtype=torch.float64)
        hidden, rows = F.normalize(vectors, dim=1).split([positions, items])
        made.append(TeacherLogits(hidden * SCALE, rows, SCALE))
    return made


@pytest.mark.parametrize("block_bytes", [4 * 9 * 7, 1 << 20])
@pytest.mark.parametrize("widths", [[8], [8, 6, 8]])  # 6: not the model's, so not through attention
@pytest.mark.parametrize("cosine", [True, False])
def test_the_loss_by_its_formula(
    cosine: bool, widths: list[int], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(7)
    hidden, rows = torch.randn(39, 8, generator=generator, dtype=torch.float64).split([9, 30])
    targets = torch.randint(1, 31, (9,), generator=generator)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    scale, taught = SCALE if cosine else 1.0, teacher_logits(9, 30, widths)

    def plain(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if cosine:
            hidden, rows = F.normalize(hidden, dim=1), F.normalize(rows, dim=1)
        mean = sum((each.hidden @ each.rows.T).softmax(dim=1) for each in taught) / len(taught)
        aims = 0.4 * F.one_hot(targets - 1, 30).double() + 0.6 * mean
        return F.cross_entropy(hidden * scale @ rows.T, aims, reduction="none")

    def ours(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        beside, teachers = Beside.start(rows, cosine), TeacherTargets(taught, 0.6)
        return linear_cross_entropy(hidden, beside, targets, 1, scale, teachers=teachers)

    found, expected = [], []
    for results, loss in ((found, ours), (expected, plain)):
        inputs = [part.clone().requires_grad_() for part in (hidden, rows)]
        losses = loss(*inputs)
        (losses * weights).sum().backward()
        results += [losses.detach(), *(part.grad for part in inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def model(seed: int = 0, **encoder: float) -> BERT4Rec:
    """A plain model of 30 items with large weights."""
    config = ModelConfig(30, 8, EncoderConfig(emb_dim=16, nhead=2, **encoder), HeadConfig())
    made = BERT4Rec(config, CatalogSlice(1, 31, shared=False), seed)
    torch.manual_seed(seed)
    for parameter in made.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def teacher_of(trained: BERT4Rec) -> Teacher:
    return as_teacher(trained, trained.head.catalog, torch.device("cpu"), "fp32")


def taught_by(trained: BERT4Rec, share: float, student: BERT4Rec) -> DenseStep:
    """The student's step with a teacher."""
    teachers = Teachers([teacher_of(trained)], share)
    return DenseStep(student.encoder, student.head, ExecutionPlan(), teachers)


# Rows 3 31 9 and 31 5 of 30 items and the mask token; all rows with both contexts.
IDS = torch.tensor([3, 31, 9, 31, 5])
ROWS = {"offsets": torch.tensor([0, 3, 5]), "masked": torch.tensor([1, 3])}
NONE = dict.fromkeys(("left_only", "steps_ago", "negatives", "log_counts", "all_targets"))
GIVEN = StepInput(**ROWS, **NONE, targets=torch.tensor([7, 30]), ids=IDS)


def test_a_model_taught_only_by_itself_has_no_gradient() -> None:
    """The entropy of its own probabilities is the minimum: every weight's gradient is 0."""
    student = model(dropout=0.0)
    step = taught_by(model(dropout=0.5), 1.0, student)
    table = student.embeddings.embeddings["item"].weight
    loss, report = step(table[IDS], table[1:31], GIVEN, longest=8)
    loss.backward()
    hidden = student.encoder(table[IDS], longest=8, **ROWS)
    logits = student.head.project(hidden) @ student.head.project(table[1:31]).T * student.head.scale
    entropy = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    assert report.tolist() == pytest.approx([entropy.sum().item(), 2], rel=1e-5)
    for parameter in (table, *student.encoder.parameters()):
        assert parameter.grad.abs().max() < 1e-5


def test_teachers_are_not_part_of_the_model() -> None:
    student = model()
    before = student.state_dict().keys()
    student.dense_step = taught_by(model(1), 0.5, student)
    assert student.state_dict().keys() == before
    assert len(list(student.parameters())) == len(list(model().parameters()))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    outcome = torchrun(
        1, ROOT / "train.py", *TINY, f"--cache_dir={cache_dir}", f"--run_dir={folder}"
    )
    assert outcome.code == 0, outcome.err
    return folder


def test_two_ranks_with_teachers_equal_one(
    teacher: Path, tmp_path: Path, cache_dir: Path, run_main: RunMain
) -> None:
    flags = [*TINY, "--dropout=0", "--embedding_optimizer=sgd", f"--cache_dir={cache_dir}"]
    taught = [*flags, f"--teachers={teacher},{teacher / 'model'}", "--teacher_share=0.7"]
    for name, more in (("one", taught), ("alone", flags)):
        outcome = run_main("train", *more, f"--run_dir={tmp_path / name}")
        assert outcome.code == 0, outcome.err
    outcome = torchrun(
        2, ROOT / "train.py", *taught, "--train_batch_size=16", f"--run_dir={tmp_path / 'two'}"
    )
    assert outcome.code == 0, outcome.err
    one, two, without = (losses_of(tmp_path / name) for name in ("one", "two", "alone"))
    # Float32 sums in another order, over 8 steps.
    assert two == pytest.approx(one, rel=1e-4)
    assert one != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--teachers=none", "none is no run folder: config.json cannot be read"),
        ("--teachers=TEACHER,,", "has an empty name between its commas"),
        (
            "--teachers=TEACHER --teacher_share=0",
            "--teacher_share must be above 0 and at most 1, not 0.0",
        ),
        ("--teachers=TEACHER --loss=gbce", "--teachers needs --loss softmax, not gbce"),
        (
            "--teachers=TEACHER --max_len=17",
            "reads windows of 16 items at most, and this run has 17: give --max_len 16",
        ),
        (
            "--teachers=TEACHER --synthetic_item_count=90",
            "items that are not the 90 of this data: take another of --teachers",
        ),
    ],
)
def test_rejected_teachers(
    teacher: Path, tmp_path: Path, cache_dir: Path, run_main: RunMain, flags: str, message: str
) -> None:
    given = flags.replace("TEACHER", str(teacher)).split()
    folders = [f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}"]
    outcome = run_main("train", *TINY, *folders, *given)
    assert outcome.code == 2 and message in outcome.err, outcome.err
    assert not (tmp_path / "run").exists()


def test_a_teacher_trained_on_validation_items_is_rejected(
    tmp_path: Path, cache_dir: Path, run_main: RunMain
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}"]
    knows = ["--train_on_validation=true", f"--run_dir={tmp_path / 'knows'}"]
    assert run_main("train", *flags, *knows).code == 0
    taught = [*flags, f"--teachers={tmp_path / 'knows'}", f"--run_dir={tmp_path / 'taught'}"]
    outcome = run_main("train", *taught)
    assert outcome.code == 2
    assert "was trained on the validation items, which choose this run's" in outcome.err
    assert run_main("train", *taught, "--train_on_validation=true").code == 0


def test_a_table_too_large_to_be_held_whole(
    teacher: Path,
    tmp_path: Path,
    cache_dir: Path,
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "WHOLE_TABLE_BYTES", 1000)
    folders = [f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}"]
    outcome = run_main("train", *TINY, *folders, f"--teachers={teacher}")
    assert outcome.code == 2 and "held whole by a rank" in outcome.err


def test_teachers_need_the_exact_softmax() -> None:
    assert TeachersConfig().folders == []
    assert TeachersConfig("runs/a, runs/b").folders == ["runs/a", "runs/b"]
    with pytest.raises(UserError, match="--teachers needs --loss softmax"):
        RunConfig(teaching=TeachersConfig("runs/a"), head=HeadConfig(loss="sampled_softmax"))
