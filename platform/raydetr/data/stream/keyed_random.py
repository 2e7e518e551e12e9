"""Random numbers keyed by their purpose, so that no result depends on the order in which they are drawn."""

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def generator(seed: int, purpose: str, epoch: int, item: int) -> np.random.Generator:
    """Create the generator of one random choice, which depends only on the arguments."""
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(_digest(seed, purpose, epoch, item), "little"))
    )


def uniforms(
    seed: int,
    purpose: str,
    epoch: int,
    items: npt.NDArray[np.int64],
    repetitions: npt.NDArray[np.int64],
    count: int,
) -> npt.NDArray[np.float64]:
    """Draw `count` uniform numbers in [0, 1) for each (item, repetition): float64 [items, count].

    Uses SplitMix64 (Steele, Lea, Flood 2014) in counter mode. A generator object per item would take a hundred times
    as long.
    """
    key = np.frombuffer(_digest(seed, purpose, epoch, 0), dtype=np.uint64)
    state = _mix(_mix(items.astype(np.uint64) ^ key[0]) + repetitions.astype(np.uint64) * _GOLDEN + key[1])
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mix(state[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _digest(seed: int, purpose: str, epoch: int, item: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{item}".encode(), digest_size=16).digest()


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
