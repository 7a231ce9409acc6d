"""What bench/kernels.py compares: FPTQ's kernels and those of other projects, behind one interface.

bench/peers.txt has the commands that install the others.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from peers.llamacpp import Ggml, Product, Weights

Array = np.ndarray


@dataclass(frozen=True)
class Layer:
    """Weights: codes int8 [n, k] and scales float32 [n, G], exact in bfloat16 and float16."""

    codes: Array
    scales: Array

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.k // self.scales.shape[1]

    def floats(self) -> Array:
        """Return float32 [n, k], without rounding."""
        groups = self.codes.reshape(self.n, -1, self.group_size) * self.scales[..., None]
        return groups.reshape(self.n, self.k)

    def nibbles(self, offset: int) -> Array:
        """Return uint8 [n, k/2]: codes plus offset modulo 16, two a byte, the first in the low half."""
        unsigned = (self.codes + np.int8(offset)).view(np.uint8) & 15
        return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


@dataclass(frozen=True)
class Input:
    """Activations float32 [m, k], and the scale of their static quantization to int8."""

    x: Array
    scale: float

    @cached_property
    def codes(self) -> Array:
        """Return int8 [m, k]."""
        return np.clip(np.rint(self.x / np.float32(self.scale)), -128, 127).astype(np.int8)

    @cached_property
    def token_scales(self) -> Array:
        """Return float32 [m]: the scales of dynamic quantization."""
        return np.abs(self.x).max(axis=1) / np.float32(127)

    def quantized(self, activation: str) -> Array:
        """Return float64 [m, k]: what a contestant with that kind of activation multiplies."""
        if activation == "static":
            return self.codes * np.float64(np.float32(self.scale))
        if activation == "dynamic":
            scales = self.token_scales[:, None]
            return np.rint(self.x / scales) * scales.astype(np.float64)
        return self.x.astype(np.float64)


class Call(NamedTuple):
    """A product that is ready to run: `fetch(run())` is float32 [m, n]. What is borrowed must live as long."""

    run: Callable[[], Any]
    fetch: Callable[[Any], Array]
    borrowed: tuple[object, ...] = ()


class Packed(NamedTuple):
    """Weights in a contestant's layout; nbytes of codes and scales."""

    nbytes: int
    group_size: int | None
    bind: Callable[[Input], Call]


# Errors are norms over all outputs, where roundings average out: up to 172 groups added in float32 give √172 · 2^-24 =
# 8e-7 and less. A single code of 4096² that is off by one gives 5e-5 with four bits and 3e-6 with eight.
EXACT = 1e-6
FLOAT32 = 1e-5  # as above, over up to 11008 products: √11008 · 2^-24 = 6e-6
BFLOAT16 = 0.01  # three roundings to 8 bits: 2^-9 · √3 = 0.4%
INT8 = 0.02  # activations quantized by rows or blocks: 0.5-1.2% on normally distributed ones


@dataclass(frozen=True)
class Contestant:
    """One implementation of a linear layer.

    Attributes:
        name: its project, then bits of weights and activations.
        pack: brings a layer into its layout.
        bits: of the weights.
        group_size: of the layer it is given, where that isn't the cell's.
        activation: how the reference quantizes activations, "float", "static" or "dynamic".
        tolerance: the largest |y - reference| / |reference| (norms over all outputs) that is believed.
    """

    name: str
    pack: Callable[[Layer], Packed]
    bits: int = 4
    group_size: int | None = None
    activation: str = "float"
    tolerance: float = INT8


class Peer(NamedTuple):
    """A project's contestants, and what exactly was measured."""

    contestants: list[Contestant]
    version: str


def fptq(threads: int) -> Peer:
    """FPTQ: float32 in and out, quantized by a static scale; `-dynamic` by token; `-matmul` from codes."""
    from fptq.runtime.kernels import Kernels

    kernels = Kernels(threads=threads)

    def pack(layer: Layer, bits: int, activation: str) -> Packed:
        weights = kernels.pack(layer.codes, layer.scales, bits=bits)

        def bind(given: Input) -> Call:
            if activation == "codes":
                scales = np.full(len(given.x), given.scale, np.float32)
                return Call(lambda: kernels.matmul(weights, given.codes, scales), np.asarray)
            scale = given.scale if activation == "static" else None
            return Call(lambda: kernels.linear(weights, given.x, scale), np.asarray)

        return Packed(weights.nbytes, layer.group_size, bind)

    def contestant(name: str, bits: int = 4, group_size: int | None = None, activation: str = "static") -> Contestant:
        reference = "static" if activation == "codes" else activation
        return Contestant(name, lambda layer: pack(layer, bits, activation), bits, group_size, reference, EXACT)

    contestants = [
        contestant("fptq"),
        contestant("fptq-g64", group_size=64),
        contestant("fptq-w8a8", bits=8),
        contestant("fptq-dynamic", activation="dynamic"),
        contestant("fptq-matmul", activation="codes"),
    ]
    return Peer(contestants, f"{version('fptq')} ({kernels.target})")


