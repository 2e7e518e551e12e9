"""HEAD and OPTIONS, which load balancers and browsers send, for all routes."""

from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAndOptions:
    """ASGI middleware: HEAD is GET without the body, OPTIONS gets 204 and the methods of the route in `Allow`."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        method = scope.get("method")
        if method not in ("HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return

        is_empty = method == "HEAD"

        async def send_without_body(message: "Message") -> None:
            nonlocal is_empty
            if message["type"] == "http.response.body":
                message = {**message, "body": b""} if is_empty else message
            elif method == "OPTIONS" and message.get("status") == 405:
                headers = MutableHeaders(scope=message)
                allowed = [each.strip() for each in headers.get("allow", "").split(",") if each.strip()]
                headers["Allow"] = ", ".join([*allowed, *(["HEAD"] if "GET" in allowed else []), "OPTIONS"])
                for name in ("content-length", "content-type"):
                    del headers[name]
                message["status"] = 204
                is_empty = True
            await send(message)

        if method == "HEAD":
            scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_without_body)
        finally:
            scope["method"] = method  # for the log
