"""How many workers start, when they start again, and until when.

The data stream needs CPUs too, which Ray Train does not know. After nodes are lost, what is left may be just enough for
the workers, and the stream would wait for ever. An elastic run goes on with fewer workers then; any other waits for
nodes, and says so, until its time is up.
"""

import logging
import time
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from raydetr.errors import OutOfTimeError
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
"""How often an elastic run looks whether it could have more workers, in seconds."""
_SAY_EVERY_S = 30.0


class _LeavesCpus(ScalingPolicy):
    """Starts workers only where at least one CPU is left to the data."""

    _said = float("-inf")
    _started = False
    deadline: float | None = None
    """time.time() after which nothing is waited for, and no workers start again; None: never."""

    def after_controller_start(self, *args: Any, **kwargs: Any) -> None:
        """Ask for nodes."""
        _quiet_controller()
        super().after_controller_start(*args, **kwargs)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start, or wait for nodes.

        Raises:
            ControllerError: with an `OutOfTimeError`.
        """
        least = self.scaling_config.min_workers
        suffices = cpus_for_workers() >= least
        # Those that can start at once do a step whatever the time is: who is given little time gets on all the same.
        if self.deadline is not None and time.time() >= self.deadline and (self._started or not suffices):
            raise ControllerError(OutOfTimeError())
        if suffices:
            decision: ScalingDecision = super().make_decision_for_non_running_worker_group()  # type: ignore[safe-super]
            self._started |= not isinstance(decision, NoopDecision)
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


def _quiet_controller() -> None:
    """In Ray Train's controller, where policies run: log what is wrong with a run, not each step of its start.

    A request to the autoscaler that a busy machine answers late is repeated every few seconds; Ray warns of each with a
    traceback. Where it never arrives, `Waiting for nodes` is logged above.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger(autoscaling_coordinator_client.__name__).setLevel(logging.ERROR)


class Elastic(_LeavesCpus, ElasticScalingPolicy):
    """As many workers as there are CPUs for, between the bounds."""

    def _count_possible_workers(self, *args: Any, **kwargs: Any) -> int:
        return min(super()._count_possible_workers(*args, **kwargs), cpus_for_workers())


class Fixed(_LeavesCpus, FixedScalingPolicy):
    """Always the same number of workers."""


class Restarts(DefaultFailurePolicy):
    """`max_failures` times, not counting how often workers left a node that is about to be preempted."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Start again, or end the run."""
        if isinstance(training_failed_error, WorkerGroupError):
            # Ray's wrapper has the exception that the worker raised.
            raised = [getattr(e, "_base_exc", e) for e in training_failed_error.worker_failures.values()]
            if any(isinstance(each, PreemptedError) for each in raised):
                return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class Trainer(TorchTrainer):
    """A TorchTrainer that starts workers as these policies say; Ray 2.60 has no setting for it.

    deadline: see `_LeavesCpus`; workers that run look at the clock themselves.
    """

    def __init__(self, *args: Any, deadline: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline = deadline
        self._controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # Ray Train V2, which mypy does not see: `ray.train` chooses at run time.
        config: Any = self.scaling_config
        failures: Any = self.run_config.failure_config
        policy = (Elastic if config.elasticity_enabled else Fixed)(config)
        policy.deadline = self._deadline
        arguments |= {"scaling_policy": policy, "failure_policy": Restarts(failures)}
        try:
            return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]
        except KeyboardInterrupt:
            if self._controller is not None:
                ray.kill(self._controller)  # its workers end with it, before another driver takes the lease
            raise

    def _create_default_callbacks(self) -> Any:
        """Ray's, on a local Ray without the one that outlives the driver: there nothing does.

        It looks up the cluster's address again, and ends in a traceback where the machine runs another Ray.
        """
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        if not is_local():
            return callbacks
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave SIGINT to `command.interruptible`: Ray's handler returns as if the run had finished."""
        self._controller = controller


def cpus_for_workers() -> int:
    """CPUs of the cluster but one for the data."""
    return int(ray.cluster_resources().get("CPU", 0)) - 1
