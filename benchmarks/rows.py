"""The rows of benchmarks/throughput.py: what each trains or evaluates, and its goal.

Goals are for one NVIDIA H100. The ``random`` data set draws item ids uniformly and keeps the drawn
ones. R ratings over N ids leave N (1 - exp(-R / N)) items: a catalog of V items needs more than
V ids.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: the value of ``--rows``.
        what: description in the table.
        flags: flags of train.py for data and model.
        batch: windows per rank and step.
        steps: optimizer steps including the warm-up; 0 for rows that measure an evaluation.
        goal: records/s of one GPU, or seconds of an evaluation.
        memory_goal: GB of one GPU.
        modes: modes in which the table fits the memory.
        needs_path: the row needs ``--dataset_path``.
    """

    name: str
    what: str
    flags: tuple[str, ...]
    batch: int
    steps: int
    goal: float | None = None
    memory_goal: float | None = None
    modes: tuple[str, ...] = ("ddp", "dmp")
    needs_path: bool = False

    @property
    def evaluates(self) -> bool:
        """Whether the row measures seconds of an evaluation, not records/s of training."""
        return self.steps == 0

    def train_flags(self, mode: str) -> list[str]:
        """The row's flags of train.py, without folders."""
        flags = [*self.flags, f"--train_batch_size={self.batch}", f"--mode={mode}"]
        if self.evaluates:
            # Nothing is learned: only the first evaluation writes a checkpoint.
            return [*flags, "--lr=0", f"--num_epochs={EVALUATIONS}", "--eval_every=1"]
        # No evaluation before --max_steps ends the run, whose checkpoint may need too much room.
        flags += ["--num_epochs=100000", "--eval_every=100000", "--on_save_error=continue"]
        return [*flags, f"--max_steps={self.steps}", f"--log_every={self.log_every}"]

    @property
    def log_every(self) -> int:
        """Steps of a measured interval."""
        return max(1, self.steps // INTERVALS)


INTERVALS, EVALUATIONS = 12, 4


def _random(users: int, items: int, size: int, dim: int = 128, length: int = 16) -> tuple[str, ...]:
    """Flags of the command of TorchRec's examples/bert4rec, with other sizes."""
    return (
        "--recipe=none",
        "--dataset_name=random",
        f"--random_user_count={users}",
        f"--random_item_count={items}",
        f"--random_size={size}",
        "--mask_prob=0.2",
        f"--max_len={length}",
        f"--emb_dim={dim}",
    )


_SAMPLED = ("--loss=sampled_softmax", "--train_negatives=4096")
_FEW_NEGATIVES = ("--loss=sampled_softmax", "--train_negatives=1024")
_EXAMPLE = _random(3000, 500_000, 8_000_000)
_SKEWED = (*_EXAMPLE, "--random_skew=1")
_TEN_MILLION = _random(3000, 32_000_000, 12_000_000)
_HUNDRED_MILLION = _random(30_000, 320_000_000, 120_000_000)
_MILLION_10K_USERS = _random(10_000, 1_260_000, 2_000_000, length=50)
_ML_1M = (
    "--recipe=none",
    "--dataset_name=ml-1m",
    "--max_len=200",
    "--emb_dim=256",
    "--num_layers=2",
    "--nhead=4",
    "--learned_positions=false",
    "--embedding_lr=1e-2",
)
_SMALL = _random(500, 20_000, 400_000, dim=64)

GPU = (
    Row("exact-8", "500k items, exact", _EXAMPLE, 8, 1200, goal=3500),
    Row("exact-128", "500k items, exact", _EXAMPLE, 128, 600, goal=30_000, memory_goal=3),
    Row("exact-1024", "500k items, exact", _EXAMPLE, 1024, 240, goal=100_000),
    Row("sampled-1024", "500k items, sampled", _EXAMPLE + _SAMPLED, 1024, 600, goal=250_000),
    Row("sampled-4096", "500k items, sampled", _EXAMPLE + _SAMPLED, 4096, 600, goal=400_000),
    Row(
        "10m-4096",
        "10M items, sampled",
        _TEN_MILLION + _SAMPLED,
        4096,
        600,
        goal=200_000,
        memory_goal=40,
    ),
    Row("ml-1m-256", "ML-1M, length 200", _ML_1M, 256, 600, goal=60_000, needs_path=True),
    Row("eval-ml-1m", "evaluate ML-1M", _ML_1M, 256, 0, goal=0.5, needs_path=True),
    Row("eval-1m", "evaluate 1M items", _MILLION_10K_USERS + _SAMPLED, 1024, 0, goal=2),
)
# Rows that are measured on several GPUs only.
SEVERAL_GPUS = (
    Row("sampled-8", "500k items, sampled", _EXAMPLE + _SAMPLED, 8, 1200),
    Row("sampled-128", "500k items, sampled", _EXAMPLE + _SAMPLED, 128, 600),
    Row("sampled-1024-skew", "500k items by Zipf, sampled", _SKEWED + _SAMPLED, 1024, 600),
    Row("sampled-4096-skew", "500k items by Zipf, sampled", _SKEWED + _SAMPLED, 4096, 600),
    Row("100m-4096", "100M items, sampled", _HUNDRED_MILLION + _SAMPLED, 4096, 240, modes=("dmp",)),
    Row(
        "100m-4096-fp16",
        "100M items, sampled, fp16 table",
        (*_HUNDRED_MILLION, *_SAMPLED, "--table_precision=fp16"),
        4096,
        240,
        modes=("dmp",),
    ),
)
# Set-ups for catalogs too large for the GPU's memory.
HUGE = (
    Row(
        "10m-4096-fp16",
        "10M items, sampled, fp16 table",
        (*_TEN_MILLION, *_SAMPLED, "--table_precision=fp16"),
        4096,
        600,
        modes=("dmp",),
    ),
    Row(
        "10m-4096-uvm",
        "10M items, sampled, table in host memory",
        (*_TEN_MILLION, *_SAMPLED, "--compute_kernel=fused_uvm_caching"),
        4096,
        300,
        modes=("dmp",),
    ),
)
CPU = (
    Row("cpu-exact-8", "20k items, exact", _SMALL, 8, 120),
    Row("cpu-exact-128", "20k items, exact", _SMALL, 128, 36),
    Row("cpu-sampled-1024", "20k items, sampled", _SMALL + _FEW_NEGATIVES, 1024, 12),
    Row("cpu-eval", "evaluate 20k items", _SMALL, 1024, 0),
)
ROWS = {row.name: row for row in (*GPU, *SEVERAL_GPUS, *HUGE, *CPU)}
SETS = {"gpu": GPU, "gpus": (*GPU[:6], *SEVERAL_GPUS), "huge": HUGE, "cpu": CPU}
