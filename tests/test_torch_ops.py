"""The torch operator: torch's own checks, torch.compile, and equality with the kernels it calls."""

import numpy as np
import pytest
import torch

from fptq import numerics
from fptq.errors import KernelError
from fptq.integrations import torch_ops
from fptq.runtime.kernels import Kernels


def arguments(
    *, static: bool, bias: bool, shape: tuple[int, ...] = (2, 5, 96)
) -> tuple[torch.Tensor, torch.Tensor, int, int, int, float | None, torch.Tensor | None]:
    rng = np.random.default_rng(0)
    n, k, size = 40, 96, 32
    codes = rng.integers(-8, 8, (n, k)).astype(np.int8)
    scales = numerics.round_to_bfloat16(rng.uniform(1e-3, 1e-1, (n, k // size)).astype(np.float32))
    packed = torch.from_numpy(torch_ops.shared_kernels().pack(codes, scales).data)
    x = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return x, packed, n, size, 4, 0.03 if static else None, torch.arange(n, dtype=torch.float32) if bias else None


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(static: bool, bias: bool) -> None:
    torch.library.opcheck(torch.ops.fptq.linear, arguments(static=static, bias=bias))


@pytest.mark.parametrize("shape", [(96,), (0, 96), (3, 96), (1, 1, 96), (2, 3, 4, 96)])
def test_it_runs_the_kernels(shape: tuple[int, ...]) -> None:
    x, packed, n, size, bits, scale, bias = arguments(static=True, bias=True, shape=shape)
    got = torch.ops.fptq.linear(x, packed, n, size, bits, scale, bias)
    kernels = Kernels(threads=1)
    weights = torch_ops.Weights(packed.numpy(), n, 96, size, bits)
    wanted = kernels.linear(weights, x.reshape(-1, 96).numpy(), scale, bias.numpy())
    np.testing.assert_array_equal(got.numpy(), wanted.reshape(*shape[:-1], n))


def test_compile_keeps_it_whole() -> None:
    x, packed, n, size, bits, scale, bias = arguments(static=True, bias=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(torch.ops.fptq.linear(x * 2, packed, n, size, bits, scale, bias))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x[:, :3]), layer(x[:, :3]))  # another length


def test_wrong_operands_raise() -> None:
    x, packed, n, size, bits, scale, bias = arguments(static=True, bias=False)
    with pytest.raises(KernelError, match="x is float64"):
        torch.ops.fptq.linear(x.double(), packed, n, size, bits, scale, bias)
    with pytest.raises(KernelError, match="packed weights"):
        torch.ops.fptq.linear(x, packed, n + 40, size, bits, scale, bias)


def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch_ops.shared_kernels().threads == 1
        torch.set_num_threads(2)
        assert torch_ops.shared_kernels().threads == 2
    finally:
        torch.set_num_threads(before)
