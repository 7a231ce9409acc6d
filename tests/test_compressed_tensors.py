"""Stock transformers with compressed-tensors loads our folders and computes our logits.

Loaded that way, a model's weights are decompressed at its first forward pass; inputs of quantized layers, keys and
values are quantized and dequantized in float32 on the fly. The arithmetic is the same as ours except for one thing:
compressed-tensors divides a token's max|x| by 127.5 for its dynamic scale, the paper's Eq. 3 by 127.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fptq import numerics
from fptq.checkpoint import STATISTICS_FILE, Checkpoint, KVScales
from fptq.integrations.transformers import W4A8Linear, load, new_cache
from fptq.quantize.calibration import CalibrationSpec
from fptq.quantize.pipeline import Options, quantize
from fptq.recipe import Activation, Recipe
from fptq.runtime.kernels import Kernels
from fptq.shards import read_header, read_tensor, write_shard
from stock_model import difference, largest_difference, load_stock, quantize_dynamic_by_127_5, token_ids
from tiny import save_tiny
from tiny import token_ids as tiny_ids

pytest.importorskip("compressed_tensors", reason="compressed-tensors isn't installed: pip install compressed-tensors")

UNIT = 2.0**-24
TOLERANCE = 64 * UNIT
"""Largest difference of two tensors, relative to the largest value in them, that the order of summation explains.

Between two points of comparison there is one matmul of at most 288 terms, a norm or a gate, rotary embedding and
attention over at most 28 positions. A float32 sum of k terms of random sign is off by about sqrt(k) roundings of its
partial sums: sqrt(288) = 17 units in the last place of its typical size, which is a third or less of the largest value.
With the few roundings of norm, gate and softmax, and those of the residual stream from the blocks before, that is below
32 units; twice that is allowed. One code that differs by a step changes its tensor by a 127th of the largest value, two
thousand times the tolerance.
"""

ALL_STATIC = Recipe("all static", v1=1e30, fuse_into_linear=True)
MIXED = Recipe("mixed", skip=("model.layers.0.self_attn.o_proj",))
INT8_STATIC = Recipe("int8", weight_bits=8, activations="static", equalization="smoothquant", alpha=0.5)
BY_ROWS = Recipe("by rows", group_size=0, activations="static", equalization="none")
SIGNED = Recipe("signed scales", activations="static", equalization="search", clipping="search", rounding="gptq")
FP8 = Recipe("fp8", activations="fp8", equalization="none")
WEIGHT_ONLY = Recipe("weights", activations="float", equalization="none", kv_cache="float")
SKIPPED = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama with biases and two group sizes, whose input ranges fall into all classes of the policy."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=288,  # not a multiple of 128 or 64: down_proj gets groups of 32
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
        model.model.layers[0].post_attention_layernorm.weight *= 20  # max|x| about 80: equalized
        model.model.layers[1].post_attention_layernorm.weight *= 80  # about 300: dynamic
    folder = tmp_path_factory.mktemp("float")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_checkpoint(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Return a function that quantizes the tiny model by a recipe, once."""

    @functools.cache
    def make(recipe: Recipe) -> Path:
        calibration = CalibrationSpec("random", samples=4, length=32)
        output = tmp_path_factory.mktemp("checkpoint") / "out"
        return quantize(str(float_folder), output, recipe, calibration, Options(progress=False))

    return make


@torch.no_grad()
def logits(model: nn.Module, cache: Any = None) -> torch.Tensor:
    return model(token_ids(), past_key_values=cache, use_cache=cache is not None).logits


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


# --- what is loaded ---------------------------------------------------------------------------------------------------


def test_the_model_has_layers_of_every_class(make_checkpoint: Callable[[Recipe], Path]) -> None:
    """Without this, the comparisons below could pass because there is nothing to compare."""
    layers = Checkpoint.open(make_checkpoint(MIXED)).record["layers"]
    assert {layer["activation"] for layer in layers.values()} == {"static per-tensor", "dynamic per-token"}
    assert {layer["group_size"] for layer in layers.values()} == {128, 32}
    assert any(layer["range_before"] <= 15 for layer in layers.values())
    assert any(15 < layer["range_before"] < 150 and layer["equalized_by"] for layer in layers.values())
    assert any(layer["range_before"] >= 150 for layer in layers.values())
    assert SKIPPED not in layers
    static = Checkpoint.open(make_checkpoint(ALL_STATIC)).record["layers"]
    assert {layer["activation"] for layer in static.values()} == {"static per-tensor"}
    assert any("down_proj" in name and layer["equalized_by"] for name, layer in static.items())


