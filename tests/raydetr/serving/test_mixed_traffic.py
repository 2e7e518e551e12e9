"""Mixed traffic while replicas are killed and an alias moves: all answers are correct, and memory does not grow.

RAYDETR_SOAK_MINUTES sets the duration, 10 by default; `make nightly` runs it for an hour. `pytest -s` shows the
measurements.
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
from raydetr.serving.detector import MAX_VERSIONS, Batching
from raydetr.serving.loaded import LoadedModel
from raydetr.serving.versions import Alias
from tests.raydetr.serving.swapping import DETECTOR, INGRESS, MODEL_URI, Registry, kill, replicas, running
from tests.raydetr.serving.test_app import unused_port
from tests.raydetr.serving.traffic import StoredAnswers, Traffic
from tests.tiny_detr import add_mask_head, save_tiny_detr

MINUTES = float(os.environ.get("RAYDETR_SOAK_MINUTES", "10"))
SEED = 7
# Labels, image size and seed. They differ, so that a request prepared for one version cannot be answered by another.
VERSIONS = {
    1: (["ant", "bee"], 64, 18),
    2: (["cow", "dog", "eel"], 96, 19),
    3: (["fox", "gnu"], 80, 11),
    4: (["hen", "ibis", "jay"], 72, 21),
}
REPLICAS = 2  # of each deployment
WARM_UP = 0.4
"""Share of the time before memory is measured; by then two of the three swaps have happened."""
MAX_SLOPE = 1.0
"""Maximum memory growth in a run of an hour, in MiB per minute."""
HOUR = 60
"""Memory is only checked in runs of at least an hour: a replica settles in about 15 minutes."""

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(int(120 * MINUTES) + 900),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]


class Memory(threading.Thread):
    """Records the resident memory of each replica over time. A replacement replica has its own series."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.series: dict[str, list[tuple[float, float]]] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(5.0):
            try:
                actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000, timeout=60)
            except RayStateApiException:  # the cluster is too busy to answer
                continue
            for actor in actors:
                if actor.name and "raydetr#" in actor.name:
                    try:
                        mib = psutil.Process(actor.pid).memory_info().rss / 2**20
                    except psutil.NoSuchProcess:
                        continue
                    name = actor.name.partition("raydetr#")[2]
                    self.series.setdefault(name, []).append((time.monotonic(), mib))

    def slopes(self, since: float, min_s: float, swaps: list[float]) -> dict[str, tuple[float, float, float]]:
        """Fit the memory growth of each replica by least squares.

        Args:
            since: start of the measurement, by `time.monotonic`.
            min_s: minimum time that a replica must have been seen since then, in seconds.
            swaps: times of the swaps, by `time.monotonic`.

        Returns:
            for each replica the growth in MiB per minute, the growth between swaps without the minute of loading after
            each, and the largest step at a swap in MiB.
        """
        slopes = {}
        for name, series in self.series.items():
            points = np.array([point for point in series if point[0] >= since])
            if len(points) > 2 and points[-1, 0] - points[0, 0] >= min_s:
                slope, _ = _fit(points, [])
                loading = [(points[:, 0] > swap) & (points[:, 0] < swap + 60) for swap in swaps]
                within = [swap for swap in swaps if swap > points[0, 0]]
                slopes[name] = slope, *_fit(points[~np.any(loading, axis=0)], within)
        return slopes


def _fit(points: np.ndarray, swaps: list[float]) -> tuple[float, float]:
    """Fit a slope and a step at each swap to points, float [n, 2]: seconds, MiB.

    Returns:
        slope in MiB per minute, largest step in MiB.
    """
    minutes = (points[:, 0] - points[0, 0]) / 60
    steps = [points[:, 0] > swap for swap in swaps]
    slope, _, *up = np.linalg.lstsq(np.stack([minutes, np.ones(len(points)), *steps], axis=1), points[:, 1])[
        0
    ]
    return float(slope), float(max(up, default=0.0))


@dataclass(frozen=True)
class Killed:
    """A killed replica, with the time from the kill until it was gone, by `time.monotonic`."""

    deployment: str
    started: float
    ended: float


class Killer:
    """Kills random replicas. It spares one of each deployment, so that its memory can be measured all the time."""

    def __init__(self, rng: random.Random, first: float) -> None:
        self.rng, self.due = rng, first
        self.spared = {replicas(DETECTOR)[0], replicas(INGRESS)[0]}
        self.killed: list[Killed] = []

    def kill_if_due(self) -> None:
        """Kill a replica if it is time and all replicas are running again."""
        if time.monotonic() < self.due:
            return
        # The second kill is always an ingress replica, so that short runs have one too.
        ingress = len(self.killed) == 1 or (len(self.killed) > 1 and self.rng.random() < 0.25)
        deployment = INGRESS if ingress else DETECTOR
        others = [name for name in replicas(deployment) if name not in self.spared]
        if running(deployment) < REPLICAS or not others:
            return
        started = time.monotonic()
        victim = self.rng.choice(others)
        kill(victim)
        while victim in replicas(deployment):
            time.sleep(0.1)
        self.killed.append(Killed(deployment, started, time.monotonic()))
        self.due = time.monotonic() + self.rng.uniform(60, 90)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def stored(registry, tmp_path_factory: pytest.TempPathFactory) -> StoredAnswers:
    folder = tmp_path_factory.mktemp("models")
    folders = {
        version: add_mask_head(save_tiny_detr(folder / f"tiny-{version}", names, seed, edge), 10 + seed)
        for version, (names, edge, seed) in VERSIONS.items()
    }
    assert [registry.add(path) for path in folders.values()] == list(VERSIONS)
    registry.point_at(1)
    return StoredAnswers(folders)


