"""The application: the page, what it asks for, and ``/v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from unime_st.serve.encoder import Encoder
from unime_st.serve.gate import COOKIE, LOOPBACK, Gate, cookie_of, error_response, same
from unime_st.serve.limits import Limits
from unime_st.serve.requests import EmbeddingsRequest, SearchRequest, advice
from unime_st.serve.searching import Search, Searcher

PAGE = Path(__file__).parent / "page"


def create_app(
    model: Any,
    search: Search,
    inputs: Any = None,
    *,
    name: str = "encoder",
    token: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    limits: Limits | None = None,
) -> ASGIApp:
    """Make the application that ``unime serve`` runs: a search page over a corpus, and ``/v1/embeddings``.

    Requests that come at once are encoded together; see :class:`Limits` for what a request may hold.

    Args:
        model: The encoder that the corpus was encoded with, as ``load_encoder`` gives it.
        search: Finds rows of the corpus.
        inputs: What the corpus was encoded from, as ``load_inputs`` reads it; without it ids alone are shown.
        name: What ``/v1/embeddings`` calls the model.
        token: What every request must bring; None asks for none, which is for loopback.
        hosts: Names that requests may call this server by; None for any, which is for a server with a token.
        limits: Bounds of requests.

    Returns:
        An ASGI application, for uvicorn or a test client.

    Raises:
        ValueError: When the inputs are of another corpus, or nothing decides who may ask.
    """
    if token is None and hosts is None:
        raise ValueError("Without `token` and `hosts` anybody could ask. Give one of them.")
    limits = limits or Limits()
    encoder = Encoder(model, limits)
    searcher = Searcher(search, inputs, encoder, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with encoder.running():
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)  # their pages load from elsewhere
    app.add_exception_handler(HTTPException, lambda _, error: error_response(error))  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, lambda _, error: error_response(advice(error)))  # type: ignore[arg-type]
    _add_page(app, token)
    _add_search(app, searcher)
    _add_embeddings(app, encoder, name)
    return Gate(app, token=token, hosts=hosts, token_page=_read("token.html"), limits=limits)


def _add_page(app: FastAPI, token: str | None) -> None:
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.post("/token")
    async def give_token(request: Request) -> Response:
        given = parse_qs((await request.body()).decode("utf-8", "replace")).get("token", [""])[0]
        if token is None or not same(given, token):
            wrong = '<p role="alert">That is not the token.</p>'
            return HTMLResponse(_read("token.html").replace("<!-- wrong -->", wrong), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, cookie_of(token), httponly=True, samesite="strict")
        return answer


def _add_search(app: FastAPI, searcher: Searcher) -> None:
    @app.get("/about")
    def about() -> JSONResponse:
        return JSONResponse(searcher.about())

    @app.post("/search")
    async def search(asked: SearchRequest) -> JSONResponse:
        return JSONResponse(await searcher(asked))

    @app.get("/thumbnails/{row}")
    async def thumbnail(row: int) -> Response:
        return Response(await searcher.thumbnail(row), media_type="image/webp")


def _add_embeddings(app: FastAPI, encoder: Encoder, name: str) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(asked: EmbeddingsRequest) -> JSONResponse:
        if asked.model not in (None, name):
            raise HTTPException(404, f"There is no model {asked.model[:100]!r}; this is {name!r}.")
        embedded = await encoder.asked(asked)
        dimension = len(embedded[0].vector)
        if asked.dimensions not in (None, dimension):
            raise HTTPException(
                400, f"`dimensions` is {asked.dimensions}, but this model's embeddings have {dimension}."
            )
        tokens = sum(one.tokens for one in embedded)
        as_asked = _as_base64 if asked.encoding_format == "base64" else _as_numbers
        data = [
            {"object": "embedding", "index": place, "embedding": as_asked(one.vector)}
            for place, one in enumerate(embedded)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _as_numbers(vector: np.ndarray) -> list[float]:
    return vector.tolist()


def _as_base64(vector: np.ndarray) -> str:
    """Little-endian float32, as OpenAI's clients expect it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
