"""The tokenizer of a folder equals transformers', and a text that comes token by token is the whole text."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fptq.errors import TokenizerError
from fptq.models.loading import load_tokenizer
from fptq.models.sources import locate
from fptq.runtime.chat import ChatTemplate
from fptq.runtime.tokenizer import TextStream, Tokenizer
from tokens import save_tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "The quick brown fox",
    "  leading, trailing  ",
    "tabs\t\tand\n\n\nlines \r\n and   runs of      spaces",
    "def f(x: int) -> str:\n    return f'{x!r}'  # ünïcödé\n",
    "naïve café, Ångström, e\u0301 against é, \ufb01ligature, \u00a0no-break",
    "Доброе утро, 你好世界, こんにちは, สวัสดีชาวโลก, नमस्ते, العربية, עברית",
    "🎉👩‍👩‍👧‍👦🇩🇪👍🏽 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "1234567890 3.14159 1,000,000 0x1F",
    "don't we're I'm he's ' a . b , c ! d ? 've",
    "\ufeffbyte order mark, \ufffd replacement, \x00\x01\x1f\x7f control",
    "<|im_start|>user\nHello<|im_end|>\n<bos><eos><pad><s></s> <|endoftext|><|im_start|>",
    "<0x41> <0xE2> ▁ ▁▁ Ġ Ċ",
    "w1 w2  w149 w150 <unk> <eos>w3",
    "a" * 300,
]
MESSAGES = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hé 🎉<|im_end|> \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


def build(folder: Path, backend: tokenizers.Tokenizer, **options: Any) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    ).save_pretrained(folder)


def build_llama(folder: Path) -> None:
    """A small BPE tokenizer with byte tokens, as Llama 2 and Mistral have it."""
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "é", "▁▁"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    build(folder, backend)


def build_unigram(folder: Path) -> None:
    """A small Unigram tokenizer that marks spaces, and whose text is tidied."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abc.,'!?nt", "▁ab", "▁n", "'t", "▁'", "▁.", "\n", "▁"]
    backend = tokenizers.Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    build(folder, backend, clean_up_tokenization_spaces=True)


def build_wordpiece(folder: Path) -> None:
    """A small tokenizer of words and their parts, whose text is tidied by the decoder and afterwards."""
    pieces = ["<unk>", "<s>", "</s>", "a", "##b", "##ing", "n", "t", ".", ",", "'", "'s", "n't", "do", "not", "re"]
    backend = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    build(folder, backend, clean_up_tokenization_spaces=True)


def build_suffixes(folder: Path) -> None:
    """A small tokenizer that marks the ends of words; being BPE, its text isn't tidied."""
    pieces = ["<unk>", "<s>", "</s>", "a", "b", "a</w>", "b</w>", ".</w>"]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    build(folder, backend, clean_up_tokenization_spaces=True)


def build_demo(folder: Path) -> None:
    tokenizer = load_tokenizer(locate("demo"))
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)