def ark(threads: int) -> Peer:
    """auto-round-lib: activations quantized in blocks, on Intel's CPUs only; on others it multiplies in float32."""
    import auto_round_kernel
    import torch

    torch.set_num_threads(threads)
    nothing = torch.zeros(0)

    def pack(layer: Layer) -> Packed:
        codes = torch.from_numpy(layer.codes).t().contiguous()
        scales = torch.from_numpy(layer.scales).t().contiguous()
        kind = (layer.group_size, "int8", "int4", "fp32", False)
        packed = auto_round_kernel.repack_quantized_weight(codes, scales, nothing.to(torch.int8), *kind)

        def bind(given: Input) -> Call:
            x = torch.from_numpy(given.x)
            run = lambda: auto_round_kernel.woqgemm(x, packed, nothing, layer.n, layer.k, *kind)  # noqa: E731
            return Call(run, lambda y: y.numpy())

        return Packed(packed.numel(), layer.group_size, bind)

    # The name says what is computed: results that are exact come from activations that weren't quantized.
    random = np.random.default_rng(0)
    layer = Layer(random.integers(-8, 8, (96, 256), dtype=np.int8), np.ones((96, 2), np.float32))
    given = Input(random.standard_normal((16, 256), dtype=np.float32), 1.0)
    call = pack(layer).bind(given)
    expected = given.x.astype(np.float64) @ layer.floats().T
    quantizes = np.linalg.norm(call.fetch(call.run()) - expected) > FLOAT32 * np.linalg.norm(expected)
    name = "ark-w4a8" if quantizes else "ark-w4a32"
    return Peer([Contestant(name, pack)], version("auto-round-lib"))


