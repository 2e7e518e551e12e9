"""A second version on live traffic: it answers a share of the requests (canary) or is only compared (`shadow`)."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from raydetr.errors import RequestError
from raydetr.serving.refusals import Unavailable
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.shadow import Shadow
from raydetr.serving.versions import Alias

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class ChallengerConfig:
    """Settings of a challenger on live traffic."""

    alias: Alias
    """`models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder. It is ignored while it is the champion's version or
    cannot be served."""
    canary: float = 0.0
    """Share of requests that the challenger answers, 0..1."""
    shadow: float = 0.0
    """Share of images that the challenger also detects, for comparison, 0..1."""
    max_shadows: int = 16
    """Maximum number of concurrent comparisons; further images are dropped."""


class Challenger:
    """A challenger that all replicas have loaded and checked.

    Args:
        config: its settings.
        version: its model version.
        shadow: compares it with the champion.
        on_fallback: called for each request that the champion answers because the challenger failed.
    """

    def __init__(
        self,
        config: ChallengerConfig,
        version: ServedVersion,
        shadow: Shadow,
        on_fallback: Callable[[], None],
    ) -> None:
        self.config, self.version, self.shadow, self._on_fallback = config, version, shadow, on_fallback

    async def answer(
        self,
        task: str,
        champion: ServedVersion,
        run: Callable[[ServedVersion], Awaitable[T]],
        within_s: float,
    ) -> T | None:
        """Return the challenger's answer if this request is drawn for the canary.

        A canary must not cost a client its answer, so the champion answers if the challenger fails.

        Args:
            task: detect or segment.
            champion: the version that answers otherwise.
            run: computes the answer of a version.
            within_s: time limit of the challenger, in seconds; the champion has the rest of the deadline.

        Returns:
            None if the champion has to answer.

        Raises:
            Unavailable: 429, because the champion's queue is full as well.
        """
        if (
            not self.differs_from(champion)
            or task not in self.version.tasks
            or random.random() >= self.config.canary
        ):
            return None
        try:
            async with asyncio.timeout(within_s):
                return await run(self.version)
        except RequestError:
            return None  # e.g. a class that only the champion has; the champion reports a faulty image
        except Exception as error:
            if isinstance(error, Unavailable) and error.status == 429:
                raise
            logger.exception("%s failed: the champion answers instead", self.version.model.label)
            self._on_fallback()
            return None

    def differs_from(self, champion: ServedVersion) -> bool:
        """Check whether the challenger is another version; its alias may point to the champion's."""
        return self.version.model.model_uri != champion.model.model_uri