BUILDERS = {
    "demo": build_demo,
    "words": lambda folder: save_tokenizer(folder, chat=True),
    "llama": build_llama,
    "unigram": build_unigram,
    "wordpiece": build_wordpiece,
    "suffixes": build_suffixes,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, builder in BUILDERS.items():
        builder(root / name)
    return {name: root / name for name in BUILDERS}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    opened = {name: Tokenizer.open(folder) for name, folder in folders.items()}
    return {name: tokenizer for name, tokenizer in opened.items() if tokenizer is not None}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with a tokenizer of words, for tests that change its files."""
    save_tokenizer(tmp_path)
    return tmp_path


def reopen(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None
    return tokenizer


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    pieces = TextStream(tokenizer)
    return "".join([*map(pieces.push, ids), pieces.finish()])


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_and_texts_equal_transformers(name: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]) -> None:
    mine, reference = ours[name], theirs[name]
    assert mine.vocab_size == len(reference)
    assert mine.special_tokens == reference.special_tokens_map
    for text in TEXTS:
        for special in (True, False):
            ids = mine.encode(text, special=special)
            assert ids == reference(text, add_special_tokens=special).input_ids
            assert mine.decode(ids) == reference.decode(ids, skip_special_tokens=True) == stream(mine, ids)


@pytest.mark.parametrize("name", BUILDERS)
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(
    name: str, ours: dict[str, Tokenizer], theirs: dict[str, Any], data: st.DataObject
) -> None:
    mine = ours[name]
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size + 1), max_size=30))
    assert stream(mine, ids) == mine.decode(ids) == theirs[name].decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(data=st.data())
def test_any_bytes_stream_as_they_decode(ours: dict[str, Tokenizer], data: st.DataObject) -> None:
    """Whole and broken characters, from tokens of one byte each."""
    text = data.draw(st.lists(st.sampled_from(["é", "€", "🎉", "a", " ", "\ufffd"]), max_size=8).map("".join))
    alphabet = byte_tokens(ours["demo"])
    noise = data.draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(sorted(alphabet))), max_size=5))
    content = bytearray(text.encode())
    for position, byte in noise:
        content.insert(position, byte)
    for name, ids in (("demo", [alphabet[b] for b in content]), ("llama", [3 + b for b in content] + [260])):
        assert stream(ours[name], ids) == ours[name].decode(ids)
    assert ours["demo"].decode([alphabet[b] for b in content]) == content.decode(errors="replace")


def byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Return the token of each byte in a tokenizer that works on bytes; bytes that UTF-8 never has may lack one."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spellings = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = {b: tokenizer._backend.token_to_id(spelling) for b, spelling in spellings.items()}
    return {b: token for b, token in tokens.items() if token is not None}


@pytest.mark.parametrize("name", ["demo", "llama"])
def test_text_streams_at_once_and_in_whole_characters(name: str, ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours[name]
    pieces = TextStream(tokenizer)
    for token in tokenizer.encode("ab a b ab", special=False)[1:]:
        assert pieces.push(token).strip(" ") or tokenizer.decode([token]).strip() == ""
    shown = [pieces.push(token) for token in tokenizer.encode("é🎉𝔘", special=False)]
    assert "\ufffd" not in "".join(shown)
    assert "".join([*shown, pieces.finish()]).strip() == "é🎉𝔘"


def test_a_long_stream_of_broken_characters_looks_at_few_tokens(ours: dict[str, Tokenizer]) -> None:
    pieces = TextStream(ours["demo"])
    broken = byte_tokens(ours["demo"])[0x9F]
    shown = sum(len(pieces.push(broken)) for _ in range(1000))
    assert len(pieces._window) <= 9
    assert shown + len(pieces.finish()) == 1000


@pytest.mark.parametrize("name", ["demo", "llama"])
@pytest.mark.parametrize("text", [text for text in TEXTS if "<" not in text])
def test_the_bytes_of_tokens_are_those_of_the_text(name: str, text: str, ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours[name]
    ids = tokenizer.encode(text, special=False)
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    assert spelled.strip(b" ") == tokenizer.decode(ids).encode().strip(b" ")


def test_the_bytes_of_special_tokens_are_their_names(ours: dict[str, Tokenizer]) -> None:
    assert ours["words"].token_bytes(2) == b"<eos>"
    words = ours["wordpiece"]
    spelled = {words.token_bytes(token) for token in words.encode("playing", special=False)}
    assert not any(b"##" in part for part in spelled)


def test_special_tokens_inside_leave_the_space_after_them(ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours["llama"]
    a, special = tokenizer.encode("a", special=False), 2
    assert stream(tokenizer, [*a, special, *a]) == tokenizer.decode([*a, special, *a]) == "a a"


@pytest.mark.parametrize("name", ["demo", "words"])
@pytest.mark.parametrize("messages", MESSAGES)
def test_chat_equals_transformers(
    name: str, messages: list[dict[str, Any]], ours: dict[str, Tokenizer], theirs: dict[str, Any]
) -> None:
    for continue_final in (False, True):
        expected = theirs[name].apply_chat_template(
            messages, add_generation_prompt=not continue_final, continue_final_message=continue_final, return_dict=False
        )
        assert ours[name].chat(messages, continue_final=continue_final) == expected


TEMPLATES = [
    "{{ bos_token }}{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ eos_token }}",
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role }}{% if true %}{% break %}{% endif %}{% endfor %}",
    "{%- generation %}{{ messages[0].content | trim }}{%- endgeneration %}{% if tools is not none %}w1{% endif %}",
    "{% set ns = namespace(n=0) %}\n    {% for m in messages %}\n  {% set ns.n = ns.n + 1 %}\n{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{{ '<' ~ m.content ~ '>' }}{% if m.name is defined %}w2{% endif %}{% endfor %}{{ extra }}",
    "{% if add_generation_prompt %}w5{% endif %}{{ documents is none }}{{ pad_token }}{{ unk_token }}{{ sep_token }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_given_what_transformers_gives(template: str, words: Path) -> None:
    (words / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": " w3 <&é'🎉> ", "name": None}, {"role": "user", "content": "w4"}]
    reference = AutoTokenizer.from_pretrained(words)
    text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, extra="w9")
    tokenizer = reopen(words)
    variables = {**tokenizer.special_tokens, "extra": "w9"}
    chat = ChatTemplate({"default": template})
    assert chat.render(messages, tools=None, continue_final=False, variables=variables) == text
    assert tokenizer.chat(messages, extra="w9") == reference(text, add_special_tokens=False).input_ids
    assert messages[0]["name"] is None
    if "strftime_now" in template:
        assert str(datetime.now().year) in text


def test_a_trimmed_message_can_be_continued(words: Path) -> None:
    template = "{{ add_generation_prompt }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}"
    (words / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3 "}]
    reference = AutoTokenizer.from_pretrained(words)
    text = reference.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    chat = ChatTemplate({"default": template})
    assert chat.render(messages, tools=None, continue_final=True, variables={}) == text
    assert text.endswith("w3")
    assert reopen(words).chat(messages, continue_final=True) == reopen(words).encode(text, special=False)
    with pytest.raises(TokenizerError, match="a text to continue"):
        reopen(words).chat([{"role": "assistant"}], continue_final=True)
    (words / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(TokenizerError, match="leaves out the last message"):
        reopen(words).chat(messages, continue_final=True)


def test_places_of_chat_templates(words: Path) -> None:
    messages = [{"role": "user", "content": "w1"}]
    assert not reopen(words).has_chat_template
    with pytest.raises(TokenizerError, match="has no chat template"):
        reopen(words).chat(messages)
    change(words / "chat_template.json", chat_template="w2")
    assert reopen(words).chat(messages) == [6]
    named = [{"name": "default", "template": "w3"}, {"name": "tool_use", "template": "w4 {{ tools[0].name }}"}]
    change(words / "tokenizer_config.json", chat_template=named)
    assert reopen(words).chat(messages) == [7]
    assert reopen(words).chat(messages, tools=[{"name": "w5"}]) == [8, 9]
    change(words / "tokenizer_config.json", chat_template="w6")
    assert reopen(words).chat(messages) == [10]
    (words / "chat_template.jinja").write_text("w7")
    assert reopen(words).chat(messages) == [11]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "can't be read: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the messages: .*unsafe"),
    ],
)
def test_template_errors(template: str, message: str, words: Path) -> None:
    (words / "chat_template.jinja").write_text(template)
    with pytest.raises(TokenizerError, match=message):
        reopen(words).chat([{"role": "user", "content": "w1"}])


@pytest.mark.parametrize("messages", [[], ["w1"], "w1", [{"content": b"w1"}], None])
def test_what_are_no_messages(messages: Any, words: Path) -> None:
    (words / "chat_template.jinja").write_text("w1")
    with pytest.raises(TokenizerError, match="needed"):
        reopen(words).chat(messages)


def test_stop_ids(words: Path) -> None:
    assert reopen(words).stop_ids == {2}
    change(words / "config.json", eos_token_id=5)
    assert reopen(words).stop_ids == {5}
    change(words / "generation_config.json", max_length=7)
    assert reopen(words).stop_ids == {5}
    change(words / "generation_config.json", eos_token_id=[6, 7])
    assert reopen(words).stop_ids == {6, 7}
    change(words / "generation_config.json", eos_token_id="<eos>")
    with pytest.raises(TokenizerError, match=r"generation_config.json: eos_token_id is '<eos>'"):
        reopen(words)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        (words / name).unlink()
    assert reopen(words).stop_ids == frozenset()


TOKEN = {"content": "w8", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    "values",
    [
        {"sep_token": "w7"},
        {"sep_token": "new"},
        {"image_token": "w7", "extra_special_tokens": ["w8", "new"]},
        {"extra_special_tokens": {"image_token": "w7"}},
        {"additional_special_tokens": ["w7", {"__type": "AddedToken", "special": True, **TOKEN}]},
        {"sep_token": {"__type": "AddedToken", "special": True, **TOKEN}},
        {
            "added_tokens_decoder": {
                "12": {**TOKEN, "special": True},
                "154": {**TOKEN, "content": "z", "special": False},
            }
        },
        {"added_tokens_decoder": {"2": {**TOKEN, "content": "<eos>", "single_word": True, "special": True}}},
        {"split_special_tokens": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_special_tokens_of_the_configuration(values: dict[str, Any], words: Path) -> None:
    plain = reopen(words)
    change(words / "tokenizer_config.json", **values)
    reference, tokenizer = AutoTokenizer.from_pretrained(words), reopen(words)
    assert tokenizer.special_tokens == reference.special_tokens_map
    text = "w1 w7  w8 new w9z <eos> w2 . <eos>w3"
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == stream(tokenizer, ids)
    if "add_bos_token" not in values and "clean_up_tokenization_spaces" not in values:
        assert (ids, tokenizer.decode(ids)) != (plain.encode(text), plain.decode(plain.encode(text)))


def test_older_special_tokens_map(words: Path) -> None:
    change(words / "special_tokens_map.json", eos_token={**TOKEN}, sep_token="w9")
    reference = AutoTokenizer.from_pretrained(words)
    assert reopen(words).special_tokens == reference.special_tokens_map
    assert reopen(words).encode("w8 w9") == reference("w8 w9").input_ids
    assert reopen(words).stop_ids == {12}


def test_tidying_where_it_is_told_twice(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["suffixes"].iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    ids = [5, 7, 6]
    assert reopen(tmp_path).decode(ids) == "a . b"
    change(
        tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    )
    assert reopen(tmp_path).decode(ids) == stream(reopen(tmp_path), ids) == "a. b"
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids) == "a. b"


def test_truncation_and_padding_in_the_file_are_not_applied(words: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(words / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.add_tokens([AddedToken("ww")])
    backend.save(str(words / "tokenizer.json"))
    assert len(reopen(words).encode("w1 w2 w3 w4")) == 5
    assert len(reopen(words).encode("w1")) == 2


def test_missing_and_damaged_files(words: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        reopen(words).encode("\udcff")
    (words / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: can't be read"):
        Tokenizer.open(words)
    (words / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="needed a JSON object, found list"):
        Tokenizer.open(words)
    (words / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(TokenizerError, match="configuration is damaged"):
        Tokenizer.open(words)
    (words / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer.json: isn't a tokenizer"):
        Tokenizer.open(words)
    (words / "tokenizer.json").unlink()
    assert Tokenizer.open(words) is None
