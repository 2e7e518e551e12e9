"""Everything raydetr raises on purpose.

::

    RaydetrError
    ├── ConfigError        a flag or a combination of flags (also a ValueError)
    ├── StorageError       an address that cannot be read or written
    ├── DataError          a COCO file, a shard or a manifest
    ├── ClusterError       the Ray cluster: resources, versions, code of two roots
    ├── LeaseError         another driver works on the same folder
    ├── TrainingError      a run that cannot go on or cannot be resumed
    │   └── OutOfTimeError a run that ended at a checkpoint since its time was up (exit status 75)
    ├── RegistryError      MLflow: unknown model, version, alias
    │   └── PromotionRefused  the gate keeps the alias where it is (exit status 3)
    ├── EvaluationError    an evaluation that does not come to its end
    │   └── BelowBoundError  a figure is below the bound that was asked for (exit status 4)
    └── ServingError       the endpoint
        └── RequestError   a request that is at fault (HTTP 4xx), with `.status`

Messages say what was found, where (file, record, flag), and what to do about it.
"""

from collections.abc import Mapping
from typing import Any


class RaydetrError(Exception):
    """Base of all errors that a user can act on."""

    exit_status = 2
    """Of a pipeline that ends with it."""
    summary: Mapping[str, Any] | None = None
    """What the pipeline found before, for its table and `--json`."""


class ConfigError(RaydetrError, ValueError):
    """A flag has a value that cannot work."""


class StorageError(RaydetrError):
    """An address cannot be read or written."""


class DataError(RaydetrError):
    """A COCO file, a shard or a manifest is not what it should be."""


class ClusterError(RaydetrError):
    """The Ray cluster cannot run the job as asked."""


class LeaseError(RaydetrError):
    """Another driver works on the same folder."""


class TrainingError(RaydetrError):
    """A training run cannot go on or cannot be resumed."""


class OutOfTimeError(TrainingError):
    """`--max-hours` are over; the same command goes on."""

    exit_status = 75  # EX_TEMPFAIL: try again


class RegistryError(RaydetrError):
    """The model registry does not have, or does not accept, what was asked."""


class PromotionRefused(RegistryError):
    """The gate's rules do not hold: the alias stays where it is."""

    exit_status = 3


class EvaluationError(RaydetrError):
    """An evaluation does not come to its end."""


class BelowBoundError(EvaluationError):
    """A figure is below the bound that was asked for."""

    exit_status = 4


class ServingError(RaydetrError):
    """The endpoint cannot answer."""


class RequestError(ServingError):
    """A request to the endpoint is at fault."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
