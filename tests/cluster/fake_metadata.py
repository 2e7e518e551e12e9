"""Fake EC2 metadata service for the hosts of `namespaces`: python fake_metadata.py ADDRESS PORT FOLDER

The file FOLDER/<address of a host> is the spot notice of that host.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        self.answer(200, b"token")

    def do_GET(self) -> None:
        notice = Path(sys.argv[3]) / self.client_address[0]
        if self.path.endswith("/spot/instance-action") and notice.exists():
            self.answer(200, notice.read_bytes())
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
