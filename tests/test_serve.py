"""The server as its clients see it: OpenAI's own, rude ones, and a browser."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fptq.cli import main
from fptq.runtime.engine import Engine
from fptq.runtime.sampling import Sampling
from test_engine import checkpoint_of

openai = pytest.importorskip("openai")
prometheus = pytest.importorskip("prometheus_client.parser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MESSAGES = [{"role": "user", "content": "w5 w6 w7"}]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoint_of(tmp_path_factory.mktemp("serve"), "llama", max_position_embeddings=4096)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1000}')  # texts don't end by themselves
    return folder


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


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with running(folder, "--threads", "2", "--parallel", "8", "--max-waiting", "100") as server:
        yield server
        server.wait_until_idle()
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.open(folder, threads=1) as engine:
        yield engine


def alone(engine: Engine, prompt: str, tokens: int = 12, **options: Any) -> str:
    pieces = engine.generate(engine.tokenizer.encode(prompt), max_new_tokens=tokens, **options)
    return "".join(piece.text for piece in pieces)


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fptq"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; this server has 'tiny'"):
        client.models.retrieve("other")


def test_completions_are_the_engines(server: Server, engine: Engine) -> None:
    answer = server.client().completions.create(prompt="w1 w2", max_tokens=12, **GREEDY)
    choice = answer.choices[0]
    assert choice.text == alone(engine, "w1 w2")
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 12, 15)
    usual = server.client().completions.create(prompt="w1 w2", **GREEDY)
    assert usual.usage.completion_tokens == 16


def test_several_prompts_and_answers(server: Server, engine: Engine) -> None:
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0.9, "top_p": 0.8, "seed": 7}
    answer = server.client().completions.create(prompt=["w1 w2", "w3"], n=2, **options)
    sampling = [Sampling(temperature=0.9, top_p=0.8, seed=seed) for seed in (7, 8)]
    wanted = [alone(engine, prompt, 8, sampling=s) for prompt in ("w1 w2", "w3") for s in sampling]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 32)
    ids = engine.tokenizer.encode("w1 w2")
    for prompt in (ids, [ids]):
        again = server.client().completions.create(prompt=prompt, **options)
        assert again.choices[0].text == wanted[0]


def test_the_model_says_how_to_choose_what_a_client_does_not(
    folder: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(folder, tmp_path / "q")
    config = {"eos_token_id": 1000, "temperature": 1.5, "top_k": 9, "repetition_penalty": 1.2, "do_sample": True}
    (changed / "generation_config.json").write_text(json.dumps(config))
    with running(changed) as server:
        create = server.client().completions.create
        answer = create(model="tiny", prompt="w1 w2", seed=3)
        sampling = Sampling(temperature=1.5, top_k=9, repetition_penalty=1.2, seed=3)
        assert answer.choices[0].text == alone(engine, "w1 w2", 16, sampling=sampling)
        answer = create(model="tiny", prompt="w1 w2", seed=3, temperature=0, extra_body={"repetition_penalty": 1})
        assert answer.choices[0].text == alone(engine, "w1 w2", 16)
    (changed / "generation_config.json").write_text('{"top_p": 7}')
    assert main(["serve", str(changed), "--port", "0"]) == 1
    assert "generation_config.json: top_p 7: needed a number above 0, up to 1" in capsys.readouterr().err


def test_without_a_word_temperature_is_as_in_chats(server: Server, engine: Engine) -> None:
    answer = server.client().completions.create(model="tiny", prompt="w1 w2", seed=5)
    assert answer.choices[0].text == alone(engine, "w1 w2", 16, sampling=Sampling(temperature=0.7, seed=5))


def test_streams_are_what_comes_at_once(server: Server) -> None:
    options = {"prompt": ["w1 w2", "w3 w4"], "max_tokens": 10, "logprobs": 2, **GREEDY}
    whole = server.client().completions.create(**options)
    texts, tokens, reasons = ["", ""], [[], []], [None, None]
    stream = server.client().completions.create(stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == ["length", "length"]


def test_chat(server: Server, engine: Engine) -> None:
    wanted = list(engine.generate(engine.tokenizer.chat(MESSAGES), max_new_tokens=12, log_probabilities=2))
    text = "".join(piece.text for piece in wanted)
    options = {"messages": MESSAGES, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2, **GREEDY}
    answer = server.client().chat.completions.create(**options)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert [entry.logprob for entry in choice.logprobs.content] == [piece.log_probability for piece in wanted]
    first = choice.logprobs.content[0]
    assert bytes(first.bytes).decode() == first.token
    assert [other.logprob for other in first.top_logprobs] == [p for _, p in wanted[0].alternatives]
    chunks = list(server.client().chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content] == choice.logprobs.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_messages_in_parts_and_of_developers(server: Server) -> None:
    create = server.client().chat.completions.create
    whole = create(messages=[{"role": "system", "content": "w9 w8"}, *MESSAGES], max_tokens=8, **GREEDY)
    parts = [{"type": "text", "text": "w9 "}, {"type": "text", "text": "w8"}]
    again = create(messages=[{"role": "developer", "content": parts}, *MESSAGES], max_tokens=8, **GREEDY)
    assert again.choices[0].message.content == whole.choices[0].message.content
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match="messages"):
        create(messages=picture, **GREEDY)


def test_stop_strings(server: Server, engine: Engine) -> None:
    words = alone(engine, "w1 w2").split()
    answer = server.client().completions.create(prompt="w1 w2", max_tokens=12, stop=["zz", words[4]], **GREEDY)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text.split() == words[: words.index(words[4])]


def test_variables_of_the_template(server: Server) -> None:
    create = server.client().chat.completions.create
    taken = create(
        messages=MESSAGES, max_tokens=2, extra_body={"chat_template_kwargs": {"enable_thinking": True}}, **GREEDY
    )
    assert taken.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="'messages' is none of the template's own variables"):
        create(messages=MESSAGES, extra_body={"chat_template_kwargs": {"messages": []}}, **GREEDY)


def test_penalties_and_biases(server: Server, engine: Engine) -> None:
    never = {str(token): -100 for token in range(160) if token != 60}
    create = server.client().completions.create
    answer = create(prompt="w1", max_tokens=4, logit_bias=never, **GREEDY)
    assert answer.choices[0].text.split() == ["w56"] * 4
    answer = create(prompt="w1", max_tokens=30, frequency_penalty=2, presence_penalty=2, **GREEDY)
    sampling = Sampling(frequency_penalty=2, presence_penalty=2)
    assert answer.choices[0].text == alone(engine, "w1", 30, sampling=sampling) != alone(engine, "w1", 30)


def test_what_was_read_is_not_read_again(server: Server) -> None:
    prompt = " ".join(f"w{i % 150}" for i in range(300))
    create = server.client().completions.create
    first = create(prompt=f"{prompt} w1", max_tokens=4, **GREEDY)
    again = create(prompt=f"{prompt} w1", max_tokens=4, **GREEDY)
    assert again.choices == first.choices
    assert again.usage.prompt_tokens_details.cached_tokens == 301


@pytest.mark.parametrize(
    ("values", "status", "message", "param"),
    [
        ({"model": "other"}, 404, "does not exist; this server has 'tiny'", "model"),
        ({"model": None}, 400, "model: Field required", "model"),
        ({"prompt": None}, 400, "prompt: Field required", "prompt"),
        ({"prompt": []}, 400, "there is no prompt", "prompt"),
        ({"prompt": [[]]}, 400, "the prompt is empty", None),
        ({"prompt": [7, 100000]}, 400, "needed integers from 0 to 159", None),
        ({"prompt": "w1 " * 5000}, 400, "the prompt has 5001 tokens", "prompt"),
        ({"prompt": "w1", "max_tokens": 5000}, 400, "the prompt has 2 tokens, with 5000 new tokens", "prompt"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": 1.5}, 400, "valid integer", "max_tokens"),
        ({"temperature": -1}, 400, "greater than or equal to 0", "temperature"),
        ({"temperature": "hot"}, 400, "valid number", "temperature"),
        ({"top_p": 0}, 400, "greater than 0", "top_p"),
        ({"n": 1000}, 400, "less than or equal to 128", "n"),
        ({"n": 120}, 400, "at most 108 are possible", None),
        ({"n": 2, "prompt": ["w1"] * 60}, 400, "120 answers were asked for: at most 108", None),
        ({"prompt": ["w1"] * 2000}, 400, "at most 1000 items", "prompt"),
        ({"stop": ""}, 400, "at least 1 character", "stop"),
        ({"logit_bias": {"x": 1}}, 400, "valid integer", "logit_bias"),
        ({"logit_bias": {"100000": 1}}, 400, "below 160", None),
        ({"logprobs": 21}, 400, "less than or equal to 20", "logprobs"),
        ({"echo": True}, 400, "'echo' is not supported", "echo"),
        ({"best_of": 3}, 400, "'best_of' is not supported", "best_of"),
        ({"tools": [{}]}, 400, "'tools' is not supported", "tools"),
        ({"wrong": 1}, 400, "'wrong' is no known parameter", "wrong"),
        ({"stream_options": {"wrong": 1}}, 400, "'stream_options.wrong' is no known parameter", "stream_options"),
    ],
)
def test_mistakes_have_openais_form(
    server: Server, values: dict[str, object], status: int, message: str, param: str | None
) -> None:
    body = {"model": "tiny", "prompt": "w1", **values}
    got, answer, _ = server.ask("POST", "/v1/completions", json.dumps(body))
    assert got == status
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    idle = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
    }
    body = {"messages": MESSAGES, "max_tokens": 2, "stop": None, "logit_bias": {}, "seed": -1, **GREEDY, **idle}
    assert server.ask("POST", "/v1/chat/completions", json.dumps(body))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/completions", "{", 400, "the body isn't JSON"),
        ("POST", "/v1/completions", "[1]", 400, "an object"),
        ("POST", "/v1/completions", b"\xff\xfe", 400, "the body isn't JSON"),
        ("POST", "/v1/completions", "[" * 100_000, 400, "the body isn't JSON"),
        ("POST", "/v1/completions", " " * 2_000_000, 413, "the body is too long"),
        ("POST", "/v1/chat/completions", '{"model": "tiny", "messages": []}', 400, "messages"),
        ("POST", "/v1/chat/completions", '{"model": "tiny", "messages": [{"role": 1}]}', 400, "messages.0.role"),
        ("GET", "/v1/completions", None, 405, "GET /v1/completions: Method Not Allowed"),
        ("GET", "/v1/nothing", None, 404, "GET /v1/nothing: Not Found"),
    ],
)
def test_bad_requests(
    server: Server, method: str, path: str, body: bytes | str | None, status: int, message: str
) -> None:
    got, answer, _ = server.ask(method, path, body)
    assert (got, message in answer["error"]["message"]) == (status, True), answer


def test_a_form_of_another_web_page_is_refused(server: Server) -> None:
    body = '{"model": "tiny", "prompt": "w1"}'
    got, answer, _ = server.ask("POST", "/v1/completions", body, **{"Content-Type": "text/plain"})
    assert (got, "application/json" in answer["error"]["message"]) == (415, True)


def raw_request(server: Server, body: dict[str, object]) -> socket.socket:
    text = json.dumps({"model": "tiny", "prompt": "w1", "temperature": 0, **body})
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    connection.sendall(f"{head}\r\n\r\n{text}".encode())
    return connection


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


def test_metrics(server: Server) -> None:
    before = {name: server.metric(name) for name in ("fptq_prompt_tokens_total", "fptq_written_tokens_total")}
    counted = server.metric("fptq_requests_total", path="/v1/completions", status="200")
    server.client().completions.create(prompt="w1 w2", max_tokens=9, **GREEDY)
    assert server.metric("fptq_prompt_tokens_total") - before["fptq_prompt_tokens_total"] == 3
    assert server.metric("fptq_written_tokens_total") - before["fptq_written_tokens_total"] == 9
    assert server.metric("fptq_requests_total", path="/v1/completions", status="200") - counted == 1
    for name in ("fptq_first_token_seconds", "fptq_token_seconds", "fptq_request_seconds"):
        assert server.metric(f"{name}_count") > 0
    assert server.metric("process_resident_memory_bytes") > 1e7
    assert server.metric("fptq_cache_tokens") == 4 * 4096


def test_a_key_is_needed_for_the_model_alone(folder: Path) -> None:
    with running(folder, "--api-key", "secret", "--allow-origin", "http://page.example") as server:
        assert [model.id for model in server.client("secret").models.list()] == ["tiny"]
        for key in ("wrong", "secrets", "é"):
            got, answer, headers = server.ask(
                "GET", "/v1/models", Authorization=f"Bearer {key}".encode().decode("latin1")
            )
            assert (got, answer["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").completions.create(prompt="w1", **GREEDY)
        assert server.ask("GET", "/v1/models")[0] == 401
        assert [server.ask("GET", path)[0] for path in ("/health", "/metrics", "/")] == [200, 200, 200]
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = server.ask("OPTIONS", "/v1/completions", Origin="http://page.example", **asks)
        assert preflight[2]["Access-Control-Allow-Origin"] == "http://page.example"
        other = server.ask("OPTIONS", "/v1/completions", Origin="http://other.example", **asks)
        assert "Access-Control-Allow-Origin" not in other[2]


def test_limits(folder: Path) -> None:
    limits = ["--parallel", "1", "--max-waiting", "1", "--time-limit", "2", "--max-prompt-tokens", "50"]
    with running(folder, *limits, "--max-new-tokens", "3900", "--cache-tokens", "4096") as server:
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


def http_status(connection: socket.socket) -> int:
    response = http.client.HTTPResponse(connection)
    response.begin()
    status = response.status
    connection.close()
    return status


def test_a_late_stream_ends_with_an_error(folder: Path) -> None:
    with running(folder, "--time-limit", "0.05") as server:
        stream = server.client().completions.create(prompt="w1", max_tokens=4000, stream=True, **GREEDY)
        with pytest.raises(openai.APIError, match="isn't finished in time"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="isn't finished in time") as caught:
            server.client().completions.create(prompt="w1", max_tokens=4000, **GREEDY)
        assert caught.value.response.headers["X-Should-Retry"] == "false"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_what_runs(folder: Path, number: signal.Signals) -> None:
    with running(folder) as server:
        stream = server.client().completions.create(prompt="w1", max_tokens=2000, stream=True, **GREEDY)
        next(iter(stream))
        server.process.send_signal(number)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_it_stops_in_time_even_if_something_runs(folder: Path) -> None:
    with running(folder, "--drain", "1", "--context", "4000") as server:
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
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use(folder: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--port", str(server.port)]) == 1
    assert f"can't listen at 127.0.0.1, port {server.port}: Address already in use" in capsys.readouterr().err


def test_vllm_gets_folder_and_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def become(_: str, command: list[str]) -> None:
        called.append(command)
        raise SystemExit

    monkeypatch.setattr("os.execv", become)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    options = ["--context", "2048", "--parallel", "4", "--api-key", "secret", "--", "--dtype", "float32"]
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--backend", "vllm", *options])
    command = " ".join(called[0])
    assert command.endswith("--max-num-seqs 4 --max-model-len 2048 --dtype float32")
    assert f"serve {folder} --served-model-name {folder.name} --host 127.0.0.1 --port 8000" in command
    assert "secret" not in command


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [1400, 390])
def test_chat_page(server: Server, engine: Engine, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    text = alone_chat(engine, 30)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        mistakes: list[str] = []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on("console", lambda message: mistakes.append(message.text))
        page.goto(server.url)
        page.wait_for_selector("h1:has-text('tiny · context of 4096 tokens')")
        page.click("#open")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "30")
        page.click("dialog button")
        page.fill("#text", MESSAGES[0]["content"])
        page.keyboard.press("Enter")
        page.wait_for_selector(".note:has-text('30 written')")
        assert page.inner_text(".assistant").split() == text.split()
        assert page.inner_text(".note").startswith("cut off after the most new tokens")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.click("#open")
        page.click("dialog button")
        page.fill("#text", "w9")
        page.evaluate("[0, 1].forEach(() => document.getElementById('send').click())")  # sent, and stopped at once
        page.wait_for_selector(".note:has-text('stopped')")
        assert page.input_value("#text") == "w9"
        page.click("#new")
        assert page.locator(".message").count() == 0
        page.click("#open")
        page.fill("#max_tokens", "5000")
        page.click("dialog button")
        page.fill("#text", "w9")
        page.click("#send")
        page.wait_for_selector(".wrong:has-text('5000 new tokens')")
        assert page.input_value("#text") == "w9"
        browser.close()
    assert [m for m in mistakes if "400 (Bad Request)" not in m] == []


def alone_chat(engine: Engine, tokens: int) -> str:
    pieces = engine.generate(engine.tokenizer.chat(MESSAGES), max_new_tokens=tokens)
    return "".join(piece.text for piece in pieces)
