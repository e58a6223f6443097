"""Flags of the network: encoder, scoring head and teachers."""

from dataclasses import dataclass

from pipeline.config import Config, flag
from pipeline.errors import UserError
from pipeline.sources.config import expanded

MOST_HEADS = 1 << 14  # whose heads of four values fit the largest width
LOSSES = ("softmax", "sampled_softmax", "gbce")


@dataclass(frozen=True)
class EncoderConfig(Config):
    """Size and regularisation of the encoder."""

    emb_dim: int = flag(
        64, "width of all vectors, a multiple of 4 and --nhead", at_least=1, limit=1 << 16
    )
    nhead: int = flag(
        2, "attention heads per layer; must divide --emb_dim", at_least=1, limit=MOST_HEADS
    )
    num_layers: int = flag(2, "transformer layers of the encoder", at_least=1, limit=1000)
    dropout: float = flag(0.2, "dropout of embeddings and layer branches", at_least=0, below=1)
    positions: str = flag(
        "rotary",
        "how attention encodes distances; rotary: rotated queries and keys, none: not at all",
        choices=("rotary", "none"),
    )
    learned_positions: bool = flag(
        True, "add a learned vector for a position's distance from the window's end"
    )

    use_times: bool = flag(
        False, "read the times of the items, and of the item to predict (of a known unit)"
    )
    item_attributes: str = flag(
        "", "columns of --items_path whose values items share, such as genres,brand (default: none)"
    )
    attribute_separator: str = flag(
        "|", "separator of several attributes in one text of --item_attributes, e.g. a blank"
    )
    item_dropout: float = flag(
        0.3,
        "with --item_attributes: share of training positions that have the attributes alone",
        at_least=0,
        below=1,
    )

    def check(self) -> None:
        if self.emb_dim % 4:
            raise UserError(
                f"--emb_dim must be a multiple of 4, not {self.emb_dim}: the embedding kernels "
                "read rows in groups of four values"
            )
        if self.emb_dim % self.nhead:
            raise UserError(
                f"--nhead {self.nhead} does not divide --emb_dim {self.emb_dim}: "
                "every head gets an equal part of the width"
            )
        if self.positions == "none" and not self.learned_positions:
            raise UserError(
                "--positions none needs --learned_positions true: else the order of items is lost"
            )
        if not self.attribute_separator:
            raise UserError("--attribute_separator is empty: leave it out, or give a character")
        if self.positions == "rotary" and self.emb_dim // self.nhead % 2:
            raise UserError(
                f"--positions rotary needs heads of even width, not {self.emb_dim // self.nhead}: "
                "change --nhead or --emb_dim"
            )


@dataclass(frozen=True)
class HeadConfig(Config):
    """How items are scored, and the loss."""

    head: str = flag(
        "tied", "scoring table; tied: the item table, linear: its own", choices=("tied", "linear")
    )
    logit_temperature: float = flag(
        0.07, "divisor of cosine scores; 0: dot products", at_least=0, limit=1e6
    )
    loss: str = flag(
        "softmax",
        "training loss; softmax: exact, over all items, sampled_softmax: over --train_negatives "
        "items drawn by popularity, gbce: binary, over as many drawn uniformly",
        choices=LOSSES,
    )
    gbce_calibration: float = flag(
        0.75, "calibration t of --loss gbce; 0: none, 1: full", at_least=0, at_most=1
    )

    def check(self) -> None:
        if 0 < self.logit_temperature < 1e-6:
            raise UserError(
                f"--logit_temperature must be 0 or at least 1e-06, not {self.logit_temperature}: "
                "scores divided by less overflow"
            )


@dataclass(frozen=True)
class TeachersConfig(Config):
    """Trained models to learn from (knowledge distillation)."""

    teachers: str = flag(
        "", "run folders or exported models to learn from, separated by commas (default: none)"
    )
    teacher_share: float = flag(
        0.8, "weight of the teachers in the loss; the targets have the rest", above=0, at_most=1
    )

    def check(self) -> None:
        if self.teachers and not all(self.folders):
            raise UserError(f"--teachers {self.teachers!r} has an empty name between its commas")

    @property
    def folders(self) -> list[str]:
        names = self.teachers.split(",") if self.teachers else []
        return [str(expanded("teachers", name)) if name else "" for name in map(str.strip, names)]
