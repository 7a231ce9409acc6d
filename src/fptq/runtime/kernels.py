"""The operators of a running model on the CPU: native kernels, or the numpy reference where there are none.

    kernels = Kernels(threads=4)
    weights = kernels.pack(codes, scales, bits=4)
    y = kernels.linear(weights, x, input_scale=0.05)

Arrays are numpy arrays. Shapes and dtypes are checked here, before native code is entered. docs/kernels.md describes
the kernels and the layout of packed weights.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import threading
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fptq import numerics
from fptq.errors import KernelError
from fptq.runtime import reference

try:
    from fptq.runtime import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _built = importlib.util.find_spec("fptq.runtime._native") is not None
    _missing = str(error) if _built else "it was installed as pure Python"

Array = np.ndarray

REFERENCE = "reference"
MAX_THREADS = 1024
_SMALLEST_SCALE, _LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_GROUP_SIZE = {4: 2**20, 8: 2**16}
"""The largest groups whose sums stay in int32: 255·128·2^16 < 2^31, and 15·128·2^20 < 2^31."""

FLOAT_BITS = {"bfloat16": 16, "float32": 32}
"""Bits of the float types that weights may have."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""What `Kernels.activate` knows, in the order of native/kernels.h."""


def targets() -> dict[str, str]:
    """Return the targets of this installation, fastest first: its name, and what this CPU lacks to run it."""
    native = _native.targets() if _native else []
    return {**dict(native), REFERENCE: ""}


def cpu_name() -> str:
    """Return what the CPU calls itself, if it does."""
    return (_native.cpu_name() if _native else "") or platform.processor() or platform.machine()


def choose_target(name: str | None = None) -> tuple[str, str]:
    """Return a target and why it is chosen: `name`, or what the variable FPTQ_KERNEL says, or the fastest.

    Raises:
        KernelError: that target doesn't exist, or this CPU can't run it.
    """
    forced = name or os.environ.get("FPTQ_KERNEL") or None
    all_targets = targets()
    if forced is None:
        fastest = next(target for target, lacking in all_targets.items() if not lacking)
        if fastest == REFERENCE:
            return fastest, f"slow: this installation has no native kernels ({_missing})"
        passed = [f"{target} needs {lacking}" for target, lacking in all_targets.items() if lacking]
        return fastest, "the fastest that this CPU can run" + (f" ({'; '.join(passed)})" if passed else "")
    if forced not in all_targets:
        raise KernelError(f"there is no kernel '{forced}' in this installation; there are: {', '.join(all_targets)}")
    if all_targets[forced]:
        raise KernelError(f"kernel '{forced}' needs {all_targets[forced]}, which this CPU ({cpu_name()}) doesn't have")
    return forced, "asked for" if name else "the environment variable FPTQ_KERNEL asks for it"


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, eq=False)
class Weights:
    """A weight matrix in the kernels' layout.

    Attributes:
        data: uint8 [bytes], the layout of docs/kernels.md.
        n: out_features.
        k: in_features.
        group_size: inputs that share a scale; k for float weights, which have none.
        bits: 4 or 8, or 16 and 32 for bfloat16 and float32.
    """

    data: Array
    n: int
    k: int
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits in FLOAT_BITS.values() and min(self.n, self.k) > 0 and self.group_size == self.k:
            _check("packed weights", self.data, np.uint8, (reference.packed_bytes(self.n, self.k, self.k, self.bits),))
            return
        largest = MAX_GROUP_SIZE.get(self.bits, 0)
        if min(self.n, self.k) < 1 or not 1 <= self.group_size <= largest or self.k % self.group_size:
            raise KernelError(
                f"packed weights [{self.n}, {self.k}] of {self.bits} bits in groups of {self.group_size}: "
                f"needed 4 or 8 bits, at least one channel, and groups of up to {largest} that divide in_features"
            )
        size = reference.packed_bytes(self.n, self.k, self.group_size, self.bits)
        _check("packed weights", self.data, np.uint8, (size,))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        return self.data.nbytes


