"""The Ray Serve application: HTTP in front (`ingress`), the model replicas behind it (`detector`)."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from detr.inference.optimize import Engine
from raydetr import cluster, storage
from raydetr.config import ServeConfig
from raydetr.errors import ClusterError, ConfigError, ServingError
from raydetr.ray_internals.serve import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.serving.auth import Tokens, require_tokens
from raydetr.serving.challenger import ChallengerConfig
from raydetr.serving.detector import KEPT_VERSIONS, Batching, Detector
from raydetr.serving.images import Limits
from raydetr.serving.ingress import DETECTOR, Ingress, Options, new_api
from raydetr.serving.loaded import Precision
from raydetr.serving.refusals import RETRY_AFTER_S
from raydetr.serving.request_log import print_request_lines_plainly
from raydetr.serving.service import MAX_BODIES
from raydetr.serving.versions import Alias

api = new_api()
"""The routes, for their documentation; every process that answers has its own."""
_SMALL_REQUESTS = 64
"""Requests for health and the like that are answered while all others are refused."""
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""glibc gives several pools of memory to the many threads of a replica; each keeps what was freed in it, and replicas
grew under steady traffic."""
_REFUSE = BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True)
class Replicas:
    """How many model replicas there are, on what."""

    count: int = 1
    """At the beginning; for good where `most` is 0."""
    least: int = 1
    """Of autoscaling; 0 lets the last one go while nobody asks."""
    most: int = 0
    """Of autoscaling; 0: there is none."""
    device: Literal["cpu", "gpu"] = "cpu"
    num_gpus: float = 1.0
    """Of each replica, on GPUs."""
    precision: Precision = "float32"
    engine: Engine = "torch"
    idle_s: float = 600.0
    """Of autoscaling: how long there has to be less to do before a replica goes, in seconds."""
    queued: int = 64
    """Images that wait for a replica, besides those that replicas have; beyond it requests are refused."""


def application(
    model: ResolvedModel,
    *,
    replicas: Replicas = Replicas(),  # frozen
    batching: Batching = Batching(),  # noqa: B008  # frozen
    limits: Limits = Limits(),  # noqa: B008  # frozen
    tokens: str = "",
    alias: Alias | None = None,
    trial: ChallengerConfig | None = None,
    ingress_replicas: int = 1,
) -> serve.Application:
    """The application that `serve.run` starts.

    Args:
        model: from `registry.models.resolve`; every replica begins with just this version.
        replicas: of the model.
        batching: of each replica.
        limits: on one request.
        tokens: file of token hashes; empty: everybody may ask.
        alias: followed to newer versions; None stays with `model`.
        trial: a challenger on live traffic.
        ingress_replicas: processes that answer HTTP and prepare images.
    """
    on_gpu = replicas.device == "gpu"
    ongoing = 4 * batching.max_size  # one batch on the device, the next ones complete
    options = Options(
        limits=limits,
        most_requests=ongoing * max(replicas.count, replicas.most) + replicas.queued,
        tokens=tokens,
        alias=alias,
        trial=trial,
        scales_to_zero=replicas.most > 0 and replicas.least == 0,
    )
    environment = _environment()
    detector = serve.deployment(
        name=DETECTOR,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": replicas.num_gpus if on_gpu else 0,
            "runtime_env": environment,
        },
        max_ongoing_requests=ongoing,
        # Serve takes what it has not handed on yet for queued, and would refuse more than it must where many come at
        # once. So the ingress counts single images exactly, and this is for requests of several.
        max_queued_requests=max(options.most_requests, limits.max_images),
        backpressure_config=_REFUSE,
        graceful_shutdown_timeout_s=limits.deadline_s,
        max_constructor_retry_count=3,
        **_scale(replicas, batching),
    )(Detector)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=ingress_replicas,
        ray_actor_options={"num_cpus": 1, "runtime_env": environment},
        # The ingress itself bounds requests and bodies that arrive; Serve must not count a slow body as a request.
        max_ongoing_requests=options.most_requests + MAX_BODIES + _SMALL_REQUESTS,
        max_queued_requests=options.most_requests + _SMALL_REQUESTS,
        backpressure_config=_REFUSE,
        graceful_shutdown_timeout_s=limits.deadline_s,
        max_constructor_retry_count=3,
    )(Ingress)
    device = "cuda" if on_gpu else "cpu"
    kept = KEPT_VERSIONS + (trial is not None)
    served = detector.bind(model, batching, device, replicas.precision, replicas.engine, kept)
    return ingress.bind(model, options, served)


def _environment() -> dict[str, Any]:
    """The runtime environment of the replicas: this job's, which Serve gives only to those without one of their own."""
    own = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return own | {"env_vars": own.get("env_vars", {}) | ONE_ARENA}


