"""A quantized checkpoint as a transformers model: W4A8 linears on native kernels, and an int8 KV cache.

    model, tokenizer = load("SmolLM2-135M-W4A8")
    model.generate(**tokenizer("Once", return_tensors="pt"))

Every product is computed from the very codes and scales of the file; the rest of the model runs in float32, or in
another dtype. What is built on `generate` works, pipelines and assisted generation too, as does torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, Cache, GenerationConfig, TextStreamer
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from fptq import numerics
from fptq.checkpoint import Checkpoint, KVScales, QuantizedLinear
from fptq.errors import CheckpointError, GenerationError, OutputError
from fptq.integrations.torch_ops import linear as torch_linear
from fptq.integrations.torch_ops import shared_kernels
from fptq.models.architectures import attention_name, get_architecture
from fptq.models.loading import build_skeleton, cache_argument, fill_buffers, load_tokenizer, tied_names
from fptq.models.simulation import simulated_input
from fptq.recipe import Activation
from fptq.runtime import reference
from fptq.runtime.kernels import REFERENCE

SIMULATED = "simulated in float"
"""What `W4A8Linear.kernel` calls a scheme that no kernel runs."""


class W4A8Linear(nn.Module):
    """A linear layer on int4 or int8 codes: y = x̂·Ŵᵀ + b with the integers of the checkpoint.

    It holds the codes packed and runs the native kernels. Tensors that aren't on the CPU take the reference arithmetic:
    then the codes exist in float32, too; the variable FPTQ_KERNEL=reference makes every layer take it. Schemes that no
    kernel runs (float activations, and those of other methods), or with `simulate` all, are simulated in float, on the
    dequantized weight.
    """

    bias: torch.Tensor | None

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None, *, simulate: bool = False):
        super().__init__()
        self.out_features, self.in_features = linear.codes.shape
        self.group_size = linear.group_size
        self.bits = linear.bits
        self.activation = linear.activation
        self.input_scale = linear.input_scale
        kernels = shared_kernels()
        self.target = kernels.target
        packed = kernels.pack(linear.codes, linear.scales, bits=linear.bits)
        self.register_buffer("packed", torch.from_numpy(packed.data), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._simulate = simulate
        self._simulated = replace(linear, codes=linear.codes[:0], scales=linear.scales[:0])  # all but the codes
        self._grouped: tuple[torch.Tensor, torch.Tensor] | None = None
        self._weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output [..., out_features] for x [..., in_features], in x's dtype; it is computed in float32."""
        return self._linear(x.float()).to(x.dtype)

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel == SIMULATED:
            simulated = simulated_input(x, replace(self._simulated, activation=self.activation))
            return functional.linear(simulated, self._dequantized(), self.bias)
        if self.kernel == REFERENCE:
            rows = x.reshape(-1, self.in_features)
            y = numerics.w4a8_linear(rows, *self._reference(), self.activation, self.input_scale, self.bias)
            return y.reshape(*x.shape[:-1], self.out_features)
        scale = self.input_scale if self.activation is Activation.STATIC else None
        return torch_linear(x, self.packed, self.out_features, self.group_size, self.bits, scale, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> W4A8Linear:
        """Move the layer, but leave the bias in float32, like the scales, if the model is cast."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.bias = bias.to(self.packed.device)
        return self

    @property
    def kernel(self) -> str:
        """Return the target that runs this layer, REFERENCE for the arithmetic of `numerics`, or SIMULATED."""
        if self._simulate or not self.activation.runs_in_int8 or self._simulated.low_rank is not None:
            return SIMULATED
        return self.target if self.packed.device.type == "cpu" else REFERENCE

    def _reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales as `numerics.w4a8_linear` takes them, made once, where the layer is."""
        if self._grouped is None or self._grouped[0].device != self.packed.device:
            codes, scales = self._codes()
            grouped = numerics.group_codes(torch.from_numpy(codes), self.group_size).contiguous()
            transposed = torch.from_numpy(scales).T.contiguous()
            self._grouped = grouped.to(self.packed.device), transposed.to(self.packed.device)
        return self._grouped

    def _dequantized(self) -> torch.Tensor:
        """Return the weight in float32, made once, where the layer is."""
        if self._weight is None or self._weight.device != self.packed.device:
            codes, scales = self._codes()
            weight = replace(self._simulated, codes=codes, scales=scales).weight()
            self._weight = torch.from_numpy(weight).to(self.packed.device)
        return self._weight

    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        n, k, size = self.out_features, self.in_features, self.group_size
        return reference.unpack(self.packed.cpu().numpy(), n, k, size, self.bits)

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        return (
            f"{self.in_features} -> {self.out_features}, int{self.bits} groups of {self.group_size}, "
            f"input {self.activation.value}, kernel {self.kernel}"
        )


class _Int8Layer:
    """Keeps keys and values as int8 codes; attention gets them back in float. Mixed into transformers' cache layers."""

    scales: KVScales

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new states as codes and return all states, dequantized."""
        codes = (
            numerics.quantize(states, scale, numerics.ACTIVATION_BITS).to(torch.int8)
            for states, scale in ((key_states, self.scales.key), (value_states, self.scales.value))
        )
        keys, values = super().update(*codes, *args, **kwargs)  # type: ignore[misc]
        dtype = key_states.dtype
        return keys.to(dtype) * self.scales.key, values.to(dtype) * self.scales.value


class Int8CacheLayer(_Int8Layer, DynamicLayer):
    """An int8 KV cache layer with static scales, which grows."""

    def __init__(self, scales: KVScales):
        super().__init__()
        self.scales = scales


class Int8SlidingCacheLayer(_Int8Layer, DynamicSlidingWindowLayer):
    """An int8 KV cache layer with static scales, of a layer that attends to a sliding window."""

    def __init__(self, scales: KVScales, sliding_window: int):
        super().__init__(sliding_window=sliding_window)
        self.scales = scales


class Int8StaticCacheLayer(_Int8Layer, StaticLayer):
    """An int8 KV cache layer with static scales and memory for `max_cache_len` tokens, for torch.compile."""

    def __init__(self, scales: KVScales, max_cache_len: int):
        super().__init__(max_cache_len=max_cache_len)
        self.scales = scales


class Int8StaticSlidingCacheLayer(_Int8Layer, StaticSlidingWindowLayer):
    """An int8 KV cache layer with static scales and memory for a sliding window, for torch.compile."""

    def __init__(self, scales: KVScales, max_cache_len: int, sliding_window: int):
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self.scales = scales


def new_cache(model: nn.Module, max_length: int | None = None) -> Cache | None:
    """Return an empty int8 KV cache for a model from `load`, or None where the cache stays in float.

    Args:
        model: the model.
        max_length: tokens that it has memory for from the start, which torch.compile needs; None lets it grow.
    """
    scales: list[KVScales] = model.fptq_cache_scales
    if not scales:
        return None
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * len(scales)
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    if max_length is None:
        layers = [Int8SlidingCacheLayer(s, w) if w else Int8CacheLayer(s) for s, w in zip(scales, windows, strict=True)]
    else:
        layers = [
            Int8StaticSlidingCacheLayer(s, max_length, w) if w else Int8StaticCacheLayer(s, max_length)
            for s, w in zip(scales, windows, strict=True)
        ]
    return Cache(layers=layers)


def _int8_layer(layer: CacheLayerMixin, scales: KVScales) -> CacheLayerMixin:
    """Return the int8 form of a cache layer; of a kind that somebody asked for by name, the layer itself."""
    if type(layer) is DynamicLayer:
        return Int8CacheLayer(scales)
    if type(layer) is DynamicSlidingWindowLayer:
        sliding = Int8SlidingCacheLayer(scales, layer.sliding_window)
        sliding.record_past = layer.record_past
        return sliding
    if type(layer) is StaticLayer:
        return Int8StaticCacheLayer(scales, layer.max_cache_len)
    if type(layer) is StaticSlidingWindowLayer:
        return Int8StaticSlidingCacheLayer(scales, layer.max_cache_len, layer.max_cache_len)
    return layer


def _quantize_empty_cache(model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """Make a cache that has no tokens yet an int8 one, before a forward pass: `generate` makes its own, in float."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("cache")  # its name since transformers 5.24
    if cache is None or any(isinstance(layer, _Int8Layer) for layer in cache.layers) or cache.get_seq_length() != 0:
        return
    ours = new_cache(model)
    if not cache.layers and ours is not None:  # it would add one for each block
        cache.layers = ours.layers
    cache.layers = [_int8_layer(*pair) for pair in zip(cache.layers, model.fptq_cache_scales, strict=True)]


def _refuse_saving(*_: Any, **__: Any) -> None:
    """Stand in for `save_pretrained`: what is in memory is packed for this CPU."""
    raise OutputError("a loaded checkpoint can't be saved again: copy its folder, or use `fptq export`")


def crop_cache(cache: Cache, length: int) -> bool:
    """Cut a cache to its first `length` tokens and return True, or False if a sliding window has forgotten some."""
    found = cache.get_seq_length()
    windows = [layer.sliding_window for layer in cache.layers if layer.is_sliding]
    if windows and found >= min(windows):
        return False
    if length < found:
        cache.crop(length - found)  # negative: how many go
    return True


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, float_cache: bool = False, simulate: bool = False
) -> tuple[nn.Module, Any]:
    """Return the checkpoint in `folder` as a transformers model and its tokenizer (None if it has none).

    `generate` runs it with the int8 KV cache of the checkpoint. A forward pass without a cache rounds no keys and
    values; give it `past_key_values=new_cache(model)`.

    Args:
        folder: a checkpoint folder.
        dtype: of everything but the quantized layers, which have their scales in float32 and compute in it. bfloat16
            rounds equalized norms, which costs Gemma models accuracy.
        float_cache: keep keys and values in float.
        simulate: compute every quantized layer in float32, on dequantized weights and inputs: the same up to rounding,
            and faster where the CPU has no fast int8 instructions.

    Raises:
        CheckpointError: the folder isn't a sound checkpoint, or doesn't fit its own config.
        ModelError: its architecture isn't in the table, or its config or tokenizer is damaged.
    """
    checkpoint = Checkpoint.open(folder)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        has_generation = (checkpoint.folder / "generation_config.json").exists()
        generation = GenerationConfig.from_pretrained(checkpoint.folder) if has_generation else None
    # a damaged configuration ends in whatever error transformers runs into
    except Exception as cause:
        raise CheckpointError(f"{checkpoint.folder}: transformers can't read its configuration ({cause})") from cause
    architecture = get_architecture(config.model_type)
    del config.quantization_config  # our linears, not compressed-tensors' decompression
    model = build_skeleton(config)
    attention = _attention_names(model, architecture, config)
    _check_names(checkpoint, model, attention)
    fill_buffers(model, model)
    tensors = {}
    for name in checkpoint.schemes:
        linear, layer = checkpoint.read_linear(name), model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            weight = torch.from_numpy(linear.codes).float().mul_(torch.from_numpy(linear.scales))
            tensors[f"{name}.weight"] = weight.to(dtype)
            continue
        parent, _, child = name.rpartition(".")
        bias = _float_tensor(checkpoint, f"{name}.bias") if layer.bias is not None else None
        setattr(model.get_submodule(parent), child, W4A8Linear(linear, bias, simulate=simulate))
    ours = {f"{name}.bias" for name in checkpoint.schemes}
    tensors |= {n: _float_tensor(checkpoint, n).to(dtype) for n in checkpoint.float_tensors() if n not in ours}
    model.load_state_dict(tensors, strict=False, assign=True)
    if not checkpoint.tied_head:  # an int8 head has the codes, not the embedding's floats
        model.tie_weights()
    model.requires_grad_(False)
    cache = checkpoint.cache_scales()
    model.fptq_cache_scales = [cache[name] for name in attention] if cache and not float_cache else []
    model.config.dtype = dtype
    if model.fptq_cache_scales:
        model.register_forward_pre_hook(_quantize_empty_cache, with_kwargs=True)
    model.save_pretrained = _refuse_saving
    if generation is not None:
        model.generation_config = generation
    return model.eval(), load_tokenizer(checkpoint.folder)


