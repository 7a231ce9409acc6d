"""The server as its clients see it: OpenAI's own, and a browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fptq.cli import main
from fptq.runtime.engine import Engine
from fptq.runtime.sampling import Sampling
from serving import GREEDY, MESSAGES, Server, alone, alone_chat, running

openai = pytest.importorskip("openai")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    served: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = shutil.copytree(served, tmp_path / "q")
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


def test_a_key_is_needed_for_the_model_alone(served: Path) -> None:
    with running(served, "--api-key", "secret", "--allow-origin", "http://page.example") as server:
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
