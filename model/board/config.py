"""The flag of TensorBoard."""

from dataclasses import dataclass

from pipeline.config import Config, flag


@dataclass(frozen=True)
class BoardConfig(Config):
    """TensorBoard."""

    tensorboard: str = flag(
        "full",
        "what TensorBoard gets; minimal: curves only, no texts, examples, vectors or HParams",
        choices=("full", "minimal"),
    )

    @property
    def is_full(self) -> bool:
        return self.tensorboard == "full"
