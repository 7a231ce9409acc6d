"""Conversations: what is run, what is remembered, and that it doesn't show which of it was in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fptq.errors import GenerationError, TokenizerError
from fptq.runtime.conversation import Conversation
from fptq.runtime.engine import Engine
from fptq.runtime.sampling import Sampling
from fptq.runtime.tokenizer import Tokenizer
from quantizing import checkpoint_of
from tokens import save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("chat"), "llama")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.open(folder, threads=1) as engine:
        yield engine
        assert engine.cache.free_tokens == engine.cache.tokens, "pages were lost"


@pytest.fixture
def tokens_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that says how many tokens were run since it was last called."""
    counted: list[int] = []
    forward = engine.forward

    def counting(batch: list, **options: object) -> object:
        counted.extend(len(ids) for _, ids in batch)
        return forward(batch, **options)

    def taken() -> int:
        count = sum(counted)
        counted.clear()
        return count

    monkeypatch.setattr(engine, "forward", counting)
    return taken


def say(conversation: Conversation, text: str, count: int = 8) -> str:
    return "".join(piece.text for piece in conversation.ask(text, max_new_tokens=count))


def fresh_answer(engine: Engine, messages: list[dict[str, str]], text: str, count: int = 8) -> str:
    """Return the answer of an engine that has never seen the conversation."""
    prompt = engine.tokenizer.chat([*messages, {"role": "user", "content": text}])
    return "".join(piece.text for piece in engine.generate(prompt, max_new_tokens=count))


def test_only_what_is_new_is_run(engine: Engine, tokens_run: Callable[[], int]) -> None:
    conversation = Conversation(engine)
    first = list(conversation.ask(" ".join(["w5"] * 30), max_new_tokens=8))
    assert len(first) == 8
    prompt = len(engine.tokenizer.chat(conversation.messages[:1]))
    assert tokens_run() == prompt + 7  # the last token of an answer is chosen, and not run
    first_prompt = engine.tokenizer.chat(conversation.messages[:1])
    second_prompt = engine.tokenizer.chat([*conversation.messages, {"role": "user", "content": "w6 w7"}])
    list(conversation.ask("w6 w7", max_new_tokens=4))
    # This template puts "w1" where the prompt had "w2" for the model to go on: the answer begins at another place.
    pairs = zip(first_prompt, second_prompt, strict=False)
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert same == prompt - 1
    assert tokens_run() == len(second_prompt) - same + 3
    conversation.close()


