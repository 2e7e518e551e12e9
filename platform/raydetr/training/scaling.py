"""How many workers start: the data stream needs CPUs too, which Ray Train does not know.

After nodes are lost, what is left may be just enough for the workers, and the stream would wait for ever. An elastic
run goes on with fewer workers then; any other waits for nodes, and says so.
"""

import logging
import time
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingDecision,
    ScalingPolicy,
)

logger = logging.getLogger(__name__)

RESIZE_EVERY_S = 60.0
"""How often an elastic run looks whether it could have more workers, in seconds."""
_SAY_EVERY_S = 30.0


class _LeavesCpus(ScalingPolicy):
    """Starts workers only where at least one CPU is left to the data."""

    _said = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start, or wait for nodes."""
        least = self.scaling_config.min_workers
        if cpus_for_workers() >= least:
            decision: ScalingDecision = super().make_decision_for_non_running_worker_group()  # type: ignore[safe-super]
            return decision
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        if time.monotonic() - self._said >= _SAY_EVERY_S:
            self._said = time.monotonic()
            logger.warning(
                "The cluster has %d CPUs left: %d workers and one data task need more. Waiting for nodes.",
                cpus_for_workers() + 1,
                least,
            )
        time.sleep(1)
        return NoopDecision()


class Elastic(_LeavesCpus, ElasticScalingPolicy):
    """As many workers as there are CPUs for, between the bounds."""

    def _count_possible_workers(self, *args: Any, **kwargs: Any) -> int:
        return min(super()._count_possible_workers(*args, **kwargs), cpus_for_workers())


class Fixed(_LeavesCpus, FixedScalingPolicy):
    """Always the same number of workers."""


class Trainer(TorchTrainer):
    """A TorchTrainer that starts as many workers as these policies say; Ray 2.60 has no setting for it."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        config: Any = self.scaling_config
        arguments["scaling_policy"] = (Elastic if config.elasticity_enabled else Fixed)(config)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


def cpus_for_workers() -> int:
    """CPUs of the cluster but one for the data."""
    return int(ray.cluster_resources().get("CPU", 0)) - 1
