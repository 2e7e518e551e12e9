"""Validate request ids of clients. Without heavy imports, because Serve's proxies import it."""

import re
import uuid

_SANE = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def sane_request_id(given: str | None) -> str:
    """Return the client's id if it has 1 to 64 characters of A-Z a-z 0-9 . _ -, else a new id of 32 hex digits."""
    return given if given is not None and _SANE.fullmatch(given) else uuid.uuid4().hex
