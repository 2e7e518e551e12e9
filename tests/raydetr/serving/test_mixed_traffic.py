"""Minutes of mixed traffic while replicas are killed and an alias moves: what is answered is right, memory stays.

RAYDETR_SOAK_MINUTES, 10 by default, is how long; `make nightly` makes it an hour. Shows its figures with `pytest -s`.
"""

import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from raydetr.registry.models import resolve
from raydetr.serving.app import Replicas, application, endpoint
from raydetr.serving.detector import KEPT_VERSIONS, Batching
from raydetr.serving.loaded import LoadedModel
from raydetr.serving.versions import Alias
from tests.raydetr.serving.swapping import ADDRESS, DETECTOR, INGRESS, Registry, kill, replicas, running
from tests.raydetr.serving.test_app import unused_port
from tests.raydetr.serving.traffic import Stored, Traffic
from tests.tiny_detr import add_mask_head, save_tiny_detr

MINUTES = float(os.environ.get("RAYDETR_SOAK_MINUTES", "10"))
SEED = 7
# Names, size and seed of each. Other labels and sizes: a request prepared for one cannot be answered by another.
VERSIONS = {
    1: (["ant", "bee"], 64, 18),
    2: (["cow", "dog", "eel"], 96, 19),
    3: (["fox", "gnu"], 80, 11),
    4: (["hen", "ibis", "jay"], 72, 21),
}
REPLICAS = 2  # of each deployment
WARM_UP = 0.4
"""Share of the time that has passed before memory counts: by then two of the three versions were loaded beside others."""
MOST_SLOPE = 1.0
"""MiB a minute, of an hour."""
HOUR = 60
"""A replica settles in about a quarter of an hour: in ten minutes all of the time is warm-up."""

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(int(120 * MINUTES) + 900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]


