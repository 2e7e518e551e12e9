"""The flags of the doctor: those of the training run that it examines, and a few of its own."""

from dataclasses import dataclass

from raydetr.errors import ConfigError
from raydetr.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Look whether a training run with these flags can work, before it is started."""

    # The doctor's own
    overfit_steps: int = 300
    """Most steps of the overfit on eight images; 0: no overfit."""
    overfit_minutes: float = 5.0
    """Longest time of the overfit."""
    loss_share: float = 0.5
    """Share of its start that the loss must fall to."""
    check_shards: int = 16
    """Shards that are read whole and compared with their checksums, drawn at random; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("overfit_steps", "overfit_minutes", "check_shards"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative."
                )
        if not 0 < self.loss_share < 1:
            raise ConfigError(f"--loss-share is {self.loss_share}: it must be between 0 and 1.")
