"""Private parts of Ray Data."""

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

__all__ = [
    "ENABLED_BACKPRESSURE_POLICIES",
    "ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY",
    "BackpressurePolicy",
    "ExecutionCallback",
]