def test_an_answer_in_the_cache_is_not_run_again(
    folder: Path, tmp_path: Path, engine: Engine, tokens_run: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a template that puts an answer where the model wrote it, as real ones do."""
    template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'user' %}w2 {% else %}w3 {% endif %}{% endfor %}"
    )
    saved = save_tokenizer(tmp_path, chat=True)
    saved.chat_template = template
    saved.save_pretrained(tmp_path)
    monkeypatch.setattr(engine, "tokenizer", Tokenizer.open(tmp_path))
    conversation = Conversation(engine)
    answer = list(conversation.ask("w5 w6 w7", max_new_tokens=8))
    assert all(piece.text.strip() for piece in answer), "the tiny model has to answer in words"
    tokens_run()
    list(conversation.ask("w8 w9", max_new_tokens=1))
    assert tokens_run() == 1 + 1 + 2 + 1  # the answer's last token, its end, the question, its end
    conversation.close()


@pytest.mark.parametrize("system", [None, "w40 w41"])
def test_answers_are_those_of_a_fresh_engine(folder: Path, engine: Engine, system: str | None) -> None:
    conversation = Conversation(engine, system=system)
    messages = [{"role": "system", "content": system}] if system else []
    assert conversation.messages == messages
    with Engine.open(folder, threads=1) as other:
        for question in ("w5 w6", "w7", " ".join(f"w{i}" for i in range(10, 40)), "w5 w6"):
            wanted = fresh_answer(other, messages, question)
            assert say(conversation, question) == wanted
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": wanted}]
            assert conversation.messages == messages
    conversation.close()


def test_reset_forgets_all_but_the_system_message(engine: Engine, tokens_run: Callable[[], int]) -> None:
    conversation = Conversation(engine, system="w40")
    first = say(conversation, "w5 w6")
    count = tokens_run()
    say(conversation, "w7 w8")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "w40"}]
    assert engine.cache.free_tokens == engine.cache.tokens
    tokens_run()
    assert say(conversation, "w5 w6") == first
    assert tokens_run() == count
    conversation.close()


@pytest.mark.parametrize("heard", [1, 3])
def test_who_stops_listening_has_heard_what_was_said(folder: Path, engine: Engine, heard: int) -> None:
    conversation = Conversation(engine)
    whole = [piece.text for piece in conversation.ask("w5 w6", max_new_tokens=8)]
    conversation.reset()
    pieces = conversation.ask("w5 w6", max_new_tokens=8)
    said = "".join(piece.text for piece in itertools.islice(pieces, heard))
    pieces.close()
    assert said == "".join(whole[:heard])
    messages = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": said}]
    assert conversation.messages == messages
    with Engine.open(folder, threads=1) as other:
        assert say(conversation, "w9") == fresh_answer(other, messages, "w9")
    conversation.close()


def test_an_answer_that_nobody_begins_to_hear_was_not_given(folder: Path, engine: Engine) -> None:
    conversation = Conversation(engine)
    say(conversation, "w5 w6")
    messages = list(conversation.messages)
    conversation.ask("w7")
    conversation.ask("w8 w9").close()
    assert conversation.messages == messages
    with Engine.open(folder, threads=1) as other:
        assert say(conversation, "w10") == fresh_answer(other, messages, "w10")
    conversation.close()


@pytest.mark.parametrize("question", ["w7 w8", "w9"])
def test_an_interrupt_while_a_question_is_read_leaves_a_sound_conversation(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """The same question is in the cache to its last token by then."""
    conversation = Conversation(engine)
    say(conversation, "w5 w6")
    messages = list(conversation.messages)
    forward = engine.forward

    def interrupted(batch: list, **options: object) -> object:
        forward(batch, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(conversation, "w7 w8")
    assert conversation.messages == messages
    with Engine.open(folder, threads=1) as other:
        wanted = fresh_answer(other, messages, question)
        assert say(conversation, question) == wanted
    conversation.close()


def test_what_does_not_fit_the_context_changes_nothing(folder: Path) -> None:
    with Engine.open(folder, threads=1, context=48) as engine, Engine.open(folder, threads=1) as other:
        conversation = Conversation(engine)
        say(conversation, "w5 w6", 4)
        messages = list(conversation.messages)
        for _ in range(2):
            with pytest.raises(GenerationError, match="tokens, the context 48: shorten the prompt"):
                conversation.ask(" ".join(["w7"] * 40))
        assert conversation.messages == messages
        assert say(conversation, "w9", 4) == fresh_answer(other, messages, "w9", 4)
        room = 48 - len(engine.tokenizer.chat([*conversation.messages, {"role": "user", "content": "w5"}]))
        pieces = list(conversation.ask("w5"))
        assert len(pieces) <= room
        assert pieces[-1].finish_reason in ("stop", "length")
        conversation.close()
        assert engine.cache.free_tokens == engine.cache.tokens


def test_a_refused_message_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(engine)
    first = say(conversation, "w5 w6")

    def refuse(messages: object) -> list[int]:
        raise TokenizerError("the chat template refuses the messages: no")

    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "chat", refuse)
        with pytest.raises(TokenizerError, match="refuses"):
            conversation.ask("w7")
    assert [message["content"] for message in conversation.messages] == ["w5 w6", first]
    conversation.close()


def test_sampling_is_that_of_the_conversation(engine: Engine) -> None:
    greedy = Conversation(engine)
    plain = say(greedy, "w5 w6")
    greedy.close()
    for seed in range(3):
        conversation = Conversation(engine, sampling=Sampling(temperature=2.0, seed=seed))
        if say(conversation, "w5 w6") != plain:
            conversation.close()
            return
        conversation.close()
    raise AssertionError("three samples were all the greedy answer")


def test_models_without_a_chat_template_are_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path)
    for tokenizer in (Tokenizer.open(tmp_path), None):
        monkeypatch.setattr(engine, "tokenizer", tokenizer)
        with pytest.raises(GenerationError, match="no chat template; it can continue text"):
            Conversation(engine)


def test_reset_ends_the_running_answer(engine: Engine) -> None:
    conversation = Conversation(engine)
    fresh = say(conversation, "w3 w4")
    conversation.reset()
    running = conversation.ask("w9 w9 w9", max_new_tokens=8)
    next(running)
    conversation.reset()
    assert list(running) == []
    assert conversation.messages == []
    assert say(conversation, "w3 w4") == fresh
    running = conversation.ask("w5", max_new_tokens=8)
    next(running)
    conversation.close()
    assert list(running) == []
