"""Flags of the encoder's optimizer."""

from dataclasses import dataclass

from pipeline.config import Config, flag


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The encoder's optimizer, AdamW."""

    # The limit leaves room for the tables' rate, a multiple of this one if it is not given.
    lr: float = flag(1e-3, "peak learning rate of the encoder", at_least=0, limit=1e28)
    weight_decay: float = flag(
        0.01, "decoupled weight decay on the encoder's matrices", at_least=0, limit=1000
    )
    beta2: float = flag(0.98, "Adam's beta2, for encoder and tables", above=0, below=1)
    max_grad_norm: float = flag(5.0, "limit of the encoder's gradient norm; 0: none", at_least=0)

    @property
    def betas(self) -> tuple[float, float]:
        """Of AdamW's first and second moment."""
        return 0.9, self.beta2