class Memory(threading.Thread):
    """Resident memory of each replica, over time; one that replaces another is a series of its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.series: dict[str, list[tuple[float, float]]] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(5.0):
            try:
                actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000, timeout=60)
            except RayStateApiException:  # too busy to say
                continue
            for actor in actors:
                if actor.name and "raydetr#" in actor.name:
                    try:
                        mib = psutil.Process(actor.pid).memory_info().rss / 2**20
                    except psutil.NoSuchProcess:
                        continue
                    name = actor.name.partition("raydetr#")[2]
                    self.series.setdefault(name, []).append((time.monotonic(), mib))

    def slopes(
        self, since: float, least_s: float, swaps: list[float]
    ) -> dict[str, tuple[float, float, float]]:
        """MiB a minute of those seen for so long since then, by least squares; and, to see where they come from, MiB a
        minute between the swaps, the minute of loading left out, and the most MiB that one of them added.

        Args:
            since: time of `time.monotonic`.
            least_s: seconds.
            swaps: times of `time.monotonic`.
        """
        found = {}
        for name, series in self.series.items():
            points = np.array([point for point in series if point[0] >= since])
            if len(points) > 2 and points[-1, 0] - points[0, 0] >= least_s:
                slope, _ = _fit(points, [])
                loading = [(points[:, 0] > swap) & (points[:, 0] < swap + 60) for swap in swaps]
                within = [swap for swap in swaps if swap > points[0, 0]]
                found[name] = slope, *_fit(points[~np.any(loading, axis=0)], within)
        return found


def _fit(points: np.ndarray, swaps: list[float]) -> tuple[float, float]:
    """Slope a minute, and the largest step at a swap, of float [n, 2]: seconds, MiB."""
    minutes = (points[:, 0] - points[0, 0]) / 60
    steps = [points[:, 0] > swap for swap in swaps]
    slope, _, *up = np.linalg.lstsq(np.stack([minutes, np.ones(len(points)), *steps], axis=1), points[:, 1])[
        0
    ]
    return float(slope), float(max(up, default=0.0))


@dataclass(frozen=True)
class Killed:
    """A replica, and from when to when it died, by `time.monotonic`."""

    deployment: str
    begun: float
    ended: float


class Killer:
    """Kills replicas at random, one of each deployment aside: its memory is looked at over all of the time."""

    def __init__(self, rng: random.Random, first: float) -> None:
        self.rng, self.due = rng, first
        self.spared = {replicas(DETECTOR)[0], replicas(INGRESS)[0]}
        self.killed: list[Killed] = []

    def look(self) -> None:
        """Kill one where it is time and all have come back."""
        if time.monotonic() < self.due:
            return
        # The second one is of the HTTP side, however short the test.
        ingress = len(self.killed) == 1 or (len(self.killed) > 1 and self.rng.random() < 0.25)
        deployment = INGRESS if ingress else DETECTOR
        others = [name for name in replicas(deployment) if name not in self.spared]
        if running(deployment) < REPLICAS or not others:
            return
        begun = time.monotonic()
        victim = self.rng.choice(others)
        kill(victim)
        while victim in replicas(deployment):
            time.sleep(0.1)
        self.killed.append(Killed(deployment, begun, time.monotonic()))
        self.due = time.monotonic() + self.rng.uniform(60, 90)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def stored(registry, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("models")
    folders = {
        version: add_mask_head(save_tiny_detr(folder / f"tiny-{version}", names, seed, edge), 10 + seed)
        for version, (names, edge, seed) in VERSIONS.items()
    }
    assert [registry.add(path) for path in folders.values()] == list(VERSIONS)
    registry.point_at(1)
    return Stored(folders)


@pytest.fixture(scope="module")
def url(ray_local, registry, stored) -> Iterator[str]:
    app = application(
        resolve(ADDRESS, registry.uri),
        replicas=Replicas(count=REPLICAS),
        batching=Batching(max_size=4, wait_s=0.01),
        alias=Alias(ADDRESS, registry.uri, every_s=1.0),
        ingress_replicas=REPLICAS,
    )
    with endpoint(app, "127.0.0.1", unused_port()) as url:
        yield url


def test_kills_and_swaps_under_mixed_traffic_cost_no_right_answer_and_no_memory(url, registry, stored):
    memory = Memory()
    memory.start()
    begun, seconds = time.monotonic(), 60 * MINUTES
    killer = Killer(random.Random(SEED), begun + 30)
    swaps = [(begun + share * seconds, version) for share, version in [(0.1, 2), (0.3, 3), (0.7, 4)]]
    moves = list(swaps)
    with Traffic(url, stored, SEED) as traffic:
        while time.monotonic() < begun + seconds and not traffic.wrong:
            time.sleep(1)
            if moves and time.monotonic() > moves[0][0]:
                registry.point_at(moves.pop(0)[1])
            if time.monotonic() < begun + seconds - 30:
                killer.look()
    memory.stop.set()
    memory.join()
    slopes = memory.slopes(begun + WARM_UP * seconds, 0.5 * seconds, [moment for moment, _ in swaps])
    print(summary(traffic, begun, killer.killed, memory, slopes))

    assert not traffic.wrong
    assert not [failed for seen in traffic.ours for failed in seen.failed]
    assert {version for seen in traffic.plain for version in seen.versions} == set(VERSIONS)
    for seen in traffic.plain:
        # One request at a time: what fails was under way in an HTTP process while it died, one at most for each.
        died = [each for each in killer.killed if each.deployment == INGRESS]
        for failed in seen.failed:
            meant = [each for each in died if failed.begun <= each.ended and failed.ended >= each.begun]
            assert meant, (failed.begun - begun, failed)
            died.remove(meant[0])
    assert {each.deployment for each in killer.killed} == {DETECTOR, INGRESS}
    wait_until_all_answer_with(url, max(VERSIONS))
    assert {versions_held(name) for name in replicas(DETECTOR)} <= set(range(1, KEPT_VERSIONS + 1))
    if MINUTES >= HOUR:
        assert len(slopes) >= 2
        assert max(slope for slope, *_ in slopes.values()) < MOST_SLOPE, slopes


def versions_held(replica: str) -> int:
    """How many model versions are in its memory."""

    def count(_: Any) -> int:
        gc.collect()
        return sum(isinstance(each, LoadedModel) for each in gc.get_objects())

    return ray.get(ray.get_actor(replica, namespace="serve").__ray_call__.remote(count))


def wait_until_all_answer_with(url: str, version: int, seconds: float = 180.0) -> None:
    """HTTP processes that replaced others follow the alias too."""
    until = time.monotonic() + seconds
    while {httpx.get(f"{url}/health", timeout=60).json()["model"]["version"] for _ in range(16)} != {version}:
        assert time.monotonic() < until
        time.sleep(1)


def summary(
    traffic: Traffic,
    begun: float,
    killed: list[Killed],
    memory: Memory,
    slopes: dict[str, tuple[float, float, float]],
) -> str:
    seen = traffic.plain + traffic.ours
    requests = sum((each.requests for each in seen), Counter())
    versions = sum((each.versions for each in seen), Counter())
    failed = [(round(each.begun - begun), each.what) for one in traffic.plain for each in one.failed]
    milliseconds = [1000 * each for one in traffic.plain for each in one.seconds]
    p50, p95, p99 = np.percentile(milliseconds or [np.nan], [50, 95, 99])
    lines = [
        f"{MINUTES:g} minutes, {requests.total()} answers: {dict(requests)}; of versions {dict(versions)}",
        f"killed: {[(each.deployment, round(each.begun - begun)) for each in killed]}",
        f"failed without repeats: {len(failed)} {failed[:20]}",
        f"a request that is not repeated: p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms",
    ]
    for name, points in memory.series.items():
        text = "{:+.2f} MiB a minute, between swaps {:+.2f}, {:+.1f} at one"
        slope = text.format(*slopes[name]) if name in slopes else ""
        minutes = " ".join(f"{mib:.0f}" for _, mib in points[::12])
        lines.append(f"{name}: {minutes} MiB {slope}")
    return "\n" + "\n".join(lines + traffic.wrong)