class _Memory:
    """Hands out memory for weights from large pieces, which numpy puts into huge pages where the system has them.

    A product of one row reads all its weights once. With pages of 4 KiB it would wait for an address translation every
    64 lines. A piece is given back when the last weights in it are.
    """

    PIECE_BYTES = 32 << 20
    ALIGNMENT = 64

    def __init__(self) -> None:
        self._rest = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Array:
        """Return uint8 [nbytes], aligned to cache lines, with arbitrary content."""
        with self._lock:
            start = -self._rest.ctypes.data % self.ALIGNMENT
            if start + nbytes > self._rest.size:
                self._rest = np.empty(max(nbytes, self.PIECE_BYTES) + self.ALIGNMENT, np.uint8)
                start = -self._rest.ctypes.data % self.ALIGNMENT
            taken = self._rest[start : start + nbytes]
            self._rest = self._rest[start + nbytes :]
            return taken


class Kernels:
    """Operators with a target and a pool of threads of their own.

    Calls from several threads wait for each other. After a fork the threads are started anew.

    Args:
        threads: how many work on an operator; by default as many as there are CPUs for this process.
        target: the instruction set, see `targets`; by default FPTQ_KERNEL, or the fastest.

    Raises:
        KernelError: no such target here, or so many threads can't be.
    """

    def __init__(self, *, threads: int | None = None, target: str | None = None):
        self.threads = min(available_cpus(), MAX_THREADS) if threads is None else threads
        if not isinstance(self.threads, int) or not 1 <= self.threads <= MAX_THREADS:
            raise KernelError(f"{threads} threads: needed from 1 to {MAX_THREADS}")
        self.target, self.reason = choose_target(target)
        try:
            self._session = None if self.target == REFERENCE else _native.Session(self.target, self.threads)
        except RuntimeError as cause:
            raise KernelError(f"{self.threads} threads: the system doesn't start so many ({cause})") from cause
        self._memory = _Memory()

    def pack(self, codes: Array, scales: Array, *, bits: int = 4) -> Weights:
        """Return a weight matrix in the kernels' layout.

        Args:
            codes: int8 [n, k], from -8 to 7 with 4 bits.
            scales: float32 [n, G], one for each k / G inputs, exact in bfloat16, as checkpoints have them.
            bits: 4 or 8.

        Raises:
            KernelError: wrong shapes or dtypes, codes or scales out of range.
        """
        if bits not in MAX_GROUP_SIZE:
            raise KernelError(f"weights of {bits} bits: there are kernels for 4 and 8")
        codes = _check("codes", codes, np.int8, (None, None))
        n, k = codes.shape
        scales = _check("scales", scales, np.float32, (n, None))
        groups = scales.shape[1]
        if not n or not k or not groups or k % groups or k // groups > MAX_GROUP_SIZE[bits]:
            raise KernelError(
                f"codes {[n, k]} with {groups} scales a row: needed rows of equal groups, at most "
                f"{MAX_GROUP_SIZE[bits]} inputs each"
            )
        if bits == 4 and (codes.min() < -8 or codes.max() > 7):
            raise KernelError(f"int4 codes from {codes.min()} to {codes.max()}: needed -8 to 7")
        if (scales.view(np.uint32) & 0xFFFF).any() or not np.isfinite(scales).all():
            raise KernelError("weight scales must be finite and exact in bfloat16; see numerics.round_to_bfloat16")
        size = k // groups
        if self._session is None:
            return Weights(reference.pack(codes, scales, bits), n, k, size, bits)
        data = self._memory.take(reference.packed_bytes(n, k, size, bits))
        self._session.pack(codes, scales, bits, data)
        return Weights(data, n, k, size, bits)

    def pack_words(self, words: Array, scales: Array) -> Weights:
        """Return an int4 matrix in the kernels' layout, from the words of a checkpoint: `pack` without unpacking.

        Args:
            words: int32 [n, k / 8], eight codes each, as docs/checkpoint.md has them.
            scales: bfloat16 [n, G], for groups of a multiple of 8 inputs.

        Raises:
            KernelError: wrong shapes or dtypes, or scales that aren't finite.
        """
        words = _check("words", words, np.int32, (None, None))
        n, k = words.shape[0], 8 * words.shape[1]
        scales = _check("scales", scales, np.dtype(ml_dtypes.bfloat16), (n, None))
        groups = scales.shape[1]
        if not n or not k or not groups or k % (8 * groups) or k // groups > MAX_GROUP_SIZE[4]:
            raise KernelError(f"words of {[n, k]} codes with {groups} scales a row: needed groups of a multiple of 8")
        if not np.isfinite(scales).all():
            raise KernelError("weight scales must be finite")
        size = k // groups
        if self._session is None:
            return self.pack(numerics.unpack_int4(words), scales.astype(np.float32), bits=4)
        data = self._memory.take(reference.packed_bytes(n, k, size, 4))
        self._session.pack_words(words.view(np.uint32), scales.view(np.uint16), data)
        return Weights(data, n, k, size, 4)

    def pack_floats(self, weights: Array) -> Weights:
        """Return float weights [n, k], bfloat16 or float32, in the kernels' layout.

        Raises:
            KernelError: another dtype, or no matrix.
        """
        bits = FLOAT_BITS.get(weights.dtype.name)
        if bits is None or weights.ndim != 2 or not weights.size:
            raise KernelError(
                f"float weights are {weights.dtype} {list(weights.shape)}: needed bfloat16 or float32 [n, k]"
            )
        n, k = weights.shape
        if self._session is None:
            return Weights(reference.pack_floats(weights), n, k, k, bits)
        data = self._memory.take(reference.packed_bytes(n, k, k, bits))
        self._session.pack_floats(np.ascontiguousarray(weights).view(np.uint8), bits, data)
        return Weights(data, n, k, k, bits)

    def matmul(
        self, weights: Weights, activations: Array, activation_scales: Array, bias: Array | None = None
    ) -> Array:
        """Return float32 y[m,n] = a_scale[m] · Σ_g w_scale[n,g] · Σ_{k∈g} q_a[m,k] · q_w[n,k] (+ bias[n]).

        The inner sums are exact. The error of y is at most (G + 4) · 2^-24 · (Σ_g |term_g| + |bias|).

        Args:
            weights: from `pack`.
            activations: int8 [m, k].
            activation_scales: float32 [m].
            bias: float32 [n].
        """
        _check_codes(weights)
        activations = _check("activations", activations, np.int8, (None, weights.k))
        m = activations.shape[0]
        activation_scales = _check("activation scales", activation_scales, np.float32, (m,))
        bias = _check_optional("bias", bias, (weights.n,))
        if self._session is None:
            return self._reference_matmul(weights, activations, activation_scales, bias)
        y = np.empty((m, weights.n), np.float32)
        self._session.multiply(weights.data, weights.group_size, weights.bits, activations, activation_scales, bias, y)
        return y

    def linear(self, weights: Weights, x: Array, input_scale: float | None, bias: Array | None = None) -> Array:
        """Return `matmul` of float32 x [m, k], quantized as by `quantize`."""
        _check_codes(weights)
        x = _check("x", x, np.float32, (None, weights.k))
        bias = _check_optional("bias", bias, (weights.n,))
        _check_scale(input_scale)
        if self._session is None:
            return self._reference_matmul(weights, *reference.quantize(x, input_scale), bias)
        y = np.empty((x.shape[0], weights.n), np.float32)
        self._session.linear(weights.data, weights.group_size, weights.bits, x, input_scale, bias, y)
        return y

    def _reference_matmul(self, weights: Weights, codes: Array, scales: Array, bias: Array | None) -> Array:
        parts = reference.unpack(weights.data, weights.n, weights.k, weights.group_size, weights.bits)
        return _to_float32(reference.matmul(*parts, codes, scales, bias))

    def quantize(self, x: Array, input_scale: float | None) -> tuple[Array, Array]:
        """Return 8-bit codes int8 [m, k] and scales float32 [m] of float32 x [m, k].

        With `input_scale` every row's scale is that one (static per-tensor); without, it is max|x| / 127 of the row
        (dynamic per-token). A row with a NaN (dynamically also an infinity) has the scale NaN, and with it its outputs;
        the code of a NaN means nothing.
        """
        x = _check("x", x, np.float32, (None, None))
        _check_scale(input_scale)
        if not x.shape[1]:
            raise KernelError("rows without channels can't be quantized")
        if self._session is None:
            return reference.quantize(x, input_scale)
        codes, scales = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
        self._session.quantize(x, input_scale, codes, scales)
        return codes, scales

    def round_in_turn(self, values: Array, steps: Array, factor: Array, bits: int) -> tuple[Array, Array]:
        """Round columns of a weight matrix one after the other, later ones making up for earlier errors (GPTQ).

        Column i has v = values[i] - Σ_{j<i} factor[i, j] · errors[j], the codes round(v / steps[i]), saturated, and
        errors[i] = (v - codes[i] · steps[i]) / factor[i, i].

        Args:
            values: float32 [c, n], c columns of n weights each, finite.
            steps: float32 [c, n], their step sizes, not 0.
            factor: float32 [c, c], of which the lower triangle counts; no 0 on its diagonal.
            bits: of a code, up to 8.

        Returns:
            codes int8 [c, n] and errors float32 [c, n].
        """
        values = _check("values", values, np.float32, (None, None))
        steps = _check("steps", steps, np.float32, values.shape)
        factor = _check("factor", factor, np.float32, (len(values), len(values)))
        if not 2 <= bits <= 8:
            raise KernelError(f"codes of {bits} bits: needed 2 to 8")
        if self._session is None:
            codes, exact = reference.round_in_turn(values, steps, factor, bits)
            return codes, _to_float32(exact)
        codes, errors = np.empty(values.shape, np.int8), np.empty(values.shape, np.float32)
        self._session.round_in_turn(values, steps, factor, bits, codes, errors)
        return codes, errors

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Return float32 x / √(mean(x²) + eps) · weight for the rows of x [m, k]."""
        return self._normalize(x, weight, None, eps, False)

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """Return float32 (x - mean(x)) / √(var(x) + eps) · weight (+ bias) for the rows of x [m, k]."""
        return self._normalize(x, weight, bias, eps, True)

    def rms_norm_quantize(self, x: Array, weight: Array, eps: float, input_scale: float | None) -> tuple[Array, Array]:
        """Return `quantize(rms_norm(x))`; with a static scale in one pass over the row."""
        return self._normalize_quantize(x, weight, None, eps, False, input_scale)

    def layer_norm_quantize(
        self, x: Array, weight: Array, bias: Array | None, eps: float, input_scale: float | None
    ) -> tuple[Array, Array]:
        """Return `quantize(layer_norm(x))`; with a static scale in one pass over the row."""
        return self._normalize_quantize(x, weight, bias, eps, True, input_scale)

    def _normalize(self, x: Array, weight: Array, bias: Array | None, eps: float, center: bool) -> Array:
        x, weight, bias = _check_norm(x, weight, bias, eps)
        if self._session is None:
            return _to_float32(reference.normalize(x, weight, bias, eps, center))
        out = np.empty(x.shape, np.float32)
        self._session.normalize(x, weight, bias, eps, center, out)
        return out

    def _normalize_quantize(
        self, x: Array, weight: Array, bias: Array | None, eps: float, center: bool, input_scale: float | None
    ) -> tuple[Array, Array]:
        x, weight, bias = _check_norm(x, weight, bias, eps)
        _check_scale(input_scale)
        if self._session is None:
            y = _to_float32(reference.normalize(x, weight, bias, eps, center))
            return reference.quantize(y, input_scale)
        codes, scales = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
        self._session.normalize_quantize(x, weight, bias, eps, center, input_scale, codes, scales)
        return codes, scales

    def attention(
        self,
        queries: Array,
        keys: Array,
        values: Array,
        *,
        key_scale: float,
        value_scale: float,
        softmax_scale: float,
        first_position: int = 0,
        pages: Array | None = None,
        softcap: float = 0.0,
        window: int = 0,
        alibi_slopes: Array | None = None,
    ) -> Array:
        """Return float32 [m, heads, head_dim]: causal attention of one sequence's queries over its int8 cache.

        Args:
            queries: float32 [m, heads, head_dim], of consecutive positions.
            keys: int8 [pages, kv_heads, head_dim, page_tokens]: all pages of a cache. kv_heads divides heads.
            values: int8 [pages, kv_heads, page_tokens, head_dim].
            key_scale: step size of the keys' codes.
            value_scale: step size of the values' codes.
            softmax_scale: factor of the scores.
            first_position: of query 0; query i attends to positions 0..first_position + i.
            pages: int64 [≥ ⌈positions / page_tokens⌉], the sequence's pages in order; by default 0, 1, 2, …
            softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
            window: a query at position p attends to p - window + 1..p only; 0 to all.
            alibi_slopes: float32 [heads]; adds slope · (key position - query position) to the scores.
        """
        queries = _check("queries", queries, np.float32, (None, None, None))
        m, heads, head_dim = queries.shape
        values = _check("values", values, np.int8, (None, None, None, head_dim))
        all_pages, kv_heads, page_tokens, _ = values.shape
        keys = _check("keys", keys, np.int8, (all_pages, kv_heads, head_dim, page_tokens))
        table = np.arange(all_pages, dtype=np.int64) if pages is None else pages
        table = _check("pages", table, np.int64, (None,))
        alibi_slopes = _check_optional("alibi_slopes", alibi_slopes, (heads,))
        if min(heads, head_dim, page_tokens, kv_heads) < 1 or heads % kv_heads:
            raise KernelError(
                f"{heads} query heads of {head_dim} channels over {kv_heads} key/value heads in pages of {page_tokens} "
                "tokens: needed at least one of each, and heads a multiple of key/value heads"
            )
        if table.size and (table.min() < 0 or table.max() >= all_pages):
            raise KernelError(f"pages from {table.min()} to {table.max()} of {all_pages}")
        if first_position < 0 or window < 0 or softcap < 0:
            raise KernelError(f"first_position {first_position}, window {window}, softcap {softcap}: needed at least 0")
        if m and first_position + m > table.size * page_tokens:
            raise KernelError(f"{first_position + m} positions, but {table.size} pages of {page_tokens}")
        if self._session is None:
            by_token = keys[table].transpose(0, 3, 1, 2), values[table].transpose(0, 2, 1, 3)
            gathered = (cache.reshape(-1, kv_heads, head_dim) for cache in by_token)
            result = reference.attention(
                queries,
                *gathered,
                key_scale=key_scale,
                value_scale=value_scale,
                softmax_scale=softmax_scale,
                first_position=first_position,
                softcap=softcap,
                window=window,
                alibi_slopes=alibi_slopes,
            )
            return _to_float32(result)
        out = np.empty(queries.shape, np.float32)
        self._session.attend(
            queries,
            keys,
            values,
            table,
            key_scale,
            value_scale,
            softmax_scale,
            softcap,
            first_position,
            window,
            alibi_slopes,
            out,
        )
        return out

    def linear_float(self, weights: Weights, x: Array, bias: Array | None = None) -> Array:
        """Return float32 [m, n] = x·Wᵀ (+ bias) for float weights and x float32 [m, k].

        The error of y is at most (k + 1) · 2^-24 · (Σ |x·w| + |bias|).
        """
        x = _check("x", x, np.float32, (None, weights.k))
        bias = _check_optional("bias", bias, (weights.n,))
        if weights.bits not in FLOAT_BITS.values():
            raise KernelError(f"weights of {weights.bits} bits aren't float")
        if self._session is None:
            y = x.astype(np.float64) @ reference.unpack_floats(weights.data, weights.n, weights.k, weights.bits).T
            return _to_float32(y if bias is None else y + bias)
        y = np.empty((x.shape[0], weights.n), np.float32)
        self._session.multiply_floats(weights.data, weights.bits, x, bias, y)
        return y

    def activate(self, activation: str, x: Array, up: Array | None = None) -> Array:
        """Return activation(x) for x float32 [m, k], times `up` [m, k] if given: what an MLP does to its inner row.

        Args:
            activation: one of `ACTIVATIONS`; "gelu_tanh" is the approximation by tanh.
            x: the row, of a gated MLP the gate's.
            up: the other factor of a gated MLP.
        """
        if activation not in ACTIVATIONS:
            raise KernelError(f"activation '{activation}': there are {', '.join(ACTIVATIONS)}")
        x = _check("x", x, np.float32, (None, None))
        up = None if up is None else _check("up", up, np.float32, x.shape)
        if self._session is None:
            return _to_float32(reference.activate(activation, x, up))
        out = np.empty(x.shape, np.float32)
        self._session.activate(ACTIVATIONS.index(activation), x, up, out)
        return out

    def new_decoder(self, **sizes: Any) -> _native.Decoder:
        """Return an empty native decoder on these threads, for `fptq.runtime.decoder` to fill."""
        return _native.Decoder(self._native_session(), **sizes)

    def measure_read(self, data: Array) -> None:
        """Read every byte of a uint8 array with all threads: timed, the bandwidth that kernels can reach."""
        self._native_session().read(_check("data", data, np.uint8, (None,)))

    def measure_dot(self, steps: int) -> int:
        """Run the target's dot instruction on registers, and return the operations: timed, the peak of kernels."""
        return self._native_session().dot(steps)

    def _native_session(self) -> _native.Session:
        if self._session is None:
            raise KernelError("the numpy reference can't do this; install the native kernels")
        return self._session


