"""Authentication with bearer tokens, whose hashes are in a file.

The file has one token per line, `sha256hex  name`. The name is written to the log. `#` starts a comment. `add_token`
creates a token (`pipelines/token_file.py --tokens FILE --name alice`).

The client sends `Authorization: Bearer TOKEN`. To rotate a token, add a line, distribute the new token and remove the
old line. An unsalted SHA-256 is enough for a random token of 256 bits, but not for a password that a person chose.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from raydetr.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"}
    | {f"/docs-assets/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")}
)
"""Paths that need no token: the demo page, the API documentation and the health checks."""

_LOG = logging.getLogger(__name__)
_LINE = re.compile(r"([0-9A-Fa-f]{64})\s+(\S.{0,99})", re.ASCII)
_MAX_FILE_BYTES = 1024 * 1024
_MAX_TOKEN_CHARS = 1024


class Tokens:
    """Tokens of a file, which is reloaded when it changes.

    A removed line stops working within `recheck_s`. While the file is missing or cannot be read, all tokens are
    rejected.

    Args:
        path: a local file; the module docstring describes its lines.
        recheck_s: interval at which the file is checked for changes, in seconds.
        clock: returns seconds; for tests.

    Raises:
        ConfigError: the file cannot be read, has no token or has an invalid line. Invalid lines that are added later
            are skipped and logged.
    """

    def __init__(
        self, path: str | Path, recheck_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = Path(path)
        self.recheck_s = recheck_s
        self._clock = clock
        try:
            self._content = _read(self.path)
        except OSError as error:
            raise ConfigError(f"--tokens {self.path} cannot be read: {error.strerror or error}.") from error
        self._names, bad = parse_tokens(self._content)
        if bad:
            raise ConfigError(
                f"--tokens {self.path}: line {bad[0]} is not `sha256hex  name`: 64 hexadecimal digits, a space, a "
                "name. Do not put the token itself into the file."
            )
        if not self._names:
            raise ConfigError(f"--tokens {self.path} has no token: add a line `sha256hex  name`.")
        self._checked = self._clock()

    def name_of(self, token: str) -> str | None:
        """Return the name of a token, or None if the token is not in the file."""
        self._reload_if_due()
        if len(token) > _MAX_TOKEN_CHARS:
            return None
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        client = None
        for known, name in self._names.items():
            # Compare with all hashes, each in constant time, so that the response time reveals nothing about them.
            if hmac.compare_digest(known, digest):
                client = name
        return client

    def _reload_if_due(self) -> None:
        now = self._clock()
        if now - self._checked < self.recheck_s:
            return
        self._checked = now
        try:
            content = _read(self.path)
        except OSError as error:
            if self._names:
                _LOG.error(
                    "%s cannot be read (%s): all tokens are rejected", self.path, error.strerror or error
                )
            self._content, self._names = b"", {}
            return
        if content == self._content:
            return
        self._content = content
        self._names, bad = parse_tokens(content)
        _LOG.warning("%s has changed: it now has %d tokens", self.path, len(self._names))
        if bad:
            # only the line numbers: the line may be a token that was not hashed
            _LOG.error("%s: skipped lines that are not `sha256hex  name`: %s", self.path, bad[:20])


def parse_tokens(content: bytes) -> tuple[Mapping[bytes, str], list[int]]:
    """Return the names by SHA-256 digest (32 bytes), and the numbers (from 1) of the invalid lines."""
    names: dict[bytes, str] = {}
    bad = []
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or not match[2].isprintable():
            bad.append(number)
        else:
            names[bytes.fromhex(match[1])] = match[2]
    return names, bad


def add_token(path: str | Path, name: str) -> str:
    """Create a token and append its hash to a file. A new file is readable by its owner only.

    Args:
        path: the file.
        name: client name for the log, 1 to 100 characters without `#`. A client may have several tokens, e.g. during
            a rotation.

    Returns:
        the token, which is not stored anywhere.

    Raises:
        ConfigError: the name is not valid, or the file cannot be written.
    """
    token = secrets.token_urlsafe(32)
    line = f"{hashlib.sha256(token.encode()).hexdigest()}  {name}\n".encode()
    if list(parse_tokens(line)[0].values()) != [name]:
        raise ConfigError(
            f"--name is {name!r}: give 1 to 100 printable characters, without # and without leading or trailing spaces."
        )
    try:
        with open(path, "ab", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
            if file.tell() and not _read(Path(path)).endswith(b"\n"):
                file.write(b"\n")
            file.write(line)
    except OSError as error:
        raise ConfigError(f"--tokens {path} cannot be written: {error.strerror or error}.") from error
    return token


def curl_command(url: str, tokens: str) -> str:
    """Return a curl command that sends an image to an endpoint.

    Args:
        url: URL of the endpoint.
        tokens: the endpoint's token file; empty if it requires no token.
    """
    header = '-H "Authorization: Bearer $TOKEN" ' if tokens else ""
    return f"curl {header}--data-binary @photo.jpg {shlex.quote(f'{url}/v1/detect?threshold=0.5')}"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise OSError(f"it is larger than {_MAX_FILE_BYTES} bytes")
    return content


def is_loopback(host: str) -> bool:
    """Check whether an address to bind to can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_tokens(host: str, tokens: str | Path | None) -> None:
    """Require a token file if the endpoint can be reached from other machines.

    Raises:
        ConfigError: the host is not a loopback address and no token file is given.
    """
    if tokens is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines: pass a file of token hashes with --tokens, or "
            "bind to 127.0.0.1."
        )


class BearerAuth:
    """ASGI middleware that rejects requests without a valid token. Must be inside `RequestContext`.

    All paths except the open ones need a token, so a new route is protected by default. Paths must match exactly, as
    the router sees them.

    Args:
        app: the protected app.
        tokens: the accepted tokens.
        open_paths: paths that need no token.

    Raises:
        HTTPException: 401 with WWW-Authenticate; the outer middleware turns it into a response.
    """

    def __init__(self, app: "ASGIApp", tokens: Tokens, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app = app
        self.tokens = tokens
        self.open_paths = open_paths

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Authenticate one request."""
        if scope["type"] == "http" and not self._is_open(scope):
            name = self._client(Headers(scope=scope))
            scope.setdefault("state", {})["client"] = name
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # no route uses WebSocket
            return
        await self.app(scope, receive, send)

    def _is_open(self, scope: "Scope") -> bool:
        path, root = scope["path"], scope.get("root_path", "").rstrip("/")
        if root and path.startswith(root + "/"):
            path = path[len(root) :]
        return path in self.open_paths

    def _client(self, headers: Headers) -> str:
        given = headers.getlist("authorization")
        if len(given) == 1:
            scheme, _, token = given[0].partition(" ")
            if scheme.lower() == "bearer":
                name = self.tokens.name_of(token.strip(" "))
                if name is not None:
                    return name
            message = "The token in the Authorization header is not valid for this endpoint."
            challenge = 'Bearer error="invalid_token"'
        else:
            message, challenge = "Send a token in the header `Authorization: Bearer TOKEN`.", "Bearer"
        raise HTTPException(401, message, {"WWW-Authenticate": challenge})
