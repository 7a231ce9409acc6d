"""Per-layer signal-to-noise: a quantized layer's output beside the float layer's, on the first calibration batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fptq.checkpoint import QuantizedLinear
from fptq.models.simulation import simulated_input
from fptq.recipe import Activation


@dataclass
class _Energies:
    signal: float = 0.0
    noise: float = 0.0
    weight_noise: float = 0.0


def measure_sqnr(
    block: nn.Module, linears: dict[str, QuantizedLinear], run_block: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Return, for each quantized layer, the output's signal-to-quantization-noise ratio in dB.

    Every layer gets its input from the float block, so the figures don't depend on each other: `sqnr_db` with weights
    and activations quantized, `weight_sqnr_db` with the weights alone. 10·log10(Σy² / Σ(y - ŷ)²); 300 is no noise.

    Args:
        block: the equalized float block.
        linears: its quantized layers by name within the block.
        run_block: runs the block on calibration data, in float32.
    """
    with _comparing(block, linears) as energies:
        run_block()
    return {
        name: {"sqnr_db": _decibel(e.signal, e.noise), "weight_sqnr_db": _decibel(e.signal, e.weight_noise)}
        for name, e in energies.items()
    }


def _decibel(signal: float, noise: float) -> float:
    if signal == 0 or noise <= signal * 1e-30:
        return 300.0
    return round(10 * float(np.log10(signal / noise)), 3)


@contextmanager
def _comparing(block: nn.Module, linears: dict[str, QuantizedLinear]) -> Iterator[dict[str, _Energies]]:
    energies: dict[str, _Energies] = {}
    handles = []
    for name, linear in linears.items():
        energy = energies[name] = _Energies()

        def hook(
            layer: nn.Module,
            args: tuple[Any, ...],
            output: torch.Tensor,
            linear: QuantizedLinear = linear,
            energy: _Energies = energy,
        ) -> None:
            # the dequantized weight lives for one layer at a time: a block of a 70B model has 3 GB of them
            x, weight = args[0].float(), torch.from_numpy(linear.weight())
            bias = layer.bias.float() if layer.bias is not None else None
            wanted = output.float()
            energy.signal += _energy(wanted)
            energy.weight_noise += _energy(functional.linear(x, weight, bias) - wanted)
            if linear.activation is Activation.NONE:
                energy.noise = energy.weight_noise
            else:
                got = functional.linear(simulated_input(x, linear), weight, bias)
                energy.noise += _energy(got - wanted)

        handles.append(block.get_submodule(name).register_forward_hook(hook))
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()


def _energy(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
