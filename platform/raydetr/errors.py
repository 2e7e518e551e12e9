"""Exceptions of raydetr.

::

    RaydetrError
    ├── ConfigError        a flag or a combination of flags (also a ValueError)
    ├── StorageError       a URI that cannot be read or written
    ├── DataError          a COCO file, a shard or a manifest
    ├── ClusterError       the Ray cluster: resources, versions, two copies of the code
    ├── LeaseError         another driver uses the same folder
    ├── TrainingError      a run that cannot continue or be resumed
    │   └── TimeLimitError a run that stopped at a checkpoint because of its time limit (exit status 75)
    ├── RegistryError      MLflow: unknown model, version, alias
    │   └── PromotionRefused  the gate refused the promotion (exit status 3)
    ├── EvaluationError    an evaluation that cannot finish
    │   └── BelowMinimumError a metric is below its minimum (exit status 4)
    └── ServingError       the endpoint
        └── RequestError   an invalid request (HTTP 4xx), with `.status`

Messages say what was found, where (file, record, flag), and what to do.
"""

from collections.abc import Mapping
from typing import Any


class RaydetrError(Exception):
    """Base class of all errors that a user can act on."""

    exit_status = 2
    """Exit status of a pipeline that stops with this error."""
    summary: Mapping[str, Any] | None = None
    """Results up to the error, printed and written to `--json`; None: no results."""


class ConfigError(RaydetrError, ValueError):
    """A flag has an invalid value."""


class StorageError(RaydetrError):
    """A URI cannot be read or written."""


class DataError(RaydetrError):
    """A COCO file, a shard or a manifest is invalid."""


class ClusterError(RaydetrError):
    """The Ray cluster cannot run the job."""


class LeaseError(RaydetrError):
    """Another driver uses the same folder."""


class TrainingError(RaydetrError):
    """A training run cannot continue or be resumed."""


class TimeLimitError(TrainingError):
    """The time limit `--max-hours` is reached; rerun the command to resume."""

    exit_status = 75  # EX_TEMPFAIL: try again


class RegistryError(RaydetrError):
    """The model registry has no such entry, or does not accept the request."""


class PromotionRefused(RegistryError):
    """The gate refused a promotion; the alias does not move."""

    exit_status = 3


class EvaluationError(RaydetrError):
    """An evaluation cannot finish."""


class BelowMinimumError(EvaluationError):
    """A metric is below its minimum, `--min-metric`."""

    exit_status = 4


class ServingError(RaydetrError):
    """The endpoint cannot answer."""


class RequestError(ServingError):
    """A request to the endpoint is invalid."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
