"""Running a transformers model one decoder block at a time, with the arguments its own forward would pass.

The model's forward is run once on the embeddings alone, with every block replaced by a stub that notes its arguments
(masks, rotary embeddings, ALiBi, per-layer variants of all of them). Nothing about them needs to be known here, except
that they depend on the batch's shape and not on its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from fptq.models.loading import FloatModel, cache_argument

_LOGITS_AT_ONCE = 1 << 25

CacheObserver = Callable[[torch.Tensor, torch.Tensor], None]
CacheVisitor = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def empty_cache(model: nn.Module) -> DynamicCache:
    """Return a KV cache in float for a model of transformers."""
    return DynamicCache(config=model.config)


class PassingCache(DynamicCache):
    """Stands in for the KV cache of one forward pass: attention gets what `visitor` makes of keys and values.

    It keeps nothing. Keys and values are [batch, heads, length, head_dim].
    """

    def __init__(self, visitor: CacheVisitor):
        super().__init__()
        self._visitor = visitor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Return what attention computes with."""
        return self._visitor(key_states, value_states)


def products_in_bfloat16(wanted: bool) -> AbstractContextManager[None]:
    """Let matrices be multiplied in bfloat16 within the `with`, if that is wanted and this CPU has instructions for it.

    That is two to three times as fast as in float32. What isn't a product of matrices stays in float32.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every version
    available = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and available)


@dataclass(frozen=True)
class _Call:
    """The arguments of one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllNotedError(Exception):
    """Ends the forward pass once every block's arguments are known."""


class BlockStepper:
    """Computes embeddings and single blocks of a `FloatModel` for batches of token ids of equal length."""

    def __init__(self, source: FloatModel, dtype: torch.dtype):
        self.source = source
        self.dtype = dtype
        self._calls: dict[int, list[_Call]] = {}  # by batch size
        self._placeholder = empty_cache(source.model)
        self._tuples = False  # whether a block returns a tuple that starts with the states

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first block's input [batch, length, hidden]; needs the embeddings loaded.

        It also notes the blocks' arguments for this batch size, which `run` needs.
        """
        calls: list[_Call] = []
        blocks = self.source.blocks

        def stub(states: Any, *args: Any, **kwargs: Any) -> tuple[Any]:
            calls.append(_Call((states, *args), kwargs))
            if len(calls) == len(blocks):
                raise _AllNotedError
            # Some models take the result for the states, some for a tuple that starts with them: stubs take both.
            return (states,)

        for block in blocks:
            block.forward = stub
        try:
            base: Any = self.source.model.base_model
            base(input_ids=tokens, use_cache=True, **cache_argument(base, self._placeholder))
        except _AllNotedError:
            pass
        finally:
            for block in blocks:
                del block.forward
        self._calls[tokens.shape[0]] = [_Call(call.args[1:], call.kwargs) for call in calls]
        return calls[0].args[0].to(self.dtype)

    def learn_arguments(self, tokens: torch.Tensor, batches: Iterable[tuple[int, int]]) -> None:
        """Note the blocks' arguments for every size among the batches of tokens [samples, length].

        Loads the embeddings for it. A batch is its first sample and how many it has.
        """
        with self.source.loaded_embeddings(self.dtype):
            for start, count in {count: (start, count) for start, count in batches}.values():
                self.embed(tokens[start : start + count])

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor, observe_cache: CacheObserver | None = None) -> torch.Tensor:
        """Return the output of block `index` for its input [batch, length, hidden], in the input's dtype.

        The block's weights must be loaded in that dtype.
        """

        def visit(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if observe_cache is not None:
                observe_cache(keys, values)
            return keys, values

        return self.run_with_gradients(index, hidden, visit)

    def run_with_gradients(self, index: int, hidden: torch.Tensor, visit: CacheVisitor) -> torch.Tensor:
        """Return the block's output as a function of all that asks for gradients; attention gets what `visit` gives."""
        call = self._calls[hidden.shape[0]][index]
        cache = PassingCache(visit)

        def localize(value: Any) -> Any:
            if value is self._placeholder:
                return cache
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.to(hidden.dtype)
            if isinstance(value, tuple):
                return tuple(map(localize, value))
            return value

        args = [localize(value) for value in call.args]
        kwargs = {key: localize(value) for key, value in call.kwargs.items()}
        output = self.source.blocks[index](hidden, *args, **kwargs)
        self._tuples = isinstance(output, tuple)
        return output[0] if self._tuples else output

    def pieces(self, length: int) -> list[slice]:
        """Return the tokens of one sample of this length in pieces, each so short that its logits fit into memory."""
        rows = max(1, _LOGITS_AT_ONCE // self.source.config.vocab_size)
        return [slice(first, first + rows) for first in range(0, length, rows)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, length, vocabulary] of what the last block gave, as a function of it.

        Needs everything outside the blocks loaded, and that a block was run before.
        """
        model, blocks = self.source.model, self.source.blocks
        given = (hidden,) if self._tuples else hidden
        for block in blocks:
            block.forward = lambda *_, **__: given
        try:
            nothing = hidden.new_zeros(*hidden.shape[:2], model.get_input_embeddings().weight.shape[1])
            return model(inputs_embeds=nothing, use_cache=False).logits
        finally:
            for block in blocks:
                del block.forward
