"""The step of a decoder: token ids and a KV cache in, logits out. Once in native code, once in Python over `Kernels`.

Both compute the same numbers from the same arrays. The one in Python says how a step is put together, runs on the numpy
reference where there is no native code, and is what the native one is tested against.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import ml_dtypes
import numpy as np

from fptq.errors import EngineError
from fptq.recipe import Activation
from fptq.runtime.kernels import ACTIVATIONS, REFERENCE, Kernels
from fptq.runtime.kv_cache import PageCache
from fptq.runtime.reference import PANEL_CHANNELS, unpack
from fptq.runtime.weights import BlockWeights, DecoderWeights, NormWeights, Projection

Array = np.ndarray

MAX_ROWS = 512
"""Tokens that one step can take, of all its sequences together."""
PREFILL_ROWS = 256
"""Tokens that it takes while prompts are read: enough to keep the arithmetic busy, few enough to stay in the caches."""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence.

    Attributes:
        rows: how many.
        first_position: of the first.
        pages: int64, the sequence's pages up to its last position.
    """

    rows: int
    first_position: int
    pages: Array


class Decoder(Protocol):
    """What computes steps."""

    def step(self, tokens: Array, runs: Sequence[Run], cache: PageCache, wanted: Array) -> Array:
        """Return float32 [wanted, vocabulary], and put the tokens' keys and values into the cache.

        Args:
            tokens: int32 [m], of all runs one after the other, at most `MAX_ROWS`.
            runs: which sequences they belong to.
            cache: where keys and values are kept.
            wanted: int64, ascending: the rows whose logits are computed.

        Raises:
            EngineError: activations have become infinite or NaN, or the checkpoint's file can't be read any more.
        """

    def take_times(self) -> dict[str, float]:
        """Return the seconds that each stage of all steps took since the last call, as far as they are counted."""


def make_decoder(kernels: Kernels, weights: DecoderWeights) -> Decoder:
    """Return the fastest decoder for these kernels."""
    return PythonDecoder(kernels, weights) if kernels.target == REFERENCE else NativeDecoder(kernels, weights)


class NativeDecoder:
    """The step in native code, see native/decoder.h."""

    def __init__(self, kernels: Kernels, weights: DecoderWeights):
        plan = weights.blueprint
        self._vocabulary = plan.vocabulary
        self._blocks = len(weights.blocks)
        self._model = kernels.new_decoder(
            hidden=plan.hidden,
            heads=plan.heads,
            kv_heads=plan.kv_heads,
            head_dim=plan.head_dim,
            inner=plan.inner,
            activation=ACTIVATIONS.index(plan.activation),
            softmax_scale=plan.softmax_scale,
            attention_softcap=plan.attention_softcap,
            logit_softcap=plan.logit_softcap,
            alibi_slopes=plan.alibi_slopes(),
            residual_from_norm=plan.residual_from_norm,
        )
        embedding = weights.embedding
        self._model.set_embedding(
            data=embedding.data,
            file=embedding.file.fileno() if embedding.file else -1,
            offset=embedding.offset,
            n=embedding.n,
            k=embedding.k,
            group_size=embedding.k,
            bits=embedding.bits,
            scale=plan.embedding_scale,
            positions=weights.positions,
            norm=_norm_data(weights.embedding_norm),
        )
        for block in weights.blocks:
            norms = (
                block.attention_norm,
                block.query_norm,
                block.key_norm,
                block.attention_output_norm,
                block.mlp_norm,
                block.mlp_output_norm,
            )
            projections = (block.qkv, block.output, block.up, block.down)
            self._model.add_block(
                norms=[_norm_data(norm) for norm in norms],
                projections=[_projection_data(projection) for projection in projections],
                columns=[projection.columns for projection in projections],
                key_column=block.key_column,
                value_column=block.value_column,
                up_column=block.up_column,
                rotation=block.rotation,
                window=block.window,
                key_scale=block.cache_scales.key,
                value_scale=block.cache_scales.value,
            )
        head = weights.head
        self._model.set_head(norm=_norm_data(weights.final_norm), head=_projection_data(head), columns=head.columns)

    def step(self, tokens: Array, runs: Sequence[Run], cache: PageCache, wanted: Array) -> Array:
        """See `Decoder.step`."""
        logits = np.empty((len(wanted), self._vocabulary), np.float32)
        data = [(run.rows, run.first_position, run.pages) for run in runs]
        try:
            failed = self._model.forward(tokens, data, cache.keys, cache.values, wanted, logits)
        except RuntimeError as cause:
            raise EngineError(f"a step failed: {cause}") from cause
        if failed >= 0:
            raise _not_finite(failed, self._blocks)
        return logits

    def take_times(self) -> dict[str, float]:
        """See `Decoder.take_times`."""
        return dict(self._model.take_times())


