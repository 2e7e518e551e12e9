"""Divides what an endpoint has (places, bytes, seconds of decoding) among its clients."""

from collections import defaultdict

FACTOR = 3


class FairShare:
    """A capacity of which no client can take all.

    A client may take more while it holds less than `FACTOR` times what is free. So one alone gets three quarters, two
    get three sevenths each, and a newcomer always finds room: the dynamic thresholds of Choudhury and Hahne, "Dynamic
    queue length thresholds for shared-memory packet switches" (1998).

    Args:
        capacity: of all clients together.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = 0.0
        self._held: defaultdict[str, float] = defaultdict(float)

    def held(self, client: str) -> float:
        """What a client has taken and not given back."""
        return self._held.get(client, 0.0)

    def is_full(self, client: str, amount: float = 1.0) -> bool:
        """Whether this client cannot take an amount now."""
        free = self.capacity - self.used
        return amount > free or self.held(client) >= FACTOR * free

    def take(self, client: str, amount: float = 1.0) -> bool:
        """Take an amount for a client; False where it has had its share or nothing is left."""
        if self.is_full(client, amount):
            return False
        self.used += amount
        self._held[client] += amount
        return True

    def give_back(self, client: str, amount: float = 1.0) -> None:
        """Give back an amount that `take` took."""
        self.used -= amount
        self._held[client] -= amount
        if self._held[client] < 1e-9:  # sums of floats
            del self._held[client]
