"""What tests of kernels have in common."""

import ml_dtypes
import numpy as np

from fptq import numerics
from fptq.runtime.kernels import targets

HERE = [name for name, lacking in targets().items() if not lacking]
NATIVE = [name for name in HERE if name != "reference"]
EPS = 2.0**-24  # half a unit in the last place of float32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def weights_of(rng: np.random.Generator, n: int, k: int, size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes over their whole range, an all-zero group, a zero scale, scales of very different size and both signs."""
    top = 2 ** (bits - 1)
    codes = rng.integers(-top, top, (n, k)).astype(np.int8)
    codes[0, :size] = 0
    scales = numerics.round_to_bfloat16(np.exp(rng.uniform(-12, 3, (n, k // size))).astype(np.float32))
    scales *= rng.choice(np.array([-1, 1], np.float32), scales.shape)
    scales[-1, -1] = 0
    return codes, scales
