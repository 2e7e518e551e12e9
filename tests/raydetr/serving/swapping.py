"""Helpers of the tests of a running endpoint: a registry with versions to swap, and functions to kill replicas."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import httpx
import ray
from ray import serve
from safetensors.torch import load_file, save_file

from detr.inference.detector import ObjectDetector
from raydetr.registry.models import register
from raydetr.registry.tracking import client, start_run
from raydetr.serving.ingress import DETECTOR as DETECTOR
from tests.empty_registry import empty_registry
from tests.tiny_detr import save_tiny_detr

MODEL_URI = "models:/raydetr@champion"
INGRESS = "Ingress"


class Clients:
    """Threads that run until the context ends, when `stop` is set."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


class Registry:
    """Registry in a new database, with versions 1, 2, … of the model `raydetr` and the alias `champion`."""

    def __init__(self, folder: Path) -> None:
        self.uri = empty_registry(folder / "runs")
        self._run = start_run(self.uri, "training", "run", {}, {})

    def add(self, model: Path) -> int:
        return register(self.uri, self._run, str(model))

    def point_at(self, version: int) -> None:
        client(self.uri).set_registered_model_alias("raydetr", "champion", str(version))


class Endpoint(Registry):
    """Versions 1 and 2 are valid, version 3 is broken. The fixture that starts the endpoint sets `url`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.detectors: dict[int, ObjectDetector] = {}
        self.folders: dict[int, Path] = {}
        # Different image sizes and labels: a request prepared for one version cannot be answered by the other.
        for version, (names, edge) in enumerate([(["ant", "bee"], 64), (["cow", "dog", "eel"], 96)], 1):
            model = save_tiny_detr(folder / f"tiny-{version}", names, seed=version, edge=edge)
            self.add(model)
            self.folders[version] = model
            self.detectors[version] = ObjectDetector.from_pretrained(model)
        self.add(save_broken_detr(folder / "broken"))
        self.url = ""
        self.point_at(1)

    def version(self) -> int:
        return httpx.get(f"{self.url}/health", timeout=60).json()["model"]["version"]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, [line for line in exported() if "ray_raydetr_" in line]
            time.sleep(0.5)


def save_broken_detr(folder: Path) -> Path:
    """Save a model whose scores are NaN."""
    weights_file = save_tiny_detr(folder, ["ant", "bee"], edge=64) / "model.safetensors"
    weights = load_file(weights_file)
    weights["class_labels_classifier.bias"][:] = float("nan")
    save_file(weights, weights_file, {"format": "pt"})
    return folder


def replicas(deployment: str) -> list[str]:
    """Return the names of the deployment's live replicas, including starting ones."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if f"raydetr#{deployment}#" in name)


def running(deployment: str) -> int:
    """Return the number of ready replicas of the deployment."""
    states = serve.status().applications["raydetr"].deployments[deployment].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def kill(replica: str) -> None:
    """Kill the process of a replica without a shutdown, like a crash."""
    ray.kill(ray.get_actor(replica, namespace="serve"))


def exported() -> list[str]:
    port = ray.nodes()[0]["MetricsExportPort"]
    return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text.splitlines()


def metric(name: str, **labels: str) -> float:
    """Return the sum of a metric over the samples that this node exports."""
    lines = [line for line in exported() if line.startswith(f"ray_{name}{{")]
    tags = [f'{label}="{value}"' for label, value in labels.items()]
    matching = [line for line in lines if all(re.search(rf"[{{,]{re.escape(tag)}", line) for tag in tags)]
    return sum(float(line.rpartition(" ")[2]) for line in matching)
