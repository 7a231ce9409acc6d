"""Text to tokens and back, from a folder's tokenizer.json and the small files beside it, without transformers.

    tokenizer = Tokenizer.open(folder)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    stream = TextStream(tokenizer)
    for token in generated:
        print(stream.push(token), end="")
    print(stream.finish())

Tokens and texts are those of transformers' fast tokenizers. As there, tokenizer.json alone says which tokens a text
begins and ends with, and the values `add_bos_token` and `add_eos_token` of tokenizer_config.json don't count beside it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fptq.errors import TokenizerError
from fptq.runtime.chat import ChatTemplate

_LOOSE = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_TIDY = re.compile(r".*[^ .?!,'nmtsver]", re.DOTALL)
"""A text up to a character that no piece of `_LOOSE` has: tidying what comes after can't change what is before."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))
}
"""How byte-level tokenizers write bytes: printable ones as themselves, the others from U+0100 on (GPT-2)."""
_LONGEST_WINDOW, _SHORT_WINDOW = 8, 4


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        vocab_size: the number of tokens, added ones included.
        special_tokens: "bos_token", "eos_token" and so on, as they are written.
        stop_ids: the tokens that end an answer.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: dict[str, str],
        chat_template: ChatTemplate | None,
        stop_ids: frozenset[int],
        tidies: bool,
    ):
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = special_tokens
        self.stop_ids = stop_ids
        self._backend = backend
        self._chat_template = chat_template
        self._tidies = tidies
        added = backend.get_added_tokens_decoder()
        self._silent = {i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer | None:
        """Return the tokenizer of a model folder, or None if it has no tokenizer.json.

        Raises:
            TokenizerError: one of its files is damaged.
        """
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        # the Rust library raises bare Exceptions
        except Exception as cause:
            raise TokenizerError(f"{path}: isn't a tokenizer ({cause}); fetch it again") from cause
        backend.no_truncation()
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= read_json(folder / "special_tokens_map.json")
        try:
            special_tokens = _add_special_tokens_(backend, config)
            chat_template = _read_chat_template(folder, config)
        except (AttributeError, KeyError, TypeError, ValueError) as cause:
            raise TokenizerError(f"{folder}: the tokenizer's configuration is damaged ({cause!r})") from cause
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        # transformers tidies a BPE tokenizer's text only where it is told twice
        told_twice = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        is_bpe = type(backend.model).__name__ == "BPE"
        tidies = bool(config.get("clean_up_tokenization_spaces") and (told_twice or not is_bpe))
        stop_ids = _stop_ids(folder, backend, special_tokens)
        return cls(backend, special_tokens, chat_template, stop_ids, tidies)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` is possible."""
        return self._chat_template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text; control tokens that are written in it become those tokens.

        With `special` the tokenizer puts its special tokens around it, such as a beginning of sequence.

        Raises:
            TokenizerError: the text has half a surrogate pair, which is no character.
        """
        try:
            return self._backend.encode(text, add_special_tokens=special).ids
        except TypeError as cause:
            raise TokenizerError("the text isn't valid Unicode: it has a lone surrogate") from cause

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special and unknown ones."""
        text = self._backend.decode(ids, skip_special_tokens=True)
        return tidy(text) if self._tidies else text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Return the tokens of a conversation in the model's chat template, for the model to go on.

        Args:
            messages: such as `{"role": "user", "content": "Hello"}`, with JSON values.
            tools: JSON schemas of functions that the model may call.
            continue_final: leave the last message open, instead of beginning an answer to it.
            variables: others that the template knows, such as `enable_thinking`.

        Raises:
            TokenizerError: there is no chat template, or it is damaged or refuses these messages.
        """
        if self._chat_template is None:
            raise TokenizerError("the model's tokenizer has no chat template; give the prompt as plain text")
        variables = {**self.special_tokens, **variables}
        text = self._chat_template.render(messages, tools=tools, continue_final=continue_final, variables=variables)
        return self.encode(text, special=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; one character may need those of several tokens."""
        spelling = self._added.get(token)
        if spelling is not None:
            return spelling.encode()
        spelling = self._backend.id_to_token(token) or ""
        if "ByteLevel" in self._decoders:
            return bytes(map(_BYTE_OF_CHARACTER.__getitem__, spelling))
        if "ByteFallback" in self._decoders and _BYTE.fullmatch(spelling):
            return bytes([int(spelling[1:-1], 16)])
        if "WordPiece" in self._decoders:
            spelling = spelling.removeprefix("##")
        return spelling.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @functools.cached_property
    def _decoders(self) -> str:
        decoder = self._backend.decoder
        return "" if decoder is None else repr(decoder)

    def spelling(self, token: int) -> str | None:
        """Return a token as the vocabulary writes it, or None if `decode` leaves it out."""
        return None if token in self._silent else self._backend.id_to_token(token)


class TextStream:
    """The text of tokens that come one by one, in pieces that are final.

    All pieces together are `tokenizer.decode` of all tokens. Decoding looks back: at the start of a text it drops a
    space, a character may need several tokens, and a run of byte tokens is text only if all of it is. So the last
    token that is done with stays as the beginning of a short window, and what may still change waits there.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._done = 0  # characters of the window's text that were handed out
        self._loose = ""  # text that was decoded and may still be tidied

    def push(self, token: int) -> str:
        """Return what is certain of the text now, beyond what was returned before; often nothing."""
        spelling = self._tokenizer.spelling(token)
        if spelling is None:
            return ""
        self._window.append(token)
        return "" if _BYTE.fullmatch(spelling) else self._advance(last=False)

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._advance(last=True)

    def _advance(self, last: bool) -> str:
        decode: Callable[[list[int]], str] = self._tokenizer._backend.decode
        text = decode(self._window)
        # The replacement character may be up to three bytes of a longer one, which the next token completes.
        waits = text.endswith("\N{REPLACEMENT CHARACTER}") and not last
        piece = text[self._done : len(text) - waits]
        self._done = len(text) - waits
        if not waits or len(self._window) > _LONGEST_WINDOW:
            # Four tokens are four bytes at least. UTF-8 is back in step after three, wherever reading begins.
            self._window = self._window[-_SHORT_WINDOW if waits else -1 :]
            self._done = len(decode(self._window)) - waits
        if not self._tokenizer._tidies:
            return piece
        self._loose += piece
        certain = _TIDY.match(self._loose)
        cut = len(self._loose) if last else certain.end() if certain else 0
        piece, self._loose = self._loose[:cut], self._loose[cut:]
        return tidy(piece)


def tidy(text: str) -> str:
    """Return a text without the spaces that word-level tokenizers leave before punctuation, as transformers does it."""
    for loose in _LOOSE:
        text = text.replace(loose, loose.strip())
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise TokenizerError(f"{path}: can't be read ({cause}); fetch it again") from cause
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: needed a JSON object, found {type(content).__name__}")
    return content


def _add_special_tokens_(backend: Any, config: dict[str, Any]) -> dict[str, str]:
    """Return the named special tokens, and make the tokenizer know those that only tokenizer_config.json has."""
    from tokenizers import AddedToken

    def build(token: str | dict[str, Any]) -> AddedToken:
        fields = {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k != "__type"}
        return AddedToken(**{"special": True, **fields})

    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    tokens = {**config, **(extra if isinstance(extra, dict) else {})}
    named = {k: build(v) for k, v in tokens.items() if k.endswith("_token") and isinstance(v, str | dict)}
    listed = [build(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    known = backend.get_added_tokens_decoder().values()
    descriptions, contents = {repr(token) for token in known}, {token.content for token in known}
    decoder = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    added = [token for _, fields in decoder if repr(token := build(fields)) not in descriptions]
    contents |= {token.content for token in added}
    backend.add_tokens(added + [token for token in [*named.values(), *listed] if token.content not in contents])
    return {name: token.content for name, token in named.items()}


def _stop_ids(folder: Path, backend: Any, special_tokens: dict[str, str]) -> frozenset[int]:
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) for i in ids if found is not None):
            raise TokenizerError(f"{path}: eos_token_id is {found!r}, needed an integer or a list of them")
        if found is not None:
            return frozenset(ids)
    stop = backend.token_to_id(special_tokens.get("eos_token", ""))
    return frozenset() if stop is None else frozenset([stop])


def _read_chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return ChatTemplate({"default": path.read_text(encoding="utf-8")})
    found = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template") or []
    if isinstance(found, str):
        return ChatTemplate({"default": found})
    templates = {template["name"]: template["template"] for template in found}
    return ChatTemplate(templates) if "default" in templates else None
