"""Follow an alias of the model registry. A new version is served once the replicas have loaded and checked it."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from raydetr.registry.models import ResolvedModel, registered_version, resolve

logger = logging.getLogger("ray.serve")
_INITIAL_RETRY_DELAY_S = 30.0
_MAX_RETRY_DELAY_S = 600.0


@dataclass(frozen=True)
class Alias:
    """An alias to follow."""

    model_uri: str
    """`models:/NAME@ALIAS`, or a URI that always means the same version."""
    tracking_uri: str
    """MLflow tracking URI from `tracking.resolve_uri`."""
    poll_s: float = 10.0
    """Poll interval, in seconds; 0 polls once."""


class Follower:
    """Polls an alias, and has the version served that it points to.

    Args:
        alias: the alias to follow.
        served: URI of the served version, `models:/NAME/VERSION`; empty if there is none yet.
        serve: serves a version. Returns None, or why it cannot be served. Called on the follower's thread.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        alias: Alias,
        served: str,
        serve: Callable[[ResolvedModel], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alias, self.served, self._serve, self._clock = alias, served, serve, clock
        self._refused = ""
        self._last_error = ""
        self._retry_delay_s = 0.0
        self._retry_at = 0.0
        self._polled = threading.Event()

    def start(self, wait_s: float = 0.0) -> None:
        """Poll on a daemon thread: once immediately, then periodically unless `poll_s` is 0.

        Args:
            wait_s: maximum time to wait for the first poll to finish, in seconds.
        """
        threading.Thread(target=self._poll_periodically, name="follow-alias", daemon=True).start()
        self._polled.wait(wait_s)

    def poll(self) -> None:
        """Poll once. On any error the served version stays and the error is logged.

        A version that was refused is retried with exponential backoff.
        """
        try:
            version_uri = self._resolve_alias()
        except Exception as error:  # an unavailable registry must not end the thread
            message = f"{type(error).__name__}: {error}"
            if message != self._last_error:
                logger.error(
                    "%s cannot be resolved, still serving %s: %s",
                    self.alias.model_uri,
                    self.served or "none",
                    message,
                )
            self._last_error = message
            return
        self._last_error = ""
        if version_uri == self.served:
            self._refused = ""
            return
        if version_uri == self._refused and self._clock() < self._retry_at:
            return
        try:
            reason = self._serve(resolve(version_uri, self.alias.tracking_uri))
        except Exception as error:  # nor must unavailable storage
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            logger.warning("%s is now %s, was %s", self.alias.model_uri, version_uri, self.served or "none")
            self.served, self._refused = version_uri, ""
            return
        self._retry_delay_s = (
            min(2 * self._retry_delay_s, _MAX_RETRY_DELAY_S)
            if version_uri == self._refused
            else _INITIAL_RETRY_DELAY_S
        )
        self._refused, self._retry_at = version_uri, self._clock() + self._retry_delay_s
        logger.error(
            "%s of %s cannot be served, still serving %s: %s",
            version_uri,
            self.alias.model_uri,
            self.served or "none",
            reason,
        )

    def _resolve_alias(self) -> str:
        """Return the URI of the version that the alias points to now."""
        if not self.alias.model_uri.startswith("models:"):
            return self.alias.model_uri
        version = registered_version(self.alias.model_uri, self.alias.tracking_uri)
        return f"models:/{version.name}/{version.version}"

    def _poll_periodically(self) -> None:
        self.poll()
        self._polled.set()
        while self.alias.poll_s > 0:
            time.sleep(self.alias.poll_s)
            self.poll()
