"""A tokenizer for tiny models: one token a word, with special tokens, saved like a real one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(150)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def save_tokenizer(folder: Path, *, bos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """Write a word-level tokenizer with 154 entries into `folder` and return it; ids 0-3 are special."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        wrapped.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2"
    wrapped.save_pretrained(folder)
    return wrapped


def save_byte_tokenizer(folder: Path, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Write a tokenizer with one token a byte, 260 entries, into `folder` and return it; ids 0-3 are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    return wrapped
