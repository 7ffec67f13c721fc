"""Listening: where, and who may ask there."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from unime_st.serve.gate import LOOPBACK
from unime_st.serve.limits import Limits

_SHORTEST_TOKEN = 16


def checked_hosts(host: str, token: str | None) -> tuple[str, ...] | None:
    """The names that a server may be called by: those of loopback, or any where it listens to others, with a token.

    Raises:
        ValueError: When others could ask and no token is needed, or one that can be guessed.

    Example:
        >>> checked_hosts("0.0.0.0", None)
        Traceback (most recent call last):
        ...
        ValueError: `host='0.0.0.0'` lets others ask, so a token is needed. ...
    """
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ValueError(
            f"The token must have at least {_SHORTEST_TOKEN} letters, digits and signs of ASCII, not to be guessed. "
            "`openssl rand -hex 16` makes one."
        )
    if _is_loopback(host):
        return (*LOOPBACK, host) if host not in LOOPBACK else LOOPBACK
    if token is None:
        raise ValueError(
            f"`host={host!r}` lets others ask, so a token is needed. Set UNIME_TOKEN in the environment, or leave "
            "the host out to listen to this machine alone."
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: When the port is taken, or the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(
            f"Cannot listen at {host}, port {port}: {error.strerror or error}. Give another --port."
        ) from error


def address_of(listening: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    app: ASGIApp, listening: socket.socket, limits: Limits, *, ready: Callable[[Any], None] | None = None
) -> None:
    """Answer requests until the process is asked to end.

    Args:
        app: Of ``create_app``.
        listening: Of :func:`listen`.
        limits: Bounds of connections.
        ready: Is told uvicorn's server before it begins, which can stop it.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=limits.max_connections,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    if ready is not None:
        ready(server)
    with suppress(KeyboardInterrupt):  # which it raises again once it has ended in order
        server.run(sockets=[listening])
