"""A running server, and what asks it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fptq.runtime.engine import Engine

openai = pytest.importorskip("openai")
prometheus = pytest.importorskip("prometheus_client.parser")
MESSAGES = [{"role": "user", "content": "w5 w6 w7"}]
GREEDY = {"model": "tiny", "temperature": 0}


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Send anything at all; return status, body and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, {**kind, **headers})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith(("{", "[")) else text, response.headers

    def metric(self, name: str, **labels: str) -> float:
        text = self.ask("GET", "/metrics")[1]
        families = prometheus.text_string_to_metric_families(text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 120
        while self.metric("fptq_running_texts") or self.metric("fptq_waiting_texts"):
            assert time.monotonic() < end, "a text keeps its place"
            time.sleep(0.05)


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    log = folder.parent / f"server{len(list(folder.parent.glob('*.log')))}.log"
    program = "import sys; from fptq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", str(folder), "--port", "0", "--model-name", "tiny", *options]
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
        try:
            while not (found := re.search(r"tiny at (http://127\.0\.0\.1:\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield Server(process, found[1], log)
        finally:
            process.terminate()
            process.wait(30)


def raw_request(server: Server, body: dict[str, object]) -> socket.socket:
    text = json.dumps({"model": "tiny", "prompt": "w1", "temperature": 0, **body})
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    connection.sendall(f"{head}\r\n\r\n{text}".encode())
    return connection


def http_status(connection: socket.socket) -> int:
    response = http.client.HTTPResponse(connection)
    response.begin()
    status = response.status
    connection.close()
    return status


def alone(engine: Engine, prompt: str, tokens: int = 12, **options: Any) -> str:
    pieces = engine.generate(engine.tokenizer.encode(prompt), max_new_tokens=tokens, **options)
    return "".join(piece.text for piece in pieces)


def alone_chat(engine: Engine, tokens: int) -> str:
    pieces = engine.generate(engine.tokenizer.chat(MESSAGES), max_new_tokens=tokens)
    return "".join(piece.text for piece in pieces)
