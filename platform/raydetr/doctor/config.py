"""Flags of the doctor: those of the training run that it checks, and a few of its own."""

from dataclasses import dataclass
from typing import ClassVar

from raydetr.errors import ConfigError
from raydetr.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ChecksConfig:
    """Checks of the doctor."""

    fixed: ClassVar[bool] = False

    overfit_steps: int = 300
    """Maximum steps of the overfit on eight images; 0: no overfit."""
    overfit_minutes: float = 5.0
    """Time limit of the overfit in minutes."""
    loss_share: float = 0.5
    """The overfit passes when the loss has fallen to this fraction of its initial value."""
    check_shards: int = 16
    """Number of randomly chosen shards to read completely and compare with their checksums; 0: all."""

    def __post_init__(self) -> None:
        for name in ("overfit_steps", "overfit_minutes", "check_shards"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative."
                )
        if not 0 < self.loss_share < 1:
            raise ConfigError(f"--loss-share is {self.loss_share}: it must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Check whether a training run with these flags can work, before it is started."""

    checks: ChecksConfig = ChecksConfig()
