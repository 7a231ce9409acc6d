"""Tiny models with a tokenizer, opened to be scored, for tests of benchmark tasks and of their requests."""

from pathlib import Path
from typing import Any

import torch

from fptq.evaluate.fidelity import ScoredModel
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from tiny import save_tiny
from tokens import save_byte_tokenizer


def save_model(folder: Path, variant: str = "llama", **changes: Any) -> Path:
    context = {} if variant == "bloom" else {"max_position_embeddings": 768}
    model = save_tiny(folder, variant, spread=0.5, vocab_size=260, **{**context, **changes})
    save_byte_tokenizer(model, bos=variant != "qwen2")
    return model


def quantize_model(model: Path, folder: Path) -> Path:
    spec = CalibrationSpec("random", samples=4, length=24)
    return quantize(str(model), folder, get_recipe("fptq", group_size=32), spec, Options(progress=False))


def open_float(folder: Path) -> tuple[ScoredModel, Any]:
    opened = FloatModel.open(str(folder))
    return ScoredModel(opened.load_all(torch.float32), identity="tiny"), opened.tokenizer


class Counting(ScoredModel):
    """Counts texts, and the tokens that it runs."""

    texts = tokens = 0
    fails_after: int | None = None

    def hidden(self, tokens: torch.Tensor, cache: Any = None, **placed: torch.Tensor) -> torch.Tensor:
        if self.texts == self.fails_after:
            raise KeyboardInterrupt
        self.texts += 1
        self.tokens += tokens.numel()
        return super().hidden(tokens, cache, **placed)
