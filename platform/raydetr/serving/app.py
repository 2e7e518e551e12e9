"""The Ray Serve application: HTTP ingress (`ingress`) in front of model replicas (`detector`)."""

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

from detr.config import EngineName
from raydetr import cluster, storage
from raydetr.config import ServeConfig
from raydetr.errors import ClusterError, ConfigError, ServingError
from raydetr.ray_internals.serve import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.serving.auth import Tokens, require_tokens
from raydetr.serving.challenger import ChallengerConfig
from raydetr.serving.detector import MAX_VERSIONS, Batching, Detector
from raydetr.serving.images import Limits
from raydetr.serving.ingress import DETECTOR, Ingress, Options, new_api
from raydetr.serving.loaded import Precision
from raydetr.serving.refusals import RETRY_AFTER_S
from raydetr.serving.request_log import print_request_lines_plainly
from raydetr.serving.service import MAX_BODIES
from raydetr.serving.versions import Alias

api = new_api()
"""The routes, for their OpenAPI document. Each ingress process builds its own."""
_SMALL_REQUESTS = 64
"""Room for small requests such as `/health`, which are answered even while others are rejected."""
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Use a single glibc arena. With one arena per thread, each retains the memory freed in it, and replicas grew under
steady traffic."""
_REFUSE = BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True)
class Replicas:
    """Number and hardware of the model replicas."""

    count: int = 1
    """Initial number; fixed without autoscaling (`maximum` 0)."""
    minimum: int = 1
    """Autoscaling minimum; 0 stops the last replica while there are no requests."""
    maximum: int = 0
    """Autoscaling maximum; 0 turns autoscaling off."""
    device: Literal["cpu", "gpu"] = "cpu"
    num_gpus: float = 1.0
    """GPUs per replica, on device "gpu"."""
    precision: Precision = "float32"
    engine: EngineName = "torch"
    idle_s: float = 600.0
    """Autoscaling: time with less load before a replica is stopped, in seconds."""
    max_queued: int = 64
    """Requests that may wait for a replica in each ingress process, in addition to those on replicas; others get 429."""


def application(
    model: ResolvedModel,
    *,
    replicas: Replicas = Replicas(),  # frozen
    batching: Batching = Batching(),  # noqa: B008  # frozen
    limits: Limits = Limits(),  # noqa: B008  # frozen
    tokens: str = "",
    alias: Alias | None = None,
    challenger: ChallengerConfig | None = None,
    ingress_replicas: int = 1,
) -> serve.Application:
    """Build the application that `serve.run` starts.

    Args:
        model: from `registry.models.resolve`; each replica starts with this version.
        replicas: number and hardware of the model replicas.
        batching: batching of each replica.
        limits: limits of one request.
        tokens: file of token hashes; empty requires no token.
        alias: followed to newer versions; None always serves `model`.
        challenger: a second version on live traffic.
        ingress_replicas: number of processes that answer HTTP and prepare images.
    """
    on_gpu = replicas.device == "gpu"
    ongoing = 4 * batching.max_size  # one batch on the device, and enough to fill the next ones
    options = Options(
        limits=limits,
        max_requests=ongoing * max(replicas.count, replicas.maximum) + replicas.max_queued,
        tokens=tokens,
        alias=alias,
        challenger=challenger,
        scales_to_zero=replicas.maximum > 0 and replicas.minimum == 0,
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
        # Serve counts calls as queued that it has not dispatched yet, so in a burst it would reject too many. The
        # ingress therefore counts requests exactly, and this bound only has to fit the images of one request.
        max_queued_requests=max(options.max_requests, limits.max_images),
        backpressure_config=_REFUSE,
        graceful_shutdown_timeout_s=limits.deadline_s,
        max_constructor_retry_count=3,
        **_scale(replicas, batching),
    )(Detector)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=ingress_replicas,
        ray_actor_options={"num_cpus": 1, "runtime_env": environment},
        # The ingress itself bounds requests and incoming bodies; Serve must not count a slow upload as a request.
        max_ongoing_requests=options.max_requests + MAX_BODIES + _SMALL_REQUESTS,
        max_queued_requests=options.max_requests + _SMALL_REQUESTS,
        backpressure_config=_REFUSE,
        graceful_shutdown_timeout_s=limits.deadline_s,
        max_constructor_retry_count=3,
    )(Ingress)
    device = "cuda" if on_gpu else "cpu"
    max_versions = MAX_VERSIONS + (challenger is not None)
    model_replicas = detector.bind(model, batching, device, replicas.precision, replicas.engine, max_versions)
    return ingress.bind(model, options, model_replicas)


def _environment() -> dict[str, Any]:
    """Build the replicas' runtime environment from this job's, which Serve passes on only if a replica sets none."""
    job = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return job | {"env_vars": job.get("env_vars", {}) | ONE_ARENA}


def _scale(replicas: Replicas, batching: Batching) -> dict[str, Any]:
    if not replicas.maximum:
        return {"num_replicas": replicas.count}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.minimum,
            initial_replicas=min(max(replicas.count, replicas.minimum), replicas.maximum),
            max_replicas=replicas.maximum,
            # With fewer requests the batches would not be full.
            target_ongoing_requests=batching.max_size,
            # Serve's defaults are 30 s each, longer than a burst. Replicas report their load every 10 s
            # (`metrics_interval_s`; Ray 2.60 warns if it is set).
            upscale_delay_s=2.0,
            look_back_period_s=15.0,
            downscale_delay_s=replicas.idle_s,
        )
    }


def from_config(config: ServeConfig) -> tuple[ResolvedModel, serve.Application]:
    """Resolve the model URI and build its application.

    Raises:
        ConfigError: the host can be reached from other machines and no token file is given, or it cannot be read.
        RegistryError: the model does not exist.
    """
    require_tokens(config.host, config.tokens or None)
    if config.tokens:
        Tokens(config.tokens)  # fail here, not in the replica, if the file cannot be read
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
            max_queued=config.max_queued_images,
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
        challenger=_challenger_config(config, uri),
        ingress_replicas=config.ingress_replicas,
    )


def _challenger_config(config: ServeConfig, uri: str) -> ChallengerConfig | None:
    """Read the challenger flags. The challenger itself is resolved while the champion already serves, so that a
    missing challenger does not prevent the endpoint from starting.
    """
    if not config.challenger:
        return None
    is_folder = not config.challenger.startswith(("models:", "hub:"))
    model_uri = storage.absolute(config.challenger) if is_folder else config.challenger
    alias = Alias(model_uri, uri, config.alias_poll_s)
    return ChallengerConfig(alias, config.canary, config.shadow, 2 * config.max_batch_size)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application for `serve deploy` and KubeRay, which import `raydetr.serving.app:build`.

    Args:
        args: fields of `ServeConfig`. `host` must match the file's `http_options`; default: all addresses.

    Raises:
        ConfigError: an unknown field or an invalid value.
    """
    try:
        config = ServeConfig(**{"host": "0.0.0.0", **args})
    except TypeError as error:
        raise ConfigError(
            f"args of the Serve configuration: {error}; use the field names of ServeConfig."
        ) from error
    return from_config(config)[1]