def llamacpp(threads: int) -> Peer:
    """llama.cpp: Q4_0, groups of 32, repacked for the CPU; activations quantized in blocks of 32."""
    ggml = Ggml(threads)

    def pack(layer: Layer) -> Packed:
        codes = (layer.codes + np.int8(8)).view(np.uint8).reshape(layer.n, -1, 2, 16)
        blocks = np.empty((layer.n, layer.k // 32, 18), np.uint8)
        scales = np.repeat(layer.scales.astype(np.float16), layer.group_size // 32, axis=1)
        blocks[..., :2] = scales[..., None].view(np.uint8)
        blocks[..., 2:] = codes[:, :, 0] | codes[:, :, 1] << 4
        weights = Weights(ggml, blocks)

        def bind(given: Input) -> Call:
            product = Product(ggml, weights, given.x)
            return Call(product.run, lambda _: product.fetch())

        return Packed(blocks.nbytes, 32, bind)

    return Peer([Contestant("llamacpp-q4_0", pack)], ggml.version)


def onnxruntime(threads: int) -> Peer:
    """onnxruntime: MatMulNBits at accuracy level 4, activations quantized in blocks of the weights' groups."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    ort.set_global_thread_pool_sizes(threads, 1)
    settings = ort.SessionOptions()
    settings.use_per_session_threads = False  # or those of one copy of the weights would get in the way of another's

    def pack(layer: Layer) -> Packed:
        n, k, size = layer.n, layer.k, layer.group_size
        codes = layer.nibbles(8).reshape(n, k // size, size // 2)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=size,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
            [
                helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True),
                helper.make_tensor("scales", TensorProto.FLOAT, layer.scales.shape, layer.scales.tobytes(), raw=True),
            ],
        )
        sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

        def bind(given: Input) -> Call:
            binding = session.io_binding()
            y = ort.OrtValue.ortvalue_from_numpy(np.empty((len(given.x), n), np.float32))
            binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(given.x))
            binding.bind_ortvalue_output("y", y)
            return Call(lambda: session.run_with_iobinding(binding), lambda _: y.numpy())

        return Packed(codes.nbytes + layer.scales.nbytes, size, bind)

    return Peer([Contestant("onnxruntime-w4a8", pack)], version("onnxruntime"))


def openvino(threads: int) -> Peer:
    """OpenVINO: activations quantized in groups of 32, its default, and as wide as the weights' groups."""
    import openvino as ov
    from openvino import opset13 as operators

    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }

    def pack(layer: Layer, dynamic: dict[str, int]) -> Packed:
        n, k, size = layer.n, layer.k, layer.group_size
        nibbles = layer.nibbles(0)
        tensor = ov.Tensor(nibbles, ov.Shape([n, k // size, size]), ov.Type.i4)  # of the array's memory
        codes = operators.convert(operators.constant(tensor), "f16")
        groups = operators.multiply(codes, operators.constant(layer.scales.astype(np.float16)[..., None]))
        weights = operators.reshape(groups, np.array([n, k]), special_zero=False)
        x = operators.parameter([-1, k], np.float32)
        y = operators.matmul(x, operators.convert(weights, "f32"), transpose_a=False, transpose_b=True)
        compiled = core.compile_model(ov.Model([y], [x]), "CPU", settings | dynamic)

        def bind(given: Input) -> Call:
            request = compiled.create_infer_request()
            request.set_input_tensor(ov.Tensor(given.x, shared_memory=True))
            return Call(request.infer, lambda _: request.get_output_tensor().data, (nibbles, given))

        return Packed(n * k // 2 + layer.scales.size * 2, size, bind)

    def pack_wide(layer: Layer) -> Packed:
        return pack(layer, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": layer.group_size})

    contestants = [
        Contestant("openvino-w4a8", lambda layer: pack(layer, {})),
        Contestant("openvino-w4a8-dq128", pack_wide),
    ]
    return Peer(contestants, ov.__version__)


def pytorch(threads: int) -> Peer:
    """PyTorch: oneDNN's static W8A8, float32, and int4 weights with bfloat16 activations (bfloat16 in and out)."""
    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated, and still the fastest

    def pack_w8a8(layer: Layer) -> Packed:
        weights = torch.ops.onednn.qlinear_prepack(torch.from_numpy(layer.codes), None)
        scales, zeros = torch.from_numpy(layer.scales[:, 0]), torch.zeros(layer.n, dtype=torch.int64)

        def bind(given: Input) -> Call:
            x, scale = torch.from_numpy(given.x), given.scale

            def run() -> torch.Tensor:
                # Unsigned codes: with signed ones oneDNN takes a reference kernel on CPUs without AMX.
                codes = torch.quantize_per_tensor(x, scale, 128, torch.quint8).int_repr()
                return torch.ops.onednn.qlinear_pointwise(
                    codes, scale, 128, weights, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
                )

            return Call(run, lambda y: y.numpy())

        return Packed(layer.codes.nbytes + layer.scales.nbytes, layer.k, bind)

    def pack_fp32(layer: Layer) -> Packed:
        weights = torch.from_numpy(layer.floats())

        def bind(given: Input) -> Call:
            x = torch.from_numpy(given.x)
            return Call(lambda: torch.nn.functional.linear(x, weights), lambda y: y.numpy())

        return Packed(weights.nbytes, None, bind)

    def pack_w4a16(layer: Layer) -> Packed:
        weights = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(layer.codes).int() + 8, 2)
        scales = torch.from_numpy(layer.scales).bfloat16().t()
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

        def bind(given: Input) -> Call:
            x, size = torch.from_numpy(given.x).bfloat16(), layer.group_size
            run = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weights, size, scales_and_zeros)  # noqa: E731
            return Call(run, lambda y: y.float().numpy())

        return Packed(weights.nbytes + scales_and_zeros.nbytes, layer.group_size, bind)

    contestants = [
        Contestant("onednn-w8a8", pack_w8a8, bits=8),
        Contestant("torch-fp32", pack_fp32, bits=32, tolerance=FLOAT32),
        Contestant("torch-w4a16", pack_w4a16, tolerance=BFLOAT16),
    ]
    return Peer(contestants, torch.__version__)


PEERS: dict[str, Callable[[int], Peer]] = {
    "ark": ark,
    "llamacpp": llamacpp,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "torch": pytorch,
}
