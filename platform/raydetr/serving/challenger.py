"""A second version on live traffic: it answers a share of requests (canary), or behind the client's back (`shadow`)."""

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
    """What is tried on live traffic."""

    alias: Alias
    """`models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder; where it is the version that answers, or cannot be
    served, nothing is tried."""
    canary: float = 0.0
    """Share of requests that it answers, 0..1."""
    shadow: float = 0.0
    """Share of detections that it makes too, for comparison, 0..1."""
    most_shadows: int = 16
    """Images that are compared at a time; those beyond are dropped."""


class Challenger:
    """The version that is tried.

    Args:
        trial: what is tried.
        current: the version; loaded and checked by every replica.
        shadow: compares it with the champion.
        fell_back: called for each request that the champion answers since the challenger could not.
    """

    def __init__(
        self, trial: ChallengerConfig, current: ServedVersion, shadow: Shadow, fell_back: Callable[[], None]
    ) -> None:
        self.trial, self.current, self.shadow, self._fell_back = trial, current, shadow, fell_back

    async def answer(
        self,
        task: str,
        champion: ServedVersion,
        run: Callable[[ServedVersion], Awaitable[T]],
        within_s: float,
    ) -> T | None:
        """The challenger's answer, if this request is one of its share and it has one.

        A canary must not cost a client its answer: what the challenger fails at is the champion's to answer.

        Args:
            task: detect or segment.
            champion: the version that answers otherwise.
            run: computes the answer of a version.
            within_s: seconds that the challenger has; what is left must do for the champion.

        Returns:
            None where the champion is to answer.

        Raises:
            Unavailable: 429, since it is as full for the champion.
        """
        if (
            not self.is_other_than(champion)
            or task not in self.current.tasks
            or random.random() >= self.trial.canary
        ):
            return None
        try:
            async with asyncio.timeout(within_s):
                return await run(self.current)
        except RequestError:
            return None  # such as a class that only the champion has; a fault of the image is the champion's to say
        except Exception as error:
            if isinstance(error, Unavailable) and error.status == 429:
                raise
            logger.exception("%s failed, the champion answers", self.current.model.label)
            self._fell_back()
            return None

    def is_other_than(self, champion: ServedVersion) -> bool:
        """Whether there is something to try: the alias may be at the champion's own version."""
        return self.current.model.address != champion.model.address
