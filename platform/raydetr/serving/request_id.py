"""Which request ids of clients are taken over. Imports nothing, for Serve's proxies, which have no need of torch."""

import re
import uuid

_SANE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def sane_request_id(given: str | None) -> str:
    """The client's request id, if it is 1 to 64 of A-Z a-z 0-9 . _ -, else a new one of 32 hexadecimal digits."""
    return given if given is not None and _SANE.fullmatch(given) else uuid.uuid4().hex
