"""Stop strings: the text before the first, however it is cut into pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq.errors import GenerationError
from fptq.runtime.stopping import StopStrings

ALPHABET = st.text("ab.", max_size=5)


def run(strings: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop, shown, stopped = StopStrings(strings), "", False
    for piece in pieces:
        text, stopped = stop.push(piece)
        shown += text
    return shown + stop.finish(), stopped


def expected(strings: list[str], text: str) -> tuple[str, bool]:
    """The definition: the text before the string that is complete first, the longest of those that are."""
    for end in range(len(text) + 1):
        complete = [s for s in strings if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(deadline=None)
@given(st.lists(ALPHABET.filter(bool), max_size=4), st.lists(ALPHABET, max_size=12))
def test_text_before_the_first_stop_string(strings: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert run(strings, pieces) == run(strings, [text]) == run(strings, list(text)) == expected(strings, text)


@settings(deadline=None)
@given(st.lists(ALPHABET.filter(bool), min_size=1, max_size=4), st.lists(ALPHABET, max_size=12))
def test_holds_back_no_more_than_it_must(strings: list[str], pieces: list[str]) -> None:
    stop, text, shown = StopStrings(strings), "", ""
    for piece in pieces:
        new, stopped = stop.push(piece)
        text, shown = text + piece, shown + new
        if stopped:
            break
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert held == "" or any(s.startswith(held) for s in strings)


@pytest.mark.parametrize(
    ("strings", "pieces", "shown"),
    [
        (["STOP"], ["ab S", "TOP cd"], "ab "),
        (["STOP"], ["ab ST", "AB"], "ab STAB"),
        (["aab"], ["aa", "ab", "x"], "a"),
        (["abc", "b"], ["a", "b", "c"], "a"),
        (["abc", "b"], ["abc"], "a"),
        (["ab", "b"], ["a", "b"], ""),
        (["\n\n"], ["x\n", "y\n", "\nz"], "x\ny"),
        (["🎉"], ["👍", "🎉"], "👍"),
        ([], ["a", "b"], "ab"),
    ],
)
def test_examples(strings: list[str], pieces: list[str], shown: str) -> None:
    assert run(strings, pieces)[0] == shown


def test_nothing_comes_after_the_end() -> None:
    stop = StopStrings(["."])
    assert stop.push("a.b") == ("a", True)
    assert stop.push("c") == ("", True)
    assert stop.finish() == ""


def test_held_text_comes_once() -> None:
    stop = StopStrings(["ab"])
    assert stop.push("xa") == ("x", False)
    assert (stop.finish(), stop.finish()) == ("a", "")


def test_empty_stop_string() -> None:
    with pytest.raises(GenerationError, match="at least one character"):
        StopStrings(["a", ""])
