"""Who may ask and how much, decided before the application sees a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from http.cookies import CookieError, SimpleCookie

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unime_st.serve.limits import Limits, Room

COOKIE = "unime_token"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATHS = ("/token", "/page/style.css")
"""What needs no token: giving it, and the style of the page that asks for it."""

_OPEN_BYTES = 4096  # of a body that needs no token
_MARKS_OF_INPUT = 16  # brackets and commas of JSON, beside those in texts; base64 has none

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer: the page loads nothing from elsewhere, and no other site's page shows or reads it."""


class Gate:
    """Stands before an application: checks host, token and kind of body, reads the body, and sets headers.

    Args:
        app: The application.
        token: What every request must bring, as ``Authorization: Bearer`` or in a cookie; None asks for none.
        hosts: What a request may call this server, without the port; None for any. On loopback that keeps out pages
            whose name was pointed here (DNS rebinding).
        token_page: What a browser without a token is shown.
        limits: The bounds of a body.
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, hosts: Collection[str] | None, token_page: str, limits: Limits
    ) -> None:
        self.app, self.token, self.hosts, self.token_page, self.limits = app, token, hosts, token_page, limits
        self.room = Room(16 * limits.max_bytes, "bytes")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        held = _Held(self.room)
        try:
            refusal, given = self._refusal(scope), receive
            if refusal is None:
                most = _OPEN_BYTES if scope["path"] in OPEN_PATHS else self.limits.max_bytes
                given = await self._body(receive, held, most)
        except HTTPException as error:
            refusal = error_response(error)
        try:
            if refusal is not None:
                await refusal(scope, receive, send_with_headers)
                return
            async with _while_connected(receive):
                await self.app(scope, given, send_with_headers)
        finally:
            held.release()

    def _refusal(self, scope: Scope) -> Response | None:
        """What a request is answered that may not come in; None for one that may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and name not in self.hosts:
            raise HTTPException(421, f"This server is called {' or '.join(self.hosts)} only.")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["method"] != "GET":
            raise HTTPException(403, "Pages of other sites may not ask here.")
        if self.token is not None and scope["path"] not in OPEN_PATHS and not self._knows_token(headers):
            if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                return HTMLResponse(self.token_page, 401)
            raise HTTPException(401, "Give the token: `Authorization: Bearer ...`.", {"WWW-Authenticate": "Bearer"})
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and scope["path"] != "/token" and kind != "application/json":
            raise HTTPException(415, "The body must be JSON, with `Content-Type: application/json`.")
        return None

    def _knows_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), self.token or ""):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and same(cookie.value, cookie_of(self.token or ""))

    async def _body(self, receive: Receive, held: _Held, most: int) -> Receive:
        """Read the whole body into memory; what is beyond the bound is dropped, but read, or no answer would arrive.

        Returns:
            What gives the body to the application in one piece.
        """
        chunks, total = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HTTPException(400, "The body did not arrive whole.")
                    chunk = message.get("body", b"")
                    total += len(chunk)
                    if total <= most:
                        held.take(len(chunk))
                        chunks.append(chunk)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            seconds = f"{self.limits.body_seconds:g} seconds"
            raise HTTPException(408, f"The body did not arrive within {seconds}.", {"Connection": "close"}) from None
        if total > most:
            raise HTTPException(413, f"The body has more than the {most:,} bytes that it may have.")
        body = b"".join(chunks)
        if (
            sum(body.count(mark) for mark in b"[{,")
            > self.limits.max_characters + _MARKS_OF_INPUT * self.limits.max_inputs
        ):
            raise HTTPException(413, "The body has more parts than its inputs can have.")  # each takes much memory
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def give() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        return give


class _Held:
    """What one request holds of the room."""

    def __init__(self, room: Room) -> None:
        self.room, self.amount = room, 0

    def take(self, amount: int) -> None:
        self.room.take(amount)
        self.amount += amount

    def release(self) -> None:
        self.room.give_back(self.amount)


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel what is within once the client has gone."""
    with anyio.CancelScope() as work:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            work.cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()


def error_response(error: HTTPException) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    said = error.detail.encode("utf-8", "backslashreplace").decode()  # it may name what was sent
    content = {"error": {"message": said, "type": kind, "code": error.status_code}}
    return JSONResponse(content, error.status_code, error.headers)


def same(given: str, token: str) -> bool:
    """Compare in a time that tells nothing."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def cookie_of(token: str) -> str:
    """The value of the cookie of who has given the token."""
    return hashlib.sha256(f"unime {token}".encode()).hexdigest()
