"""Who may ask: bearer tokens, of which a file holds the hashes.

One token a line of the file, `sha256hex  name`; the name goes into the log. `#` begins a comment. `add_token` makes one
(`pipelines/token_file.py --tokens FILE --name alice`).

The client sends `Authorization: Bearer TOKEN`. To rotate: add a line, hand the new token out, remove the old line.
A plain SHA-256 is enough for a random token of 256 bits, and not for a password that a person made up.
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
"""What needs no token: the page, the documentation, and the questions of load balancers."""

_LOG = logging.getLogger(__name__)
_LINE = re.compile(r"([0-9A-Fa-f]{64})\s+(\S.{0,99})", re.ASCII)
_LONGEST_FILE = 1024 * 1024
_LONGEST_TOKEN = 1024


class Tokens:
    """The tokens of a file, read again when it changes.

    What counts is what the file says now: a line that is removed lets nobody in a second later, and a file that is
    removed or cannot be read lets nobody in until it is back.

    Args:
        path: a file on this machine; see the module for its lines.
        recheck_s: how long what was read is used before the file is looked at again, in seconds.
        clock: seconds; for tests.

    Raises:
        ConfigError: the file cannot be read, or has no token, or a line that is none. Only here: later on such a
            line is skipped and logged.
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
                "name. The token itself does not belong into the file."
            )
        if not self._names:
            raise ConfigError(f"--tokens {self.path} has no token: add a line `sha256hex  name`.")
        self._checked = self._clock()

    def name_of(self, token: str) -> str | None:
        """The name beside a token's hash, or None for a token that is not in the file now."""
        self._look_again()
        if len(token) > _LONGEST_TOKEN:
            return None
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self._names.items():
            # All are compared, each in constant time: the time tells nothing about which one is near.
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _look_again(self) -> None:
        now = self._clock()
        if now - self._checked < self.recheck_s:
            return
        self._checked = now
        try:
            content = _read(self.path)
        except OSError as error:
            if self._names:
                _LOG.error("%s cannot be read (%s): nobody is let in", self.path, error.strerror or error)
            self._content, self._names = b"", {}
            return
        if content == self._content:
            return
        self._content = content
        self._names, bad = parse_tokens(content)
        _LOG.warning("%s has changed: it has %d tokens now", self.path, len(self._names))
        if bad:
            # the number alone: the line may be a token that somebody forgot to hash
            _LOG.error("%s: skipped lines that are not `sha256hex  name`: %s", self.path, bad[:20])


def parse_tokens(content: bytes) -> tuple[Mapping[bytes, str], list[int]]:
    """Names by SHA-256 digest (32 bytes), and the numbers (from 1) of the lines that are no token."""
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
    """Make a new token, and add its hash to a file, which is created for its owner alone where there is none.

    Args:
        path: the file.
        name: of the client, for the log; one to 100 characters without `#`. It may have other tokens, as while one is
            being replaced.

    Returns:
        the token, which is stored nowhere.

    Raises:
        ConfigError: the name cannot be one, or the file cannot be written.
    """
    token = secrets.token_urlsafe(32)
    line = f"{hashlib.sha256(token.encode()).hexdigest()}  {name}\n".encode()
    if list(parse_tokens(line)[0].values()) != [name]:
        raise ConfigError(
            f"--name is {name!r}: give 1 to 100 printable characters, without # and outer spaces."
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
    """What asks an endpoint, for a shell.

    Args:
        url: of the endpoint.
        tokens: its file of tokens; empty: it wants none.
    """
    header = '-H "Authorization: Bearer $TOKEN" ' if tokens else ""
    return f"curl {header}--data-binary @photo.jpg {shlex.quote(f'{url}/v1/detect?threshold=0.5')}"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_LONGEST_FILE + 1)
    if len(content) > _LONGEST_FILE:
        raise OSError(f"it is larger than {_LONGEST_FILE} bytes")
    return content


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_tokens(host: str, tokens: str | Path | None) -> None:
    """Refuse to serve other machines without tokens.

    Raises:
        ConfigError: the host is not a loopback address and there is no file of tokens.
    """
    if tokens is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines: give a file of token hashes with --tokens, or "
            "bind to 127.0.0.1."
        )


class BearerAuth:
    """ASGI middleware: a request without a token of the file gets no further. Belongs inside `RequestContext`.

    Every path but the open ones needs a token, so that a new route cannot be forgotten. Paths are compared whole, as
    the router will see them.

    Args:
        app: what is protected.
        tokens: who may ask.
        open_paths: what needs no token.

    Raises:
        HTTPException: 401 with WWW-Authenticate; the middleware outside makes the answer.
    """

    def __init__(self, app: "ASGIApp", tokens: Tokens, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app = app
        self.tokens = tokens
        self.open_paths = open_paths

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Let one request through, or not."""
        if scope["type"] == "http" and not self._is_open(scope):
            name = self._client(Headers(scope=scope))
            scope.setdefault("state", {})["client"] = name
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing here speaks it
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
            message = "The token in the Authorization header is not one that this endpoint knows."
            challenge = 'Bearer error="invalid_token"'
        else:
            message, challenge = "Send a token in the header `Authorization: Bearer TOKEN`.", "Bearer"
        raise HTTPException(401, message, {"WWW-Authenticate": challenge})
