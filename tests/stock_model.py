"""Our model in lockstep with the one that stock transformers loads.

Two float32 programs that sum in another order differ in the last bits, and where such a difference meets a rounding
tie, a code moves by a whole step. So the models are compared in lockstep: at every point where something is rounded,
what arrives in ours is compared with what arrived in the stock model, and then replaced by it. Nothing that rounding
did on one side only can reach the next point, and the comparison is as tight as float32 allows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.integrations.transformers import W4A8Linear, load, new_cache

Trace = list[tuple[str, torch.Tensor]]


def load_stock(
    folder: Path, dtype: torch.dtype = torch.float32, *, without_cache_scales: bool = False, missing: str | None = None
) -> nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert report.pop("missing_keys") == ({missing} if missing else set()), report
    if without_cache_scales:
        assert all(key.endswith(("k_scale", "v_scale")) for key in report.pop("unexpected_keys")), report
    assert not any(report.values()), report
    return model.eval()


def token_ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(5))


@contextmanager
def recording(stock: nn.Module, names: list[str]) -> Iterator[Trace]:
    """Note what arrives at every quantized layer and every cache of the stock model, in the order of execution."""
    trace: Trace = []
    handles = []
    for name in names:

        def at_layer(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            trace.append((name, args[0].clone()))

        handles.append(stock.get_submodule(name).register_forward_pre_hook(at_layer))
    for index, block in enumerate(stock.model.layers):

        def at_cache(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            trace.extend([(f"key {index}", args[0].clone()), (f"value {index}", args[1].clone())])

        handles.append(block.self_attn.kv_cache.register_forward_pre_hook(at_cache))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


class Follower:
    """Runs our model along a trace of the stock one, and keeps the largest relative difference of each point."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.model = model
        self.expected = iter(trace)
        self.differences: dict[str, float] = {}
        self.cache = new_cache(model)
        for index, layer in enumerate(self.cache.layers):
            layer.update = functools.partial(self._at_cache, index, layer.update)

    def _meet(self, name: str, found: torch.Tensor) -> torch.Tensor:
        where, expected = next(self.expected)
        assert (where, expected.shape) == (name, found.shape)
        self.differences[name] = max(self.differences.get(name, 0.0), difference(found, expected))
        return expected

    def _at_cache(
        self, index: int, update: Callable[..., Any], keys: Any, values: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return update(self._meet(f"key {index}", keys), self._meet(f"value {index}", values), *args, **kwargs)

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of `tokens`, behind those that are in the cache."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: (self._meet(name, args[0]),))
            for name, module in self.model.named_modules()
            if isinstance(module, W4A8Linear)
        ]
        try:
            return self.model(tokens, past_key_values=self.cache).logits
        finally:
            for handle in handles:
                handle.remove()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def largest_difference(folder: Path, stock: nn.Module) -> tuple[float, dict[str, float]]:
    """Run both in lockstep, 24 tokens at once and then 4 one by one; return the largest difference, and all of them.

    `folder` is what ours loads. The last entry is that of the logits.
    """
    ours, _ = load(folder)
    steps = [token_ids(), *torch.randint(0, 300, (4, 2, 1), generator=torch.Generator().manual_seed(6))]
    names = [name for name in Checkpoint.open(folder).schemes if isinstance(ours.get_submodule(name), W4A8Linear)]
    with recording(stock, names) as trace, torch.no_grad():
        expected, cache = [], None
        for tokens in steps:
            output = stock(tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits)
    follower = Follower(ours, trace)
    found = [follower.run(tokens) for tokens in steps]
    assert next(follower.expected, None) is None
    differences = {**follower.differences, "logits": max(map(difference, found, expected))}
    return max(differences.values()), differences


def quantize_dynamic_by_127_5(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `numerics.quantize_dynamic` does with compressed-tensors' divisor."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return numerics.quantize(x, scale, numerics.ACTIVATION_BITS), scale
