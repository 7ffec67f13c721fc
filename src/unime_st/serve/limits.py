"""How much a server takes from outside at once."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

from starlette.exceptions import HTTPException

from unime_st.arguments import require_number

MOST_INPUTS = 4096


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        max_bytes: Of a request's body; images arrive in base64, so a file may have three quarters of it.
        max_pixels: Of the images of a request together.
        max_inputs: Of a request, 4,096 at most.
        max_characters: Of the texts of a request together.
        max_results: Rows that a search returns at most.
        batch_size: Inputs, of whatever requests, that the model is given at once.
        max_wait: Seconds that an input waits for others to share its batch.
        max_waiting: Inputs that wait for the model; beyond them requests are refused with 503.
        body_seconds: Time in which a request's body must have arrived.
        max_connections: Open connections; beyond them requests are refused with 503.

    Raises:
        TypeError: For what is no number.
        ValueError: For one too small.

    Example:
        >>> Limits(max_inputs=8).max_inputs
        8
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 30_000_000
    max_inputs: int = 256
    max_characters: int = 200_000
    max_results: int = 200
    batch_size: int = 32
    max_wait: float = 0.003
    max_waiting: int = 1024
    body_seconds: float = 30.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("max_wait", "body_seconds"):
                require_number(name, value, least=0, whole=False)
            else:
                require_number(name, value, least=1)
        if self.max_inputs > MOST_INPUTS:
            raise ValueError(f"`max_inputs={self.max_inputs}`, but it must be {MOST_INPUTS} at most.")


class Room:
    """An amount that all requests together may hold; who finds it full is told to come again.

    Args:
        size: The amount.
        what: What it is of, for messages.
    """

    def __init__(self, size: int, what: str) -> None:
        self.size, self.what, self.held = size, what, 0
        self._lock = Lock()

    def take(self, amount: int) -> None:
        """Take some of it, to be given back.

        Raises:
            HTTPException: 503, when there is not so much left.
        """
        with self._lock:
            if self.held + amount > self.size:
                raise HTTPException(503, f"Too many {self.what} are waiting. Try again.", {"Retry-After": "1"})
            self.held += amount

    def give_back(self, amount: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self.held -= amount
