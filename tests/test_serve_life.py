"""The server under load, with rude clients, at its limits, and when it is told to stop; and how it is started."""

from __future__ import annotations

import concurrent.futures
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from fptq.cli import main
from fptq.runtime.engine import Engine
from serving import GREEDY, Server, alone, http_status, raw_request, running

openai = pytest.importorskip("openai")


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_connection_frees_its_place(server: Server, stream: bool) -> None:
    before = server.metric("fptq_written_tokens_total")
    connections = [raw_request(server, {"max_tokens": 4000, "stream": stream}) for _ in range(20)]
    while server.metric("fptq_running_texts") < 8:
        time.sleep(0.02)
    for connection in connections:
        connection.close()
    server.wait_until_idle()
    assert server.metric("fptq_written_tokens_total") - before < 20 * 4000


def test_a_cut_body_is_no_request(server: Server) -> None:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"'
    )
    connection.close()
    assert server.ask("GET", "/health")[1]["status"] == "ok"


def test_slow_readers_hold_nobody_up(server: Server, engine: Engine) -> None:
    slow = [raw_request(server, {"max_tokens": 1500, "stream": True, "logprobs": 20}) for _ in range(12)]
    server.wait_until_idle()  # nobody has read a byte
    assert server.client().completions.create(prompt="w1 w2", max_tokens=12, **GREEDY).choices[0].text == alone(
        engine, "w1 w2"
    )
    for connection in slow:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            part = connection.recv(1 << 20)
            assert part
            received += part
        assert received.count(b"data: {") == 1500
        assert b"data: [DONE]" in received
        connection.close()


def test_under_load_each_gets_its_own_text(server: Server, engine: Engine) -> None:
    """Clients that read and clients that leave, long and short: nothing fails, and every text is what it is alone."""
    prompts = [f"w{i} w{i + 1}" for i in range(10)]
    wanted = {prompt: alone(engine, prompt, 40) for prompt in prompts}

    def ask(i: int) -> bool:
        prompt = prompts[i % len(prompts)]
        if i % 5 == 4:
            raw_request(server, {"max_tokens": 500, "stream": True}).close()
            return True
        with server.client() as client:
            if i % 2:
                return (
                    client.completions.create(prompt=prompt, max_tokens=40, **GREEDY).choices[0].text == wanted[prompt]
                )
            stream = client.completions.create(prompt=prompt, max_tokens=40, stream=True, **GREEDY)
            return "".join(chunk.choices[0].text for chunk in stream) == wanted[prompt]

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert all(pool.map(ask, range(200)))
    server.wait_until_idle()
    files = psutil.Process(server.process.pid).num_fds()
    assert files < 60, "connections stay open"


def test_limits(served: Path) -> None:
    limits = ["--parallel", "1", "--max-waiting", "1", "--time-limit", "2", "--max-prompt-tokens", "50"]
    with running(served, *limits, "--max-new-tokens", "3900", "--cache-tokens", "4096") as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="a prompt may have 50"):
            client.completions.create(prompt="w1 " * 60, **GREEDY)
        with pytest.raises(openai.BadRequestError, match="max_tokens 3901: at most 3900"):
            client.completions.create(prompt="w1", max_tokens=3901, **GREEDY)
        server.process.send_signal(signal.SIGSTOP)  # so that it can't be quicker than its clients
        late = [raw_request(server, {"max_tokens": 3900}) for _ in range(3)]
        time.sleep(0.5)
        server.process.send_signal(signal.SIGCONT)
        statuses = [http_status(connection) for connection in late]
        assert statuses.count(503) == 1, statuses
        assert {*statuses} <= {200, 503, 504}


def test_a_late_stream_ends_with_an_error(served: Path) -> None:
    with running(served, "--time-limit", "0.05") as server:
        stream = server.client().completions.create(prompt="w1", max_tokens=4000, stream=True, **GREEDY)
        with pytest.raises(openai.APIError, match="isn't finished in time"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="isn't finished in time") as caught:
            server.client().completions.create(prompt="w1", max_tokens=4000, **GREEDY)
        assert caught.value.response.headers["X-Should-Retry"] == "false"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_what_runs(served: Path, number: signal.Signals) -> None:
    with running(served) as server:
        stream = server.client().completions.create(prompt="w1", max_tokens=2000, stream=True, **GREEDY)
        next(iter(stream))
        server.process.send_signal(number)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_it_stops_in_time_even_if_something_runs(served: Path) -> None:
    with running(served, "--drain", "1", "--context", "4000") as server:
        connection = raw_request(server, {"max_tokens": 3900, "n": 16, "stream": True})
        connection.recv(100)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        connection.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel", "0"], "0 texts at a time"),
        (["--max-waiting", "-1"], "a line of -1 texts"),
        (["--time-limit", "0"], "--time-limit 0.0: needed more than 0"),
        (["--max-new-tokens", "-3"], "--max-new-tokens -3: needed more than 0"),
        (["--cache-tokens", "5"], "a cache of 5 tokens: needed at least the context"),
        (["--host", "256.1.1.1"], "can't listen at 256.1.1.1"),
        (["--", "--dtype", "float32"], "'-- --dtype float32' is for --backend vllm"),
        (["--backend", "vllm"], "needs vLLM in this environment"),
        (["--backend", "vllm", "--drain", "5"], "--drain is for our engine"),
    ],
)
def test_options_that_cannot_be(
    served: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(served), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use(served: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(served), "--port", str(server.port)]) == 1
    assert f"can't listen at 127.0.0.1, port {server.port}: Address already in use" in capsys.readouterr().err


def test_vllm_gets_folder_and_options(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def become(_: str, command: list[str]) -> None:
        called.append(command)
        raise SystemExit

    monkeypatch.setattr("os.execv", become)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    options = ["--context", "2048", "--parallel", "4", "--api-key", "secret", "--", "--dtype", "float32"]
    with pytest.raises(SystemExit):
        main(["serve", str(served), "--backend", "vllm", *options])
    command = " ".join(called[0])
    assert command.endswith("--max-num-seqs 4 --max-model-len 2048 --dtype float32")
    assert f"serve {served} --served-model-name {served.name} --host 127.0.0.1 --port 8000" in command
    assert "secret" not in command
