"""Runs the application until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from fptq.errors import EngineError
from fptq.runtime.engine import Engine
from fptq.runtime.service import Service
from fptq.serve.app import Limits, make_app

_STUCK_MILLISECONDS = 60_000
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep connections (the official one: 5 seconds), so that none is closed when it is used again."""


def serve(
    engine: Engine,
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    parallel: int = 16,
    line: int = 512,
    limits: Limits | None = None,
    key: str | None = None,
    origins: Sequence[str] = (),
    drain_seconds: int = 30,
    log_requests: bool = True,
) -> None:
    """Serve a model, until SIGINT or SIGTERM; then finish what runs, and return.

    Args:
        engine: that writes.
        model: how clients name it.
        host: address to listen at.
        port: to listen at; 0 takes a free one.
        parallel: texts that are written at a time.
        line: texts that may wait; another request is refused.
        limits: what clients may ask for.
        key: that they need.
        origins: of web pages that may ask this server, besides its own.
        drain_seconds: that running answers have when the server is told to stop.
        log_requests: write a line for each.

    Raises:
        EngineError: the address can't be listened at, or the model has no tokenizer.
        GenerationError: so many texts at a time can't be.
    """
    if engine.tokenizer is None:
        raise EngineError(f"{engine.folder}: has no tokenizer, so it can't be served")
    listening = _listen(host, port)
    service = Service(engine, parallel=parallel, line=line)
    try:
        app = make_app(service, model, limits=limits or Limits(), key=key, origins=origins)
        config = uvicorn.Config(
            app,
            log_level=logging.INFO if log_requests else logging.WARNING,
            access_log=log_requests,
            timeout_graceful_shutdown=drain_seconds,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            server_header=False,
            lifespan="off",
            ws="none",
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"fptq: {model} at http://{shown}:{port}/v1, and a page to chat at http://{shown}:{port}", flush=True)
        _Server(config).run(sockets=[listening])
    finally:
        service.close()
        listening.close()


class _Server(uvicorn.Server):
    """Ends by a signal as by any other reason; uvicorn's own would raise the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as a wish to end; another SIGINT as one to end at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows it would let several servers listen at one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that stops reading is cut off; Linux alone can do it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MILLISECONDS)
        listening.bind(address)
        listening.listen(2048)
    except OSError as cause:
        raise EngineError(f"can't listen at {host}, port {port}: {cause.strerror or cause}") from cause
    return listening
