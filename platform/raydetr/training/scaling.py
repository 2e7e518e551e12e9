"""Scaling and failure policies of Ray Train: how many workers start, when they restart, and until when.

The data stream needs CPUs too, which Ray Train does not reserve. After nodes are lost, the remaining CPUs may suffice
only for the workers, and the stream would wait forever. An elastic run then continues with fewer workers. A fixed-size
run logs that it waits for nodes, until its time limit.
"""

import logging
import time
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from raydetr.errors import TimeLimitError
from raydetr.ray_internals.console import is_local
from raydetr.ray_internals.train import (
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    FixedScalingPolicy,
    NoopDecision,
    PlacementGroupCleanerCallback,
    ScalingDecision,
    ScalingPolicy,
    autoscaling_coordinator_client,
)
from raydetr.training.signals import PreemptedError

logger = logging.getLogger(__name__)

RESIZE_EVERY_S = 60.0
"""Seconds between checks of an elastic run for resources to add workers."""
_LOG_EVERY_S = 30.0


class _ReservesDataCpu(ScalingPolicy):
    """Starts workers only if at least one CPU remains for data tasks."""

    _logged_at = float("-inf")
    _started = False
    deadline: float | None = None
    """time.time() after which it no longer waits for nodes or restarts workers; None: no limit."""

    def after_controller_start(self, *args: Any, **kwargs: Any) -> None:
        """Quiet the controller's loggers, then let Ray request resources."""
        _quiet_controller()
        super().after_controller_start(*args, **kwargs)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the workers, or wait for nodes.

        Raises:
            ControllerError: the deadline has passed; wraps an `TimeLimitError`.
        """
        minimum = self.scaling_config.min_workers
        suffices = cpus_for_workers() >= minimum
        # The first start is allowed even after the deadline, so that a run with a tiny `--max-hours` still does a step.
        if self.deadline is not None and time.time() >= self.deadline and (self._started or not suffices):
            raise ControllerError(TimeLimitError())
        if suffices:
            decision: ScalingDecision = super().make_decision_for_non_running_worker_group()  # type: ignore[safe-super]
            self._started |= not isinstance(decision, NoopDecision)
            return decision
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        if time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = time.monotonic()
            logger.warning(
                "The cluster has %d CPUs left, too few for %d workers and one data task. Waiting for nodes.",
                cpus_for_workers() + 1,
                minimum,
            )
        time.sleep(1)
        return NoopDecision()


def _quiet_controller() -> None:
    """Log only warnings in Ray Train's controller, the process in which policies run.

    Ray repeats a request to the autoscaler every few seconds while a busy machine has not answered, and logs a warning
    with a traceback each time. If nodes never arrive, `Waiting for nodes` above reports it.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger(autoscaling_coordinator_client.__name__).setLevel(logging.ERROR)


class ElasticPolicy(_ReservesDataCpu, ElasticScalingPolicy):
    """As many workers as the cluster has CPUs for, between `--min-workers` and `--workers`."""

    def _count_possible_workers(self, *args: Any, **kwargs: Any) -> int:
        return min(super()._count_possible_workers(*args, **kwargs), cpus_for_workers())


class FixedPolicy(_ReservesDataCpu, FixedScalingPolicy):
    """A fixed number of workers."""


class RestartPolicy(DefaultFailurePolicy):
    """Restarts the workers up to `max_failures` times; leaving a node before its preemption does not count."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Restart the workers, or stop the run."""
        if isinstance(training_failed_error, WorkerGroupError):
            # Ray wraps the exception that the worker raised.
            raised = [getattr(e, "_base_exc", e) for e in training_failed_error.worker_failures.values()]
            if any(isinstance(each, PreemptedError) for each in raised):
                return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class Trainer(TorchTrainer):
    """TorchTrainer with these policies; Ray 2.60 has no public setting for them.

    deadline: see `_ReservesDataCpu`. Running workers check the deadline themselves.
    """

    def __init__(self, *args: Any, deadline: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline = deadline
        self._controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # `ray.train` selects Ray Train V2 at run time, so mypy does not know its types.
        config: Any = self.scaling_config
        failures: Any = self.run_config.failure_config
        policy = (ElasticPolicy if config.elasticity_enabled else FixedPolicy)(config)
        policy.deadline = self._deadline
        arguments |= {"scaling_policy": policy, "failure_policy": RestartPolicy(failures)}
        try:
            return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]
        except KeyboardInterrupt:
            if self._controller is not None:
                ray.kill(self._controller)  # this stops its workers before another driver takes the lease
            raise

    def _create_default_callbacks(self) -> Any:
        """Return Ray's default callbacks; on a local Ray without the placement group cleaner.

        The cleaner is a process that outlives the driver, which is pointless on a local Ray. It looks up the cluster's
        address again, and logs a traceback if another Ray runs on the machine.
        """
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        if not is_local():
            return callbacks
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Store the controller, and leave SIGINT to `command.interruptible`.

        Ray's own handler returns as if the run had finished.
        """
        self._controller = controller


def cpus_for_workers() -> int:
    """Return the number of CPUs of the cluster minus one, which is reserved for data tasks."""
    return int(ray.cluster_resources().get("CPU", 0)) - 1