def _scale(replicas: Replicas, batching: Batching) -> dict[str, Any]:
    if not replicas.most:
        return {"num_replicas": replicas.count}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.least,
            initial_replicas=min(max(replicas.count, replicas.least), replicas.most),
            max_replicas=replicas.most,
            # With fewer the batches are not full.
            target_ongoing_requests=batching.max_size,
            # Serve's own are 30 s each: a burst would be over. It hears of one every 10 s (`metrics_interval_s`, which
            # Ray 2.60 warns of where it is set).
            upscale_delay_s=2.0,
            look_back_period_s=15.0,
            downscale_delay_s=replicas.idle_s,
        )
    }


def from_config(config: ServeConfig) -> tuple[ResolvedModel, serve.Application]:
    """The model that an address means now, and its application.

    Raises:
        ConfigError: the host can be reached from other machines and there is no file of tokens, or it cannot be read.
        RegistryError: there is no such model.
    """
    require_tokens(config.host, config.tokens or None)
    if config.tokens:
        Tokens(config.tokens)  # a file that cannot be read is refused here, not in the replica
    uri = resolve_uri(config.tracking_uri)
    model = resolve(config.model, uri)
    follows = config.alias_poll_s > 0 and config.model.startswith("models:") and "@" in config.model
    return model, application(
        model,
        replicas=Replicas(
            config.replicas,
            config.min_replicas,
            config.max_replicas,
            config.device,
            config.num_gpus or 1.0,
            config.precision,
            config.engine,
            queued=config.max_queued_images,
        ),
        batching=Batching(config.max_batch_size, config.batch_wait_s),
        limits=Limits(
            config.max_bytes,
            config.max_pixels,
            config.max_images,
            deadline_s=config.deadline_s,
            decode_s=config.decode_s,
            max_bytes_in_flight=config.max_bytes_in_flight,
        ),
        tokens=os.path.abspath(config.tokens) if config.tokens else "",
        alias=Alias(config.model, uri, config.alias_poll_s) if follows else None,
        trial=_trial(config, uri),
        ingress_replicas=config.ingress_replicas,
    )


def _trial(config: ServeConfig, uri: str) -> ChallengerConfig | None:
    """What `--challenger` asks for. Whether it can be served is found out beside the champion: an endpoint must not
    stay away since there is no challenger.
    """
    if not config.challenger:
        return None
    is_folder = not config.challenger.startswith(("models:", "hub:"))
    address = storage.absolute(config.challenger) if is_folder else config.challenger
    alias = Alias(address, uri, config.alias_poll_s)
    return ChallengerConfig(alias, config.canary, config.shadow, 2 * config.max_batch_size)


def build(args: Mapping[str, Any]) -> serve.Application:
    """What `serve deploy` and KubeRay import: `raydetr.serving.app:build`.

    Args:
        args: fields of `ServeConfig`; `host` is that of the file's `http_options`, by default all addresses.

    Raises:
        ConfigError: there is no such field, or a value cannot work.
    """
    try:
        config = ServeConfig(**{"host": "0.0.0.0", **args})
    except TypeError as error:
        raise ConfigError(
            f"args of the Serve configuration: {error}; its names are ServeConfig's."
        ) from error
    return from_config(config)[1]


def require_gpus(config: ServeConfig) -> None:
    """Refuse to wait for GPUs that will not come; a CPU is never taken in their place.

    Raises:
        ClusterError: `--device gpu` and the connected cluster, which does not scale, has too few.
    """
    if config.device != "gpu" or float(os.environ.get(cluster.WAIT_FOR_NODES) or 0):
        return
    needed = max(config.replicas, config.min_replicas) * (config.num_gpus or 1.0)
    there = ray.cluster_resources().get("GPU", 0.0)
    if there < needed:
        raise ClusterError(
            f"--device gpu needs {needed:g} GPUs for {config.replicas} replicas and the cluster has {there:g} "
            f"(and {ray.cluster_resources().get('CPU', 0):g} CPUs): add GPU nodes, lower --replicas or --num-gpus, "
            "or say --device cpu."
        )


@contextlib.contextmanager
def endpoint(app: serve.Application, host: str, port: int) -> Iterator[str]:
    """Run an application on the connected Ray until the context ends, then shut Ray Serve down.

    Args:
        app: from `application`.
        host: address to bind to.
        port: port to bind to.

    Yields:
        the endpoint's URL, once requests are answered.

    Raises:
        ConfigError: the address cannot be bound.
        ServingError: Ray Serve runs there already, or the application does not start.
    """
    _require_free(host, port)
    if _is_serving():
        raise ServingError(
            "Ray Serve runs on this cluster already, with its own host and port, and stopping it would stop "
            "what others serve: end it with `serve shutdown`, or use another cluster."
        )
    print_request_lines_plainly()
    quiet = {"log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        try:
            serve.run(app, name="raydetr", route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            raise ServingError(f"The endpoint did not start ({error}); the reason is above.") from error
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    finally:
        serve.shutdown()


def _is_serving() -> bool:
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _require_free(host: str, port: int) -> None:
    """Ray Serve does not say why its proxy is not available."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be bound ({error}): choose another."
            ) from error
