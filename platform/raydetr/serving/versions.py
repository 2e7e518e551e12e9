"""Follows an alias of the registry: the version that it moves to is served once the replicas have proved that it can."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from raydetr.registry.models import ResolvedModel, registered_version, resolve

logger = logging.getLogger("ray.serve")
_FIRST_PAUSE_S = 30.0
_LONGEST_PAUSE_S = 600.0


@dataclass(frozen=True)
class Alias:
    """What is followed."""

    address: str
    """`models:/NAME@ALIAS`; also an address that cannot move."""
    uri: str
    """MLflow address from `tracking.resolve_uri`."""
    every_s: float = 10.0
    """Time between looks, in seconds; 0: there is none after the first."""


class Follower:
    """Looks where an alias points, and has a new version taken over.

    Args:
        alias: what is followed.
        served: address of the version that is served now, `models:/NAME/VERSION`; empty: none yet.
        take: serves a version, or returns why it cannot be; called on the follower's thread.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        alias: Alias,
        served: str,
        take: Callable[[ResolvedModel], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alias, self.served, self._take, self._clock = alias, served, take, clock
        self._refused = ""
        self._trouble = ""
        self._pause_s = 0.0
        self._again_at = 0.0
        self._looked = threading.Event()

    def start(self, within_s: float = 0.0) -> None:
        """Look at once, and then every so often unless `every_s` is 0, on a thread of its own, as long as the process
        lives.

        Args:
            within_s: longest time to wait for the end of the first look, in seconds.
        """
        threading.Thread(target=self._follow, name="follow-alias", daemon=True).start()
        self._looked.wait(within_s)

    def look(self) -> None:
        """Look once. Whatever goes wrong, the version that is served stays, the log says why, and a version that was
        refused is tried again after a pause, each time a longer one.
        """
        try:
            address = self._find()
        except Exception as error:  # a registry that is away must not end the thread
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                logger.error(
                    "%s cannot be found, %s goes on: %s", self.alias.address, self.served or "none", trouble
                )
            self._trouble = trouble
            return
        self._trouble = ""
        if address == self.served:
            self._refused = ""
            return
        if address == self._refused and self._clock() < self._again_at:
            return
        try:
            reason = self._take(resolve(address, self.alias.uri))
        except Exception as error:  # nor must a storage
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            logger.warning("%s is %s now, before %s", self.alias.address, address, self.served or "none")
            self.served, self._refused = address, ""
            return
        self._pause_s = (
            min(2 * self._pause_s, _LONGEST_PAUSE_S) if address == self._refused else _FIRST_PAUSE_S
        )
        self._refused, self._again_at = address, self._clock() + self._pause_s
        logger.error(
            "%s does not answer for %s, %s goes on: %s",
            address,
            self.alias.address,
            self.served or "none",
            reason,
        )

    def _find(self) -> str:
        """Address of what the alias means now."""
        if not self.alias.address.startswith("models:"):
            return self.alias.address
        found = registered_version(self.alias.address, self.alias.uri)
        return f"models:/{found.name}/{found.version}"

    def _follow(self) -> None:
        self.look()
        self._looked.set()
        while self.alias.every_s > 0:
            time.sleep(self.alias.every_s)
            self.look()
