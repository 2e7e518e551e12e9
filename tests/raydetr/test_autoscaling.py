"""Spot nodes are started first, on-demand nodes while spot is refused, by Ray's own autoscaler with cluster.yaml."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private import constants
from ray.autoscaler._private.loader import load_function_or_class
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

CONFIG = prepare_config(yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text()))
GPU, CPU = {"CPU": 1, "GPU": 1}, {"CPU": 1}


def scorer() -> Any:
    """Load the scorer that cluster.yaml names, as Ray does."""
    name = f"--env {constants.AUTOSCALER_UTILIZATION_SCORER_KEY}="
    (option,) = [option for option in CONFIG["docker"]["run_options"] if option.startswith(name)]
    return load_function_or_class(option.removeprefix(name))


def started(
    demands: list[dict[str, int]],
    tracker: NodeProviderAvailabilityTracker,
    existing: dict[str, int] | None = None,
) -> dict[str, int]:
    nodes, left = get_nodes_for(
        CONFIG["available_node_types"],
        {"head": 1, **(existing or {})},
        "head",
        CONFIG["max_workers"],
        demands,
        partial(scorer(), node_availability_summary=tracker.summary()),
    )
    assert not left
    return dict(nodes)


def refuse(tracker: NodeProviderAvailabilityTracker, node_type: str, seconds_ago: float = 0) -> None:
    refused = NodeLaunchException("InsufficientInstanceCapacity", "no spot capacity", None)
    tracker.update_node_availability(node_type, int(time.time() - seconds_ago), refused)


@pytest.fixture
def tracker() -> NodeProviderAvailabilityTracker:
    return NodeProviderAvailabilityTracker()


def test_gpu_workers_start_on_spot_and_data_tasks_on_cpu_nodes(
    tracker: NodeProviderAvailabilityTracker,
) -> None:
    assert started([GPU, GPU], tracker) == {"gpu_spot": 2}
    assert started([CPU] * 20, tracker) == {"cpu_worker": 2}


def test_on_demand_nodes_start_while_spot_is_refused(tracker: NodeProviderAvailabilityTracker) -> None:
    refuse(tracker, "gpu_spot")
    assert started([GPU, GPU], tracker) == {"gpu_on_demand": 2}
    assert started([CPU], tracker) == {"cpu_worker": 1}


def test_spot_is_preferred_again_after_half_an_hour(tracker: NodeProviderAvailabilityTracker) -> None:
    refuse(tracker, "gpu_spot", constants.AUTOSCALER_NODE_AVAILABILITY_MAX_STALENESS_S + 1)
    assert started([GPU], tracker) == {"gpu_spot": 1}


def test_on_demand_nodes_start_beyond_the_maximum_of_spot_nodes(
    tracker: NodeProviderAvailabilityTracker,
) -> None:
    maximum = CONFIG["available_node_types"]["gpu_spot"]["max_workers"]
    assert started([GPU, GPU], tracker, {"gpu_spot": maximum - 1}) == {"gpu_spot": 1, "gpu_on_demand": 1}


def test_rays_default_scorer_would_request_refused_spot_again(
    tracker: NodeProviderAvailabilityTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(tracker, "gpu_spot")
    default = "ray.autoscaler._private.resource_demand_scheduler._default_utilization_scorer"
    monkeypatch.setitem(globals(), "scorer", lambda: load_function_or_class(default))
    assert started([GPU], tracker) == {"gpu_spot": 1}
