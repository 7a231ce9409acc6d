"""The web application: OpenAI's routes, health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from time import monotonic, time
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fptq.errors import FPTQError
from fptq.runtime.service import Service
from fptq.runtime.writing import Piece, Text
from fptq.serve.metrics import Metrics, Watch
from fptq.serve.replies import Reply
from fptq.serve.requests import APIError, ChatRequest, CompletionRequest, Request, sampling_defaults

BODY_SECONDS = 30
"""In which a body must be there."""
READING_SECONDS = 60
"""That a client has for the rest of a stream, once its time is over."""
_CLIENT_GONE = 499
"""A status that nobody gets, for the log and the metrics."""
_PAGE_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes:
        prompt_tokens: of a prompt; None: what the context has room for.
        new_tokens: of an answer; None: what the context leaves.
        seconds: from a request to the end of its answer, waiting included.
    """

    prompt_tokens: int | None = None
    new_tokens: int | None = None
    seconds: float = 600.0


class Api:
    """OpenAI's routes on a service.

    Args:
        service: that writes.
        model: how clients name it.
        limits: what they may ask for.
    """

    def __init__(self, service: Service, model: str, limits: Limits):
        self._service = service
        self._engine = service.engine
        self._model = model
        self._limits = limits
        self._created = int(time())
        self._defaults = sampling_defaults(self._engine.folder)
        self._body_bytes = (1 << 20) + 64 * self._engine.context
        self.metrics = Metrics(service)

    def routes(self) -> list[Route]:
        """Return all routes."""
        return [
            Route("/v1/completions", partial(self._write, CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._write, ChatRequest), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/", self._page),
        ]

    async def _write(self, kind: type[Request], request: HTTPRequest) -> Response:
        asked = kind.read(await self._body(request))
        self._need_model(asked.model)
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None
        texts = await run_in_threadpool(
            asked.texts,
            self._engine,
            self._defaults,
            most_prompt=self._limits.prompt_tokens or self._engine.context - 1,
            most_new=self._limits.new_tokens,
            most_texts=self._service.most_texts,
        )
        writing = _Writing(self._service, texts, self._limits.seconds, self.metrics)
        self.metrics.prompt_tokens.inc(sum(len(text.prompt) for text in texts[:: asked.n]))
        reply = asked.reply(self._model, tokenizer)
        if asked.stream:
            events = _events(writing, reply, asked.stream_options.include_usage)
            return _EventStream(events, writing.close, self._limits.seconds + READING_SECONDS)
        try:
            is_there = await _unless_disconnected(request, writing.finish())
        finally:
            writing.close()
        return JSONResponse(reply.whole(texts)) if is_there else Response(status_code=_CLIENT_GONE)

    async def _body(self, request: HTTPRequest) -> bytes:
        """Return the body of a request, if it is JSON, not too long and there in time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a web page can send it elsewhere only if that server agrees
            raise APIError(
                415, f"the body is {kind or 'of no type'}: needed the header 'Content-Type: application/json'"
            )
        body = bytearray()
        try:
            with anyio.fail_after(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self._body_bytes:
                        raise APIError(413, f"the body is too long: {self._body_bytes} bytes are the most")
        except TimeoutError:
            raise APIError(408, f"the body wasn't there in {BODY_SECONDS} seconds") from None
        return bytes(body)

    def _need_model(self, model: str) -> None:
        if model != self._model:
            message = f"the model {model!r} does not exist; this server has {self._model!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    def _description(self) -> dict[str, Any]:
        context = self._engine.context
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "fptq",
            "max_model_len": context,
        }

    async def _models(self, _: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _one_model(self, request: HTTPRequest) -> Response:
        self._need_model(request.path_params["model"])
        return JSONResponse(self._description())

    async def _health(self, _: HTTPRequest) -> Response:
        load = self._service.load()
        return JSONResponse({"status": "ok", "running": load.running, "waiting": load.waiting})

    async def _metrics(self, _: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def _page(self, _: HTTPRequest) -> Response:
        page = resources.files("fptq.serve").joinpath("chat.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})


class _Writing:
    """The texts of one request, while they are written.

    Raises:
        BusyError: the line is full.
    """

    def __init__(self, service: Service, texts: list[Text], seconds: float, metrics: Metrics):
        self.texts = texts
        self._service = service
        self._events: asyncio.Queue[tuple[int, Piece | FPTQError]] = asyncio.Queue()
        self._watches = [Watch(metrics) for _ in texts]
        loop = asyncio.get_running_loop()

        def listen(index: int, event: Piece | FPTQError) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        service.submit({text: partial(listen, i) for i, text in enumerate(texts)}, seconds=seconds)

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Yield the pieces of all texts, each with its text's index, as many as are there; or raise APIError."""
        unfinished = len(self.texts)
        while unfinished:
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            there: list[tuple[int, Piece]] = []
            failed: FPTQError | None = None
            for index, event in events:
                if isinstance(event, FPTQError):
                    failed = failed or event
                else:
                    self._watches[index].token()
                    unfinished -= event.finish_reason is not None
                    there.append((index, event))
            yield there
            if failed:
                raise APIError.of(failed)
            await asyncio.sleep(0)  # others have their turn, even if more is there already

    async def finish(self) -> None:
        """Wait for the end of all texts, or raise APIError."""
        async for _ in self.pieces():
            pass

    def close(self) -> None:
        """Stop what isn't finished."""
        for text in self.texts:
            self._service.drop(text)


class _EventStream(StreamingResponse):
    """Server-sent events; whatever happens, `close` is called at the end, and there is an end after `seconds`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], seconds: float):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _events(writing: _Writing, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    begun: set[int] = set()
    try:
        async for there in writing.pieces():
            chunks = []
            for index, piece in there:
                chunk = reply.chunk(index, piece, first=index not in begun)
                begun.add(index)
                if chunk is not None:
                    chunks.append(_event({**chunk, "usage": None} if include_usage else chunk))
            yield "".join(chunks)
        if include_usage:
            yield _event(reply.usage_chunk(writing.texts))
    except APIError as error:
        yield _event(error.to_dict())
    yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_disconnected(request: HTTPRequest, work: Awaitable[None]) -> bool:
    """Wait for work, or until the client is gone; return whether it was done."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        job.cancel()  # nothing, if it is done
    if job.done():
        job.result()
    return job.done()


class _Keys:
    """Lets requests to /v1 through that have the key."""

    def __init__(self, app: ASGIApp, key: str):
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                error = APIError(401, "the API key is missing or wrong", code="invalid_api_key")
                await _error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Counts:
    """Counts requests, and measures how long they take."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]):
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        start, status = monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.request_seconds.labels(path).observe(monotonic() - start)


def _error_response(error: APIError, headers: dict[str, str] | None = None) -> Response:
    if error.status == 504:
        headers = {"X-Should-Retry": "false", **(headers or {})}  # it would take as long again
    if error.status == 503:
        headers = {"Retry-After": "1", **(headers or {})}
    return JSONResponse(error.to_dict(), error.status, headers)


def make_app(
    service: Service, model: str, *, limits: Limits, key: str | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """Return the application.

    Args:
        service: that writes.
        model: how clients name it.
        limits: what they may ask for.
        key: that requests to /v1 must have.
        origins: of web pages that may ask this server, besides its own.
    """
    api = Api(service, model, limits)
    routes = api.routes()
    middleware = [Middleware(_Counts, api.metrics, [route.path for route in routes])]
    if origins:
        any_: list[str] = ["*"]
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=any_, allow_headers=any_))
    if key is not None:
        middleware.append(Middleware(_Keys, key))

    async def of_api(_: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return _error_response(error)

    async def of_ours(_: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, FPTQError)
        return _error_response(APIError.of(error))

    async def of_http(request: HTTPRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error_response(APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    async def of_nobody(_: HTTPRequest, __: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    async def of_any(_: HTTPRequest, error: Exception) -> Response:
        return _error_response(APIError(500, "the server has made a mistake; its log says more", "server_error"))

    handlers = {
        APIError: of_api,
        FPTQError: of_ours,
        HTTPException: of_http,
        ClientDisconnect: of_nobody,
        Exception: of_any,
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