@pytest.fixture(scope="module")
def url(ray_local, registry, stored) -> Iterator[str]:
    app = application(
        resolve(MODEL_URI, registry.uri),
        replicas=Replicas(count=REPLICAS),
        batching=Batching(max_size=4, wait_s=0.01),
        alias=Alias(MODEL_URI, registry.uri, poll_s=1.0),
        ingress_replicas=REPLICAS,
    )
    with endpoint(app, "127.0.0.1", unused_port()) as url:
        yield url


def test_kills_and_swaps_under_mixed_traffic_cause_no_wrong_answer_and_no_memory_growth(
    url, registry, stored
):
    memory = Memory()
    memory.start()
    started, seconds = time.monotonic(), 60 * MINUTES
    killer = Killer(random.Random(SEED), started + 30)
    swaps = [(started + share * seconds, version) for share, version in [(0.1, 2), (0.3, 3), (0.7, 4)]]
    moves = list(swaps)
    with Traffic(url, stored, SEED) as traffic:
        while time.monotonic() < started + seconds and not traffic.wrong:
            time.sleep(1)
            if moves and time.monotonic() > moves[0][0]:
                registry.point_at(moves.pop(0)[1])
            if time.monotonic() < started + seconds - 30:
                killer.kill_if_due()
    memory.stop.set()
    memory.join()
    slopes = memory.slopes(started + WARM_UP * seconds, 0.5 * seconds, [moment for moment, _ in swaps])
    print(summary(traffic, started, killer.killed, memory, slopes))

    assert not traffic.wrong
    assert not [failed for log in traffic.retrying for failed in log.failed]
    assert {version for log in traffic.plain for version in log.versions} == set(VERSIONS)
    for log in traffic.plain:
        # A client has one request in flight, so each killed HTTP process may fail at most one request of it.
        killed = [each for each in killer.killed if each.deployment == INGRESS]
        for failed in log.failed:
            causes = [
                each for each in killed if failed.started <= each.ended and failed.ended >= each.started
            ]
            assert causes, (failed.started - started, failed)
            killed.remove(causes[0])
    assert {each.deployment for each in killer.killed} == {DETECTOR, INGRESS}
    wait_until_all_serve(url, max(VERSIONS))
    assert {versions_held(name) for name in replicas(DETECTOR)} <= set(range(1, MAX_VERSIONS + 1))
    if MINUTES >= HOUR:
        assert len(slopes) >= 2
        assert max(slope for slope, *_ in slopes.values()) < MAX_SLOPE, slopes


def versions_held(replica: str) -> int:
    """Return the number of model versions in the memory of a replica."""

    def count(_: Any) -> int:
        gc.collect()
        return sum(isinstance(each, LoadedModel) for each in gc.get_objects())

    return ray.get(ray.get_actor(replica, namespace="serve").__ray_call__.remote(count))


def wait_until_all_serve(url: str, version: int, seconds: float = 180.0) -> None:
    """Wait until all HTTP processes serve a version, including processes that replaced killed ones."""
    deadline = time.monotonic() + seconds
    while {httpx.get(f"{url}/health", timeout=60).json()["model"]["version"] for _ in range(16)} != {version}:
        assert time.monotonic() < deadline
        time.sleep(1)


def summary(
    traffic: Traffic,
    started: float,
    killed: list[Killed],
    memory: Memory,
    slopes: dict[str, tuple[float, float, float]],
) -> str:
    logs = traffic.plain + traffic.retrying
    requests = sum((log.requests for log in logs), Counter())
    versions = sum((log.versions for log in logs), Counter())
    failed = [(round(each.started - started), each.what) for log in traffic.plain for each in log.failed]
    milliseconds = [1000 * each for log in traffic.plain for each in log.seconds]
    p50, p95, p99 = np.percentile(milliseconds or [np.nan], [50, 95, 99])
    lines = [
        f"{MINUTES:g} minutes, {requests.total()} answers: {dict(requests)}; by version {dict(versions)}",
        f"killed: {[(each.deployment, round(each.started - started)) for each in killed]}",
        f"failed requests of clients without retries: {len(failed)} {failed[:20]}",
        f"latency without retries: p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms",
    ]
    for name, points in memory.series.items():
        text = "{:+.2f} MiB per minute, {:+.2f} between swaps, {:+.1f} MiB at a swap"
        slope = text.format(*slopes[name]) if name in slopes else ""
        minutes = " ".join(f"{mib:.0f}" for _, mib in points[::12])
        lines.append(f"{name}: {minutes} MiB {slope}")
    return "\n" + "\n".join(lines + traffic.wrong)
