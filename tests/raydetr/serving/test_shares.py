from raydetr.serving.shares import FairShare


def fill(share: FairShare, client: str) -> int:
    count = 0
    while share.acquire(client):
        count += 1
    return count


def test_no_client_gets_all_and_a_new_client_finds_room():
    share = FairShare(64)
    first, second, third = fill(share, "a"), fill(share, "b"), fill(share, "c")
    assert first == 48
    assert second == 12
    assert third > 0
    assert share.used <= 64


def test_busy_clients_converge_to_equal_shares():
    share = FairShare(70)
    held = {"a": fill(share, "a"), "b": 0}
    for _ in range(200):  # each client releases one and acquires what it can
        for client in held:
            if held[client]:
                share.release(client)
                held[client] -= 1
            held[client] += fill(share, client)
    assert abs(held["a"] - held["b"]) <= 2
    assert sum(held.values()) >= 58


def test_small_capacities_can_be_used():
    assert [fill(FairShare(capacity), "a") for capacity in (1, 2, 3, 4, 8)] == [1, 2, 3, 3, 6]


def test_released_amounts_leave_no_remainder():
    share = FairShare(10)
    for amount in (0.1, 0.2, 0.7, 3):
        assert share.acquire("a", amount)
    assert not share.acquire("b", 8)
    for amount in (3, 0.7, 0.2, 0.1):
        share.release("a", amount)
    assert abs(share.used) < 1e-9
    assert share._held == {}
