"""A model hub on loopback that answers `huggingface_hub` like huggingface.co."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Hub:
    """Models of the server, and a log of downloads.

    Attributes:
        models: hub id to revision to the folder of its files; the commit is a hash of the revision.
        tokens: hub id to the token that it requires.
        downloads: names of the files whose content was sent, in order.
    """

    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)

    def commit(self, hub_id: str, revision: str) -> str:
        """Return the commit hash of a revision, 40 hexadecimal digits."""
        return hashlib.sha1(f"{hub_id} {self.models[hub_id][revision]}".encode()).hexdigest()

    def find(self, path: str, token: str | None) -> tuple[Path, str] | str:
        """Return the file at a URL path and its commit, or the error code of the hub."""
        hub_id, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if hub_id not in self.models or self.tokens.get(hub_id, token) != token:
            return "RepoNotFound"
        for branch, folder in self.models[hub_id].items():
            if revision in (branch, self.commit(hub_id, branch)):
                file = folder / name
                return (file, self.commit(hub_id, branch)) if file.is_file() else "EntryNotFound"
        return "RevisionNotFound"


@contextmanager
def serve_hub(cache: Path) -> Iterator[Hub]:
    """Start a hub that this process's `huggingface_hub` uses until the block ends; downloads go to ``cache``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def _answer(self, body: bool) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            result = hub.find(unquote(urlsplit(self.path).path), token)
            if isinstance(result, str):
                self.send_response(401 if result == "RepoNotFound" else 404)
                self.send_header("X-Error-Code", result)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            file, commit = result
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                hub.downloads.append(file.name)
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        constants = "huggingface_hub.constants"
        patch.setattr(f"{constants}.ENDPOINT", url)
        patch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
        patch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        patch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
        patch.setattr(f"{constants}.HF_HUB_DISABLE_TELEMETRY", True)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