def _to_float32(x: Array) -> Array:
    """Return x in float32; what is too large becomes infinite, as in a kernel."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def _check(name: str, array: Array, dtype: type | np.dtype, shape: tuple[int | None, ...]) -> Array:
    """Return `array` in C order, or raise KernelError if its dtype or shape isn't what is needed (None: any)."""
    fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == len(shape)
    if fits:
        for needed, found in zip(shape, array.shape, strict=True):
            fits = fits and needed in (None, found)
    if not fits:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise KernelError(f"{name} is {got}: needed {np.dtype(dtype)} [{wanted}]")
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.require(array, requirements=["C", "A"])


def _check_codes(weights: Weights) -> None:
    if weights.bits not in MAX_GROUP_SIZE:
        raise KernelError(f"weights of {weights.bits} bits are float: multiply them with `linear_float`")


def _check_optional(name: str, array: Array | None, shape: tuple[int | None, ...]) -> Array | None:
    return None if array is None else _check(name, array, np.float32, shape)


def _check_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> tuple[Array, Array, Array | None]:
    x = _check("x", x, np.float32, (None, None))
    if not x.shape[1] or not eps >= 0:
        raise KernelError(f"a norm of {x.shape[1]} channels with eps {eps}: needed at least 1, and eps at least 0")
    weight = _check("weight", weight, np.float32, (x.shape[1],))
    return x, weight, _check_optional("bias", bias, (x.shape[1],))


def _check_scale(input_scale: float | None) -> None:
    if input_scale is not None and not _SMALLEST_SCALE <= input_scale <= _LARGEST_SCALE:
        raise KernelError(f"input scale {input_scale}: needed a normal positive float32, or None for dynamic")