def _attention_names(model: nn.Module, architecture: Any, config: Any) -> list[str]:
    attention = attention_name(architecture.describe(config))
    return [f"{architecture.blocks}.{i}.{attention}" for i in range(len(model.get_submodule(architecture.blocks)))]


def _check_names(checkpoint: Checkpoint, model: nn.Module, attention: list[str]) -> None:
    """Raise CheckpointError unless the file has exactly the tensors that the model needs, in its shapes."""
    unneeded = [] if checkpoint.tied_head else tied_names(model)[1:]
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in unneeded}
    for name in checkpoint.schemes:
        shape = wanted.pop(f"{name}.weight", None)
        stored = checkpoint.shape(name)
        if shape != stored:
            raise CheckpointError(
                f"{checkpoint.folder}: layer '{name}' is {list(stored)}, the config makes it {list(shape or ())}"
            )
    found = {name: checkpoint.tensors[name][1].shape for name in checkpoint.float_tensors()}
    for name in sorted(wanted.keys() ^ found.keys()):
        what = "is missing" if name in wanted else "has no place in the model"
        raise CheckpointError(
            f"{checkpoint.folder}: tensor '{name}' {what}; config.json and shards don't belong together"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor '{name}' is {list(found[name])}, the config makes it {list(shape)}"
            )
    cache = checkpoint.cache_scales()
    if cache and sorted(cache) != sorted(attention):
        raise CheckpointError(f"{checkpoint.folder}: KV cache scales are there for some layers only")


