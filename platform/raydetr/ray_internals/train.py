"""Private parts of Ray Train."""

from ray.train.v2._internal import util
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingDecision,
    ScalingPolicy,
    autoscaling_coordinator_client,
)

__all__ = [
    "DefaultFailurePolicy",
    "ElasticScalingPolicy",
    "FailureDecision",
    "FixedScalingPolicy",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "ScalingDecision",
    "ScalingPolicy",
    "autoscaling_coordinator_client",
    "context",
    "util",
]
