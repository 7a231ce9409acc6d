"""The arrays of a decoder, packed for the kernels: a checkpoint's tensors in the places that the blueprint names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import ml_dtypes
import numpy as np

from fptq.checkpoint import Checkpoint, KVScales, LayerScheme
from fptq.errors import CheckpointError, UnsupportedModelError
from fptq.recipe import Activation
from fptq.runtime.architectures import blueprint
from fptq.runtime.blueprint import Block, Blueprint, Linear, Norm
from fptq.runtime.kernels import FLOAT_BITS, Kernels, Weights
from fptq.runtime.reference import PANEL_CHANNELS
from fptq.shards import TensorEntry

Array = np.ndarray


@dataclass(frozen=True)
class NormWeights:
    """A norm's weight [k], bias [k] or None, eps, and whether it centers (LayerNorm)."""

    weight: Array
    bias: Array | None
    eps: float
    center: bool


@dataclass(frozen=True)
class Part:
    """A linear layer, or several with the same scheme one below the other.

    Attributes:
        weights: packed.
        bias: float32 [n] or None.
        activation: how the input is quantized; NONE for float weights.
        input_scale: of static inputs.
        column: of the projection's output, where this part begins.
    """

    weights: Weights
    bias: Array | None
    activation: Activation
    input_scale: float | None
    column: int


@dataclass(frozen=True)
class Projection:
    """All that reads one input, and the width of its output: each layer's channels begin at a multiple of a panel."""

    parts: tuple[Part, ...]
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(part.weights.nbytes for part in self.parts)


@dataclass(frozen=True)
class BlockWeights:
    """A decoder block's arrays; the columns say where keys and values (of qkv), and a gated MLP's `up`, begin."""

    attention_norm: NormWeights
    query_norm: NormWeights | None
    key_norm: NormWeights | None
    attention_output_norm: NormWeights | None
    mlp_norm: NormWeights
    mlp_output_norm: NormWeights | None
    qkv: Projection
    output: Projection
    up: Projection
    down: Projection
    key_column: int
    value_column: int
    up_column: int
    rotation: tuple[Array, Array] | None
    window: int
    cache_scales: KVScales


@dataclass(frozen=True)
class Embedding:
    """The embedding matrix. Float rows stay in the file: of a large vocabulary a text needs few.

    Attributes:
        n: vocabulary.
        k: hidden.
        bits: 8 (packed), 16 or 32 (rows).
        data: uint8 [bytes] in memory; None: in the file.
        file: open, of the shard.
        offset: of the first row in it, in bytes.
    """

    n: int
    k: int
    bits: int
    data: Array | None = None
    file: BinaryIO | None = None
    offset: int = 0


@dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder's arrays."""

    blueprint: Blueprint
    embedding: Embedding
    positions: Array | None
    embedding_norm: NormWeights | None
    blocks: tuple[BlockWeights, ...]
    final_norm: NormWeights
    head: Projection

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights, which decoding a token reads once."""
        each = [p.nbytes for block in self.blocks for p in (block.qkv, block.output, block.up, block.down)]
        return sum(each) + self.head.nbytes

    @property
    def multiplications(self) -> tuple[int, int]:
        """Return the weights that every token is multiplied with in the blocks, and in the head."""
        parts = [
            part.weights
            for block in self.blocks
            for projection in (block.qkv, block.output, block.up, block.down)
            for part in projection.parts
        ]
        return sum(w.n * w.k for w in parts), sum(part.weights.n * part.weights.k for part in self.head.parts)


def require_runnable(checkpoint: Checkpoint) -> Blueprint:
    """Return the checkpoint's blueprint if the engine runs it; no weight is read.

    Raises:
        UnsupportedModelError: it doesn't; the message names what.
        CheckpointError: a value of config.json is missing or wrong.
    """
    plan = blueprint(checkpoint.config)
    if checkpoint.config["quantization_config"].get("kv_cache_scheme") is None:
        raise UnsupportedModelError("a KV cache in float", "it runs int8 caches with static scales")
    for name, scheme in checkpoint.schemes.items():
        if name != plan.embedding:  # a lookup has no input
            _require_integers(name, scheme)
    return plan


def _require_integers(name: str, scheme: LayerScheme) -> None:
    if scheme.low_rank:
        raise UnsupportedModelError(f"weights with a low-rank correction, as '{name}' has them")
    if not scheme.activation.runs_in_int8:
        kind = "float" if scheme.activation is Activation.NONE else f"'{scheme.activation.value}'"
        raise UnsupportedModelError(f"int{scheme.bits} weights with {kind} activations, as '{name}' has them")


def load_weights(checkpoint: Checkpoint, plan: Blueprint, kernels: Kernels, context: int) -> DecoderWeights:
    """Return the arrays of `plan`, for up to `context` positions.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape than the config makes it.
        UnsupportedModelError: the engine doesn't run a layer's scheme.
    """
    return _Loader(checkpoint, plan, kernels, context).load()


class _Loader:
    def __init__(self, checkpoint: Checkpoint, plan: Blueprint, kernels: Kernels, context: int):
        self.checkpoint = checkpoint
        self.plan = plan
        self.kernels = kernels
        self.context = context
        self.cache_scales = checkpoint.cache_scales()
        self.unused = set(checkpoint.float_tensors()) | {f"{name}.bias" for name in checkpoint.schemes}
        self.unused &= set(checkpoint.tensors)
        self.rotations: dict[object, tuple[Array, Array]] = {}

    def load(self) -> DecoderWeights:
        plan = self.plan
        if not self.cache_scales:
            raise UnsupportedModelError("a KV cache in float", "it runs int8 caches with static scales")
        positions = None
        if plan.positions:
            tensor = self._floats(f"{plan.positions}.weight", None)
            needed = self.context + plan.position_offset
            if tensor.ndim != 2 or tensor.shape[1] != plan.hidden or len(tensor) < needed:
                raise self._misfit(f"{plan.positions}.weight", tensor.shape, (f"at least {needed}", plan.hidden))
            positions = np.ascontiguousarray(tensor[plan.position_offset :])
        head, embedding = self._head_and_embedding()
        weights = DecoderWeights(
            plan,
            embedding,
            positions,
            self._optional(plan.embedding_norm, plan.hidden),
            tuple(self._block(f"{plan.prefix}.{i}.", block) for i, block in enumerate(plan.blocks)),
            self._norm(plan.final_norm, plan.hidden),
            head,
        )
        if self.unused:
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor '{min(self.unused)}' has no place in the model; "
                "config.json and shards don't belong together"
            )
        return weights

    def _block(self, prefix: str, block: Block) -> BlockWeights:
        plan = self.plan
        queries, keys, inner = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim, plan.inner
        attention = prefix + block.attention
        if attention not in self.cache_scales:
            raise CheckpointError(f"{self.checkpoint.folder}: '{attention}' has no KV cache scales")
        # Packed in the order of use: what a product prefetches beyond its end is the next one's beginning.
        qkv, starts = self._projection(prefix, block.qkv, plan.hidden, (queries, keys, keys))
        output, _ = self._projection(prefix, (block.output,), queries, (plan.hidden,))
        up, halves = self._projection(prefix, block.up, plan.hidden, (inner, inner) if plan.gated else (inner,))
        down, _ = self._projection(prefix, (block.down,), inner, (plan.hidden,))
        rotation = None
        if block.rotary:
            if block.rotary not in self.rotations:
                self.rotations[block.rotary] = block.rotary.tables(self.context)
            rotation = self.rotations[block.rotary]
        return BlockWeights(
            attention_norm=self._norm(block.attention_norm, plan.hidden, prefix),
            query_norm=self._optional(block.query_norm, plan.head_dim, prefix),
            key_norm=self._optional(block.key_norm, plan.head_dim, prefix),
            attention_output_norm=self._optional(block.attention_output_norm, plan.hidden, prefix),
            mlp_norm=self._norm(block.mlp_norm, plan.hidden, prefix),
            mlp_output_norm=self._optional(block.mlp_output_norm, plan.hidden, prefix),
            qkv=qkv,
            output=output,
            up=up,
            down=down,
            key_column=starts[1],
            value_column=starts[2],
            up_column=halves[1] if plan.gated else 0,
            rotation=rotation,
            window=block.window,
            cache_scales=self.cache_scales[attention],
        )

    def _head_and_embedding(self) -> tuple[Projection, Embedding]:
        plan, schemes = self.plan, self.checkpoint.schemes
        shape = (plan.vocabulary, plan.hidden)
        name = f"{plan.embedding}.weight"
        if plan.head in schemes:
            head = self._linear("", Linear(plan.head), *shape)
        else:
            source = name if plan.tied else f"{plan.head}.weight"
            bias = None if plan.tied else self._bias(plan.head, plan.vocabulary)
            packed = self.kernels.pack_floats(self._stored(source, shape))
            head = Part(packed, bias, Activation.NONE, None, 0)
        projection = Projection((head,), plan.vocabulary)
        if plan.embedding in schemes:
            if schemes[plan.embedding].bits != 8:
                raise UnsupportedModelError(f"an embedding of int{schemes[plan.embedding].bits}")
            shared = self.checkpoint.tied_head and plan.head in schemes
            weights = head.weights if shared else self._linear("", Linear(plan.embedding), *shape).weights
            return projection, Embedding(*shape, weights.bits, weights.data)
        tensor = self._entry(name, shape)
        if tensor.dtype.name in FLOAT_BITS:
            self.unused.discard(name)
            file = self.checkpoint.tensors[name][0].open("rb", buffering=0)
            return projection, Embedding(*shape, FLOAT_BITS[tensor.dtype.name], file=file, offset=tensor.start)
        rows = self._stored(name, shape)
        return projection, Embedding(*shape, FLOAT_BITS[rows.dtype.name], rows.view(np.uint8).reshape(-1))

    def _projection(
        self, prefix: str, layers: tuple[Linear, ...], k: int, sizes: tuple[int, ...]
    ) -> tuple[Projection, list[int]]:
        """Return layers that read one input of k channels, and the columns where outputs of these sizes begin."""
        if len(layers) == 1:
            part = self._linear(prefix, layers[0], sum(sizes), k)
            return Projection((part,), sum(sizes)), [sum(sizes[:i]) for i in range(len(sizes))]
        padded = [-(-n // PANEL_CHANNELS) * PANEL_CHANNELS for n in sizes]
        starts = [sum(padded[:i]) for i in range(len(sizes))]
        parts = self._stack(prefix, layers, k, sizes, starts)
        return Projection(parts, starts[-1] + sizes[-1]), starts

    def _stack(
        self, prefix: str, layers: tuple[Linear, ...], k: int, sizes: tuple[int, ...], starts: list[int]
    ) -> tuple[Part, ...]:
        """Return the layers as one matrix if they have one scheme, so that one product computes them all."""
        schemes = {self.checkpoint.schemes.get(prefix + layer.name) for layer in layers}
        scales = {self._input_scale(prefix + layer.name) for layer in layers}
        if len(schemes) > 1 or len(scales) > 1 or None in schemes or any(s and s.bits != 4 for s in schemes):
            return tuple(
                self._linear(prefix, layer, n, k, column)
                for layer, n, column in zip(layers, sizes, starts, strict=True)
            )
        words, weight_scales, biases = [], [], []
        for layer, n in zip(layers, sizes, strict=True):
            codes, group_scales = self._words(prefix, layer, n, k)
            rest = -n % PANEL_CHANNELS if layer is not layers[-1] else 0
            bias = self._bias(prefix + layer.name, n, layer.rows)
            words += [codes, np.full((rest, codes.shape[1]), -0x77777778, np.int32)]  # codes of 0
            weight_scales += [group_scales, np.zeros((rest, group_scales.shape[1]), group_scales.dtype)]
            biases += [np.zeros(n, np.float32) if bias is None else bias, np.zeros(rest, np.float32)]
        whole = np.concatenate(biases)
        packed = self.kernels.pack_words(np.concatenate(words), np.concatenate(weight_scales))
        (scheme,), (scale,) = schemes, scales
        assert scheme is not None
        return (Part(packed, whole if whole.any() else None, scheme.activation, scale, 0),)

    def _linear(self, prefix: str, layer: Linear, n: int, k: int, column: int = 0) -> Part:
        name = prefix + layer.name
        bias = self._bias(name, n, layer.rows)
        scheme = self.checkpoint.schemes.get(name)
        if scheme is None:
            stored = self._stored(f"{name}.weight", (n, k))
            return Part(self.kernels.pack_floats(_ordered(stored, layer.rows)), bias, Activation.NONE, None, column)
        if scheme.bits == 4:
            packed = self.kernels.pack_words(*self._words(prefix, layer, n, k))
        else:
            if layer.name != self.plan.embedding:
                _require_integers(name, scheme)
            linear = self.checkpoint.read_linear(name)
            if linear.codes.shape != (n, k):
                raise self._misfit(name, linear.codes.shape, (n, k))
            codes, scales = _ordered(linear.codes, layer.rows), _ordered(linear.scales, layer.rows)
            packed = self.kernels.pack(codes, scales, bits=scheme.bits)
        return Part(packed, bias, scheme.activation, self._input_scale(name), column)

    def _words(self, prefix: str, layer: Linear, n: int, k: int) -> tuple[Array, Array]:
        """Return an int4 layer's words and bfloat16 scales, its channels in the wanted order."""
        name = prefix + layer.name
        _require_integers(name, self.checkpoint.schemes[name])
        words, scales = self.checkpoint.read(f"{name}.weight_packed"), self.checkpoint.read(f"{name}.weight_scale")
        if words.shape != (n, k // 8):
            raise self._misfit(name, (words.shape[0], 8 * words.shape[1]), (n, k))
        narrow = scales.astype(ml_dtypes.bfloat16)
        wide = narrow.astype(np.float32)
        if not (np.isfinite(wide).all() and wide.all()):
            raise CheckpointError(f"{self.checkpoint.folder}: '{name}' has weight scales that are no step sizes")
        if scales.dtype != narrow.dtype and not np.array_equal(wide, scales.astype(np.float32)):
            raise UnsupportedModelError(f"weight scales that bfloat16 can't hold, as '{name}' has them")
        return _ordered(words, layer.rows), _ordered(narrow, layer.rows)

    def _input_scale(self, name: str) -> float | None:
        scheme = self.checkpoint.schemes.get(name)
        if scheme is None or scheme.activation is not Activation.STATIC:
            return None
        return float(self.checkpoint.read(f"{name}.input_scale")[0])

    def _bias(self, name: str, n: int, rows: tuple[int, ...] | None = None) -> Array | None:
        tensor = f"{name}.bias"
        return _ordered(self._floats(tensor, (n,)), rows) if tensor in self.checkpoint.tensors else None

    def _optional(self, norm: Norm | None, k: int, prefix: str = "") -> NormWeights | None:
        return self._norm(norm, k, prefix) if norm else None

    def _norm(self, norm: Norm, k: int, prefix: str = "") -> NormWeights:
        name = prefix + norm.name
        weight = self._floats(f"{name}.weight", (k,))
        bias = self._floats(f"{name}.bias", (k,)) if norm.center else None
        return NormWeights(weight + np.float32(1) if norm.plus_one else weight, bias, norm.eps, norm.center)

    def _floats(self, name: str, shape: tuple[int, ...] | None) -> Array:
        return self._stored(name, shape).astype(np.float32)

    def _stored(self, name: str, shape: tuple[int, ...] | None) -> Array:
        """Return a float tensor as bfloat16 or float32, whichever holds it."""
        self._entry(name, shape)
        self.unused.discard(name)
        tensor = self.checkpoint.read(name)
        return tensor if tensor.dtype.name in FLOAT_BITS else tensor.astype(np.float32)

    def _entry(self, name: str, shape: tuple[int, ...] | None) -> TensorEntry:
        if name not in self.checkpoint.tensors:
            raise CheckpointError(f"{self.checkpoint.folder}: tensor '{name}' is missing")
        entry = self.checkpoint.tensors[name][1]
        if shape is not None and entry.shape != shape:
            raise self._misfit(name, entry.shape, shape)
        return entry

    def _misfit(self, name: str, found: tuple[object, ...], wanted: tuple[object, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.folder}: '{name}' is {list(found)}, the config makes it {list(wanted)}"
        )


def _ordered(array: Array, rows: tuple[int, ...] | None) -> Array:
    return array if rows is None else np.ascontiguousarray(array[list(rows)])