def _float_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.from_numpy(checkpoint.read(name).astype(np.float32))


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the text that a model from `load` writes after `prompt`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: the text to continue, or with `chat` what the user says.
        chat: put the prompt into the tokenizer's chat template.
        max_new_tokens: stop after this many tokens at the latest.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens of this total probability.
        seed: of sampling.
        on_text: is given the text in pieces as it comes.

    Raises:
        GenerationError: the prompt is empty or too long, or an option is out of range.
    """
    if tokenizer is None:
        raise GenerationError("the checkpoint has no tokenizer, so it can't read a prompt")
    if any(m.activation is Activation.CHANNELS for m in model.modules() if isinstance(m, W4A8Linear)):
        raise GenerationError(
            "a scale for each channel is one over the tokens of a text, and exact for a single new token: the text "
            "would be better than the method; such a checkpoint can only be scored"
        )
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or not 0 <= seed < 2**63:
        raise GenerationError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}, seed {seed}: "
            "needed at least 1, at least 0, above 0 up to 1, and from 0 up to 2^63"
        )
    if top_p < 1 and temperature == 0:
        raise GenerationError("top_p chooses among sampled words: it needs a temperature above 0")
    if chat:
        if tokenizer.chat_template is None:
            raise GenerationError("the model's tokenizer has no chat template; leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    length = inputs.input_ids.shape[1]
    context = getattr(model.config, "max_position_embeddings", None)
    if length == 0:
        raise GenerationError("the prompt is empty")
    if context and length + max_new_tokens > context:
        raise GenerationError(
            f"{length} tokens of prompt and {max_new_tokens} new ones don't fit the context of {context}"
        )
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        **cache_argument(model, new_cache(model)),
        streamer=_Streamer(tokenizer, on_text) if on_text else None,
        **(sampling if temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
    )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


class _Streamer(TextStreamer):
    """Hands finished pieces of text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
