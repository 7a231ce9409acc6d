"""The transformers path with the engine's rounding: its own modules, wiring and cache, our kernels in their places.

Sums in another order round differently, and a rounded value that falls on the other side of a code's boundary draws all
later rounding anew: after a while two sound implementations of an int8 model differ as two draws of its quantization
noise do. With the same kernels for norms, activations, rotations and attention nothing is left to differ, so whatever
does is a fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fptq.integrations.transformers import Int8CacheLayer
from fptq.runtime.blueprint import Norm
from fptq.runtime.engine import Engine
from fptq.runtime.kernels import Kernels
from fptq.runtime.kv_cache import PAGE_TOKENS
from fptq.runtime.weights import NormWeights


class _Norm(nn.Module):
    def __init__(self, kernels: Kernels, norm: NormWeights):
        super().__init__()
        self.kernels, self.norm = kernels, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, norm = x.reshape(-1, x.shape[-1]).contiguous().numpy(), self.norm
        if norm.center:
            y = self.kernels.layer_norm(rows, norm.weight, norm.bias, norm.eps)
        else:
            y = self.kernels.rms_norm(rows, norm.weight, norm.eps)
        return torch.from_numpy(y).reshape(x.shape)


class _Activation(nn.Module):
    def __init__(self, kernels: Kernels, name: str):
        super().__init__()
        self.kernels, self.name = kernels, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous().numpy()
        return torch.from_numpy(self.kernels.activate(self.name, rows)).reshape(x.shape)


class _Rotary(nn.Module):
    def __init__(self, engine: Engine):
        super().__init__()
        self.tables = {block.window > 0: block.rotation for block in engine.weights.blocks}

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sliding = layer_type == "sliding_attention" if len(self.tables) > 1 else next(iter(self.tables))
        halves = (torch.from_numpy(table)[position_ids] for table in self.tables[sliding])
        cosines, sines = (torch.cat([half, half], dim=-1) for half in halves)
        return cosines, sines


def use_engine_rounding_(model: nn.Module, engine: Engine) -> None:
    """Change a model from `load` so that it rounds as the engine does, for one sequence without padding."""
    kernels, plan, weights = engine.kernels, engine.plan, engine.weights

    def put(prefix: str, norm: Norm | None, arrays: NormWeights | None) -> None:
        if norm is not None and arrays is not None:
            parent, _, child = (prefix + norm.name).rpartition(".")
            setattr(model.get_submodule(parent), child, _Norm(kernels, arrays))

    for i, (block, arrays) in enumerate(zip(plan.blocks, weights.blocks, strict=True)):
        for name in ("attention", "query", "key", "attention_output", "mlp", "mlp_output"):
            put(f"{plan.prefix}.{i}.", getattr(block, f"{name}_norm"), getattr(arrays, f"{name}_norm"))
    put("", plan.final_norm, weights.final_norm)
    for module in list(model.modules()):
        for name in ("act_fn", "activation_fn"):
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, _Activation(kernels, plan.activation))
    if hasattr(model.base_model, "rotary_emb"):
        model.base_model.rotary_emb = _Rotary(engine)

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _: Any,
        scaling: float,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        block = weights.blocks[module.layer_idx]
        scales = block.cache_scales

        def pages(states: torch.Tensor, scale: float) -> np.ndarray:
            codes = np.round(states[0].numpy() / np.float32(scale)).astype(np.int8)  # [kv_heads, tokens, head_dim]
            padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % PAGE_TOKENS), (0, 0)))
            return padded.reshape(codes.shape[0], -1, PAGE_TOKENS, codes.shape[2]).swapaxes(0, 1)

        y = kernels.attention(
            query[0].transpose(0, 1).contiguous().numpy(),
            np.ascontiguousarray(pages(key, scales.key).swapaxes(2, 3)),
            np.ascontiguousarray(pages(value, scales.value)),
            key_scale=scales.key,
            value_scale=scales.value,
            softmax_scale=scaling,
            first_position=key.shape[2] - query.shape[2],
            softcap=plan.attention_softcap,
            window=block.window,
        )
        return torch.from_numpy(y)[None], None

    ALL_ATTENTION_FUNCTIONS.register("engine", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("engine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "engine"


def full_cache(model: nn.Module) -> Cache:
    """Return an int8 cache that keeps all keys, also of layers with a sliding window."""
    return Cache(layers=[Int8CacheLayer(scales) for scales in model.fptq_cache_scales])