def require_gpus(config: ServeConfig) -> None:
    """Fail fast if the cluster lacks the requested GPUs. Serving never falls back silently from GPU to CPU.

    Raises:
        ClusterError: `--device gpu`, and the connected cluster has too few GPUs and does not autoscale.
    """
    if config.device != "gpu" or float(os.environ.get(cluster.WAIT_FOR_NODES) or 0):
        return
    needed = max(config.replicas, config.min_replicas) * (config.num_gpus or 1.0)
    available = ray.cluster_resources().get("GPU", 0.0)
    if available < needed:
        raise ClusterError(
            f"--device gpu needs {needed:g} GPUs for {config.replicas} replicas and the cluster has {available:g} "
            f"(and {ray.cluster_resources().get('CPU', 0):g} CPUs): add GPU nodes, lower --replicas or --num-gpus, "
            "or pass --device cpu."
        )


@contextlib.contextmanager
def endpoint(app: serve.Application, host: str, port: int) -> Iterator[str]:
    """Run an application on the connected Ray until the context ends, then shut Ray Serve down.

    Args:
        app: from `application`.
        host: address to bind to.
        port: port to bind to.

    Yields:
        the endpoint's URL, once it answers requests.

    Raises:
        ConfigError: the address cannot be bound.
        ServingError: Ray Serve already runs on the cluster, or the application does not start.
    """
    _require_free(host, port)
    if _is_serving():
        raise ServingError(
            "Ray Serve already runs on this cluster, with its own host and port, and may serve other applications: "
            "stop it with `serve shutdown`, or use another cluster."
        )
    print_request_lines_plainly()
    quiet = {"log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        try:
            serve.run(app, name="raydetr", route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            raise ServingError(f"The endpoint did not start ({error}): see the log above.") from error
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
    """Check the port first: Ray Serve does not report why its proxy cannot start."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be bound ({error}): choose another port or host."
            ) from error