def _norm_data(norm: NormWeights | None) -> tuple[Array, Array | None, float, bool] | None:
    return (norm.weight, norm.bias, norm.eps, norm.center) if norm else None


def _projection_data(
    projection: Projection,
) -> list[tuple[Array, int, int, int, int, Array | None, float | None, int]]:
    return [
        (
            p.weights.data,
            p.weights.n,
            p.weights.k,
            p.weights.group_size,
            p.weights.bits,
            p.bias,
            p.input_scale,
            p.column,
        )
        for p in projection.parts
    ]


def _not_finite(block: int, blocks: int) -> EngineError:
    where = "before the output head" if block == blocks else f"in block {block}"
    return EngineError(f"activations became infinite or NaN {where}: the checkpoint's weights are damaged")


class PythonDecoder:
    """The step in Python: slow, and readable from top to bottom."""

    def __init__(self, kernels: Kernels, weights: DecoderWeights):
        self._kernels = kernels
        self._weights = weights

    def step(self, tokens: Array, runs: Sequence[Run], cache: PageCache, wanted: Array) -> Array:
        """See `Decoder.step`."""
        plan, weights = self._weights.blueprint, self._weights
        positions = np.concatenate([run.first_position + np.arange(run.rows) for run in runs])
        x = self._embed(tokens) * np.float32(plan.embedding_scale)
        if weights.positions is not None:
            x = x + weights.positions[positions]
        if weights.embedding_norm:
            x = self._normalize(x, weights.embedding_norm)
        for index, block in enumerate(weights.blocks):
            x = self._block(index, block, x, positions, runs, cache)
        if not len(wanted):
            return np.empty((0, plan.vocabulary), np.float32)
        logits = self._project(len(weights.blocks), weights.head, self._normalize(x[wanted], weights.final_norm))
        if plan.logit_softcap:
            logits = np.float32(plan.logit_softcap) * np.tanh(logits / np.float32(plan.logit_softcap))
        return logits

    def take_times(self) -> dict[str, float]:
        """See `Decoder.take_times`: nothing is counted."""
        return {}

    def _embed(self, tokens: Array) -> Array:
        table = self._weights.embedding
        if table.file:
            size = table.k * table.bits // 8
            rows = [_read_at(table.file, table.offset + int(token) * size, size) for token in tokens]
            table = dataclasses.replace(table, data=np.frombuffer(b"".join(rows), np.uint8))
            tokens = np.arange(len(tokens))
        assert table.data is not None
        if table.bits > 8:
            dtype = np.float32 if table.bits == 32 else ml_dtypes.bfloat16
            return table.data.view(dtype).reshape(-1, table.k)[tokens].astype(np.float32)
        needed = np.unique(tokens // PANEL_CHANNELS)  # of a vocabulary, unpack only the panels that are needed
        panels = table.data.reshape(-(-table.n // PANEL_CHANNELS), -1)[needed]
        count = len(needed) * PANEL_CHANNELS
        codes, scales = unpack(panels.reshape(-1), count, table.k, table.k, table.bits)
        rows = np.searchsorted(needed, tokens // PANEL_CHANNELS) * PANEL_CHANNELS + tokens % PANEL_CHANNELS
        return codes[rows].astype(np.float32) * scales[rows]

    def _block(
        self, index: int, block: BlockWeights, x: Array, positions: Array, runs: Sequence[Run], cache: PageCache
    ) -> Array:
        plan = self._weights.blueprint
        h = self._normalize(x, block.attention_norm)
        qkv = self._project(index, block.qkv, h)
        queries = self._place(qkv[:, : plan.heads * plan.head_dim], block.query_norm, block, positions)
        width = plan.kv_heads * plan.head_dim
        keys = self._place(qkv[:, block.key_column : block.key_column + width], block.key_norm, block, positions)
        values = qkv[:, block.value_column : block.value_column + width].reshape(keys.shape)
        attended, row = np.empty_like(queries), 0
        for run in runs:
            rows = slice(row, row + run.rows)
            all_keys, all_values = cache.keys[index], cache.values[index]
            self._enter(index, all_keys.swapaxes(2, 3), keys[rows], block.cache_scales.key, run)
            self._enter(index, all_values, values[rows], block.cache_scales.value, run)
            attended[rows] = self._kernels.attention(
                queries[rows],
                all_keys,
                all_values,
                pages=run.pages,
                first_position=run.first_position,
                key_scale=block.cache_scales.key,
                value_scale=block.cache_scales.value,
                softmax_scale=plan.softmax_scale,
                softcap=plan.attention_softcap,
                window=block.window,
                alibi_slopes=plan.alibi_slopes(),
            )
            row += run.rows
        y = self._project(index, block.output, attended.reshape(len(x), -1))
        x = self._add(h if plan.residual_from_norm else x, y, block.attention_output_norm)
        h = self._normalize(x, block.mlp_norm)
        inner = self._project(index, block.up, h)
        up = np.ascontiguousarray(inner[:, block.up_column :]) if plan.gated else None
        inner = self._kernels.activate(plan.activation, np.ascontiguousarray(inner[:, : plan.inner]), up)
        y = self._project(index, block.down, inner)
        return self._add(h if plan.residual_from_norm else x, y, block.mlp_output_norm)

    def _place(self, states: Array, norm: NormWeights | None, block: BlockWeights, positions: Array) -> Array:
        """Return states [m, heads, head_dim], normed and rotated to their positions."""
        d = self._weights.blueprint.head_dim
        rows = np.ascontiguousarray(states).reshape(-1, d)
        heads = (self._normalize(rows, norm) if norm else rows).reshape(len(states), -1, d)
        if block.rotation is None:
            return heads
        cosines, sines = (table[positions][:, None] for table in block.rotation)
        half = cosines.shape[-1]
        first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines, rest], axis=-1)

    def _enter(self, index: int, cache: Array, states: Array, scale: float, run: Run) -> None:
        """Put a run's keys or values [rows, kv_heads, head_dim] into its pages."""
        codes, scales = self._kernels.quantize(states.reshape(len(states), -1), scale)
        if np.isnan(scales).any():
            raise _not_finite(index, len(self._weights.blocks))
        places = run.first_position + np.arange(run.rows)
        page_tokens = cache.shape[2]
        cache[run.pages[places // page_tokens], :, places % page_tokens] = codes.reshape(states.shape)

    def _project(self, index: int, projection: Projection, x: Array) -> Array:
        y = np.empty((len(x), projection.columns), np.float32)
        for part in projection.parts:
            columns = slice(part.column, part.column + part.weights.n)
            if part.activation is Activation.NONE:
                if not np.isfinite(x).all():
                    raise _not_finite(index, len(self._weights.blocks))
                y[:, columns] = self._kernels.linear_float(part.weights, x, part.bias)
                continue
            codes, scales = self._kernels.quantize(x, part.input_scale)
            if np.isnan(scales).any():
                raise _not_finite(index, len(self._weights.blocks))
            y[:, columns] = self._kernels.matmul(part.weights, codes, scales, part.bias)
        return y

    def _add(self, x: Array, y: Array, norm: NormWeights | None) -> Array:
        return x + (self._normalize(y, norm) if norm else y)

    def _normalize(self, x: Array, norm: NormWeights) -> Array:
        if norm.center:
            return self._kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return self._kernels.rms_norm(x, norm.weight, norm.eps)


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)  # Windows: no forked process shares the position
    return file.read(size)