@pytest.mark.parametrize(
    "recipe", [MIXED, ALL_STATIC, WEIGHT_ONLY, INT8_STATIC, BY_ROWS, FP8], ids=lambda recipe: recipe.name
)
def test_the_stock_model_holds_exactly_our_numbers(make_checkpoint: Callable[[Recipe], Path], recipe: Recipe) -> None:
    """A code has 4 bits and a scale 8, so their product is exact in float32: equal, not close."""
    checkpoint = Checkpoint.open(make_checkpoint(recipe))
    stock = load_stock(checkpoint.folder)
    logits(stock)  # decompresses
    for name, scheme in checkpoint.schemes.items():
        layer, linear = stock.get_submodule(name), checkpoint.read_linear(name)
        assert layer.weight.dtype == torch.float32
        np.testing.assert_array_equal(layer.weight.numpy(), numerics.dequantize_weight(linear.codes, linear.scales))
        if scheme.activation is Activation.STATIC:
            assert layer.input_scale.tolist() == [linear.input_scale]
        else:
            assert not hasattr(layer, "input_scale")
    scales = {
        f"model.layers.{index}.self_attn": KVScales(block.self_attn.k_scale.item(), block.self_attn.v_scale.item())
        for index, block in enumerate(stock.model.layers)
        if hasattr(block.self_attn, "k_scale")
    }
    assert scales == checkpoint.cache_scales()
    state = stock.state_dict()
    for name in checkpoint.float_tensors():
        np.testing.assert_array_equal(state[name].numpy(), checkpoint.read(name).astype(np.float32), err_msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_the_same_numbers_in_half_precision(
    make_checkpoint: Callable[[Recipe], Path], dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(MIXED))
    stock = load_stock(checkpoint.folder, dtype)
    for name in checkpoint.schemes:
        layer, linear = stock.get_submodule(name), checkpoint.read_linear(name)
        assert layer.weight_scale.dtype == dtype
        np.testing.assert_array_equal(layer.weight_scale.detach().float().numpy(), linear.scales)
        if linear.input_scale is not None:
            assert layer.input_scale.item() == linear.input_scale


def test_stock_loading_quantizes_inputs_and_the_cache(make_checkpoint: Callable[[Recipe], Path]) -> None:
    """Each switched off by compressed-tensors' own flag: both change the logits, and nothing but them remains.

    What remains is weights alone; ours, with inputs in float and without the int8 cache, computes the same.
    """
    folder = make_checkpoint(MIXED)
    stock = load_stock(folder)
    everything = logits(stock)
    for block in stock.model.layers:
        block.self_attn.quantization_enabled = False
    without_cache = logits(stock)
    for module in stock.modules():
        module.quantization_enabled = False
    weights_only = logits(stock)
    ours, _ = load(folder)
    for module in ours.modules():
        if isinstance(module, W4A8Linear):
            module.activation = Activation.NONE
    assert rms(everything - without_cache) > 0.01 * rms(everything)
    assert rms(without_cache - weights_only) > 0.01 * rms(everything)
    assert difference(logits(ours), weights_only) < TOLERANCE


def test_the_page_on_the_format_names_every_field(make_checkpoint: Callable[[Recipe], Path]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    record = Checkpoint.open(make_checkpoint(MIXED)).record
    fields = {*record, *record["recipe"], *record["calibration"], *record["model"]}
    for entries in (record["layers"], record["cache"], record["files"]):
        fields.update(*entries.values())
    assert {field for field in fields if f"`{field}`" not in page} == set()
    statistics = np.load(make_checkpoint(MIXED) / STATISTICS_FILE)
    kinds = {name.rpartition(".")[2] for name in statistics}
    assert kinds == set(re.findall(r"`B\.(?:L\.)?(\w+)`", page))


# --- the same logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [ALL_STATIC, INT8_STATIC, BY_ROWS, SIGNED, FP8], ids=lambda recipe: recipe.name)
def test_a_static_checkpoint_gives_our_logits(make_checkpoint: Callable[[Recipe], Path], recipe: Recipe) -> None:
    folder = make_checkpoint(recipe)
    largest, differences = largest_difference(folder, load_stock(folder))
    assert largest < TOLERANCE, differences
    assert len(differences) == 2 * 7 + 2 * 2 + 1


def test_a_mixed_checkpoint_gives_our_logits_but_for_the_divisor(
    make_checkpoint: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 127, only those points differ that a dynamic layer's output reaches; with 127.5, everything agrees.

    The first dynamic layer is block 0's down_proj: it reaches the residual stream, so all inputs of block 1 that are
    normed from it. Keys, values and attention's output of block 1 come from static layers, whose inputs are replaced.
    """
    folder = make_checkpoint(MIXED)
    stock = load_stock(folder)
    _, differences = largest_difference(folder, stock)
    block = "model.layers.1"
    reached = {f"{block}.self_attn.{layer}_proj" for layer in "qkv"} | {
        f"{block}.mlp.{layer}_proj" for layer in ("gate", "up", "down")
    }
    assert {name for name, value in differences.items() if value > TOLERANCE} == {*reached, "logits"}
    assert min(differences[name] for name in reached) > 10 * TOLERANCE
    monkeypatch.setattr(numerics, "quantize_dynamic", quantize_dynamic_by_127_5)
    monkeypatch.setattr("fptq.integrations.transformers.shared_kernels", lambda: Kernels(target="reference"))
    largest, differences = largest_difference(folder, stock)
    assert largest < TOLERANCE, differences


def test_weights_alone_give_our_logits(make_checkpoint: Callable[[Recipe], Path]) -> None:
    folder = make_checkpoint(WEIGHT_ONLY)
    ours, _ = load(folder)
    assert new_cache(ours) is None
    assert difference(logits(ours), logits(load_stock(folder))) < TOLERANCE


@pytest.mark.parametrize(("recipe", "share"), [(ALL_STATIC, 0.1), (MIXED, 1.0)], ids=["static", "mixed"])
def test_running_freely_the_logits_stay_close(
    make_checkpoint: Callable[[Recipe], Path], recipe: Recipe, share: float
) -> None:
    """Without lockstep: how far the stock model is from ours, against how far quantizing inputs and cache moves it.

    Static: of 77 thousand codes a few lie so near a tie that they differ, by a step each, where a rounding error is in
    every code; the difference is far below a tenth. Mixed: the dynamic layers, 4 of 13, round every code by another
    scale. Two such roundings are sqrt(2) times as far from each other as each is from the truth, but in 4 layers only.
    """
    folder = make_checkpoint(recipe)
    ours, _ = load(folder)
    stock = load_stock(folder)
    quantized = logits(stock)
    found = logits(ours, new_cache(ours))
    for module in stock.modules():
        module.quantization_enabled = False
    assert rms(found - quantized) < share * rms(quantized - logits(stock))


# --- planted faults ---------------------------------------------------------------------------------------------------

GATE = "model.layers.0.mlp.gate_proj"
ATTENTION = "model.layers.1.self_attn"


def double(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name] = (tensors[name].astype(np.float32) * 2).astype(tensors[name].dtype)


def move_one_code(tensors: dict[str, np.ndarray], name: str) -> None:
    codes = numerics.unpack_int4(tensors[name])
    codes[3, 5] += 1 if codes[3, 5] < 7 else -1
    tensors[name] = numerics.pack_int4(codes)


def swap_nibbles(tensors: dict[str, np.ndarray], name: str) -> None:
    codes = numerics.unpack_int4(tensors[name])
    tensors[name] = numerics.pack_int4(codes.reshape(codes.shape[0], -1, 2)[..., ::-1].reshape(codes.shape))


def change_one_group(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name][0, 0] *= 1 + 2**-7  # one or two bfloat16 further


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (double, f"{GATE}.input_scale"),
        (double, f"{ATTENTION}.k_scale"),
        (double, f"{ATTENTION}.v_scale"),
        (move_one_code, f"{GATE}.weight_packed"),
        (swap_nibbles, f"{ATTENTION}.o_proj.weight_packed"),
        (change_one_group, f"{GATE}.weight_scale"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_shows(
    make_checkpoint: Callable[[Recipe], Path],
    tmp_path: Path,
    fault: Callable[[dict[str, np.ndarray], str], None],
    name: str,
) -> None:
    """The stock model gets a folder with one fault; the lockstep finds it at the next point or behind, far off."""
    folder = make_checkpoint(ALL_STATIC)
    shard = folder / "model.safetensors"
    tensors = {key: read_tensor(shard, entry) for key, entry in read_header(shard, AssertionError).items()}
    fault(tensors, name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_shard(tmp_path / "model.safetensors", tensors)
    largest, _ = largest_difference(folder, load_stock(tmp_path))
    assert largest > 10 * TOLERANCE


def test_a_cache_left_in_float_shows(make_checkpoint: Callable[[Recipe], Path]) -> None:
    folder = make_checkpoint(ALL_STATIC)
    stock = load_stock(folder)
    for block in stock.model.layers:
        block.self_attn.quantization_enabled = False
    assert largest_difference(folder, stock)[0] > 10 * TOLERANCE


# --- an int8 head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama", "gemma3", "opt", "bloom", "llama-bias-untied", "gpt_neox"])
def test_stock_loading_of_an_int8_head(
    variant: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds a tied head's codes under the embedding's name, and both weights are exactly ours in float32.

    In bfloat16 they are the nearest that there is. The logits agree as above, with compressed-tensors' divisor.
    transformers computes Gemma's scale of embeddings anew, and says that it isn't in the file.
    """
    tied = {"tie_word_embeddings": True} if variant == "llama" else {}
    model = save_tiny(tmp_path / "model", variant, spread=0.5, **tied)
    recipe = Recipe("static", group_size=32, v0=1e9, v1=1e10, lm_head="int8")
    spec = CalibrationSpec("random", samples=4, length=24)
    folder = quantize(str(model), tmp_path / "q", recipe, spec, Options(progress=False))
    float_cache = variant in FLOAT_CACHE_VARIANTS
    missing = "model.embed_tokens.embed_scale" if variant == "gemma3" else None
    stock = load_stock(folder, dtype, without_cache_scales=float_cache, missing=missing)
    ids = tiny_ids(2, 16)
    with torch.no_grad():
        expected = stock(ids).logits
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied_head == (variant not in ("llama-bias-untied", "gpt_neox"))
    head = checkpoint.read_linear("lm_head")
    weight = torch.from_numpy(head.codes * head.scales).to(dtype)
    layers = [stock.get_output_embeddings()] + [stock.get_input_embeddings()] * checkpoint.tied_head
    assert all(torch.equal(layer.weight, weight) for layer in layers)
    if dtype is not torch.float32:
        return
    monkeypatch.setattr(numerics, "quantize_dynamic", quantize_dynamic_by_127_5)
    monkeypatch.setattr("fptq.integrations.transformers.shared_kernels", lambda: Kernels(target="reference"))
    ours, _ = load(folder)
    cache = None if float_cache else new_cache(ours)
    with torch.no_grad():
        found = ours(ids, past_key_values=cache, use_cache=cache is not None).logits
    apart = (found - expected).abs() / expected.abs().max()
    assert float(apart.median()) <= TOLERANCE
    assert float(apart.max()) <= 0.1


def test_an_int8_head_gives_our_logits(
    make_checkpoint: Callable[[Recipe], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lockstep, with compressed-tensors' divisor; with ours only the logits differ, and with the float head far."""
    folder = make_checkpoint(replace(ALL_STATIC, lm_head="int8"))
    stock = load_stock(folder)
    _, differences = largest_difference(folder, stock)
    assert {name for name, value in differences.items() if value > TOLERANCE} == {"logits"}
    assert 10 * TOLERANCE < differences["logits"] < 0.01
    monkeypatch.setattr(numerics, "quantize_dynamic", quantize_dynamic_by_127_5)
    monkeypatch.setattr("fptq.integrations.transformers.shared_kernels", lambda: Kernels(target="reference"))
    largest, differences = largest_difference(folder, stock)
    assert largest < TOLERANCE, differences
    assert largest_difference(make_checkpoint(ALL_STATIC), stock)[0] > 10 * TOLERANCE


STOCK_VARIANTS = ["llama-bias-untied", "mistral-sliding", "qwen3", "gemma2", "gemma3", "phi3", "glm4", "opt"]
FLOAT_CACHE_VARIANTS = ["bloom", "gpt_neox"]


@pytest.mark.parametrize("variant", STOCK_VARIANTS + FLOAT_CACHE_VARIANTS)
def test_stock_loading_of_other_architectures(variant: str, tmp_path: Path) -> None:
    """With static inputs everywhere. compressed-tensors 0.20 leaves the cache of BLOOM and GPT-NeoX in float.

    A code that flips at a tie moves a few logits by a step; a layer that is read wrongly moves all of them.
    """
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    recipe = Recipe("static", group_size=32, v0=1e9, v1=1e10)
    spec = CalibrationSpec("random", samples=4, length=24)
    folder = quantize(str(model), tmp_path / "q", recipe, spec, Options(progress=False))
    ids = tiny_ids(2, 16)
    ours, _ = load(folder)
    float_cache = variant in FLOAT_CACHE_VARIANTS
    with torch.no_grad():
        cache = None if float_cache else new_cache(ours)
        found = ours(ids, past_key_values=cache, use_cache=cache is not None).logits
        expected = load_stock(folder, without_cache_scales=float_cache)(ids).logits
    apart = (found - expected).abs() / expected.abs().max()
    assert float(apart.median()) <= TOLERANCE
    assert float(apart.max()) <= 0.1
