"""Share a resource of the endpoint (places, bytes, seconds of decoding) fairly among its clients."""

from collections import defaultdict

FACTOR = 3
"""A client may acquire more while it holds less than this multiple of the free capacity."""


class FairShare:
    """A capacity that no single client can use up.

    A client may acquire more while it holds less than `FACTOR` times the free capacity. n busy clients thus get
    `FACTOR / (1 + n * FACTOR)` of it each: three quarters for one, three sevenths for each of two. A new client always
    finds room. These are the dynamic thresholds of Choudhury and Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches" (1998).

    Args:
        capacity: total capacity of all clients.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = 0.0
        self._held: defaultdict[str, float] = defaultdict(float)

    def held(self, client: str) -> float:
        """Return the amount that a client holds."""
        return self._held.get(client, 0.0)

    def is_full(self, client: str, amount: float = 1.0) -> bool:
        """Check whether a client cannot acquire an amount now."""
        free = self.capacity - self.used
        return amount > free or self.held(client) >= FACTOR * free

    def acquire(self, client: str, amount: float = 1.0) -> bool:
        """Acquire an amount for a client. Returns False if its share is used up or nothing is free."""
        if self.is_full(client, amount):
            return False
        self.used += amount
        self._held[client] += amount
        return True

    def release(self, client: str, amount: float = 1.0) -> None:
        """Release an amount that was acquired."""
        self.used -= amount
        self._held[client] -= amount
        if self._held[client] < 1e-9:  # rounding of float sums
            del self._held[client]
