"""Checkpoints as transformers models: the linears, the int8 cache, generation, and what doesn't fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, pipeline

from fptq import numerics
from fptq.checkpoint import Checkpoint, KVScales, seal
from fptq.errors import CheckpointError, GenerationError, OutputError
from fptq.evaluate.fidelity import ScoredModel
from fptq.integrations.torch_ops import shared_kernels
from fptq.integrations.transformers import (
    Int8CacheLayer,
    Int8SlidingCacheLayer,
    W4A8Linear,
    generate,
    load,
    new_cache,
)
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.runtime.kernels import Kernels
from tiny import save_tiny, token_ids
from tokens import save_tokenizer

RANDOM = CalibrationSpec("random", samples=4, length=24)


def checkpoint_of(folder: Path, variant: str, recipe: str = "fptq", lm_head: str = "float", **changes: object) -> Path:
    model = save_tiny(folder / "model", variant, **changes)
    save_tokenizer(model, chat=True)
    wanted = get_recipe(recipe, group_size=32, lm_head=lm_head)
    return quantize(str(model), folder / "q", wanted, RANDOM, Options(progress=False))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("llama"), "llama-bias-untied", spread=0.5)


def test_linears_compute_the_reference_on_the_files_integers(llama: Path) -> None:
    model, _ = load(llama)
    checkpoint = Checkpoint.open(llama)
    x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    for name in checkpoint.schemes:
        layer = model.get_submodule(name)
        assert isinstance(layer, W4A8Linear)
        linear = checkpoint.read_linear(name)
        inputs = np.resize(x, (2, 5, linear.codes.shape[1]))
        wanted = numerics.w4a8_linear(
            inputs.reshape(10, -1),
            numerics.group_codes(linear.codes, 32),
            linear.scales.T,
            linear.activation,
            linear.input_scale,
            checkpoint.read(f"{name}.bias").astype(np.float32),
        )
        got = layer(torch.from_numpy(inputs)).numpy().reshape(10, -1)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_every_tensor_is_in_float32_memory_and_none_on_meta(llama: Path) -> None:
    model, _ = load(llama)
    assert all(not t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("variant", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("llama-bias-untied", {}), ("gemma3", {}), ("gpt_neox", {})],
)
def test_an_int8_head_computes_with_the_files_integers(
    variant: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """The head's bound is numerics.w4a8_matmul's; an embedding is a product of 8 bits with 8, which is exact."""
    folder = checkpoint_of(tmp_path, variant, lm_head="int8", spread=0.5, **changes)
    model, tokenizer = load(folder)
    checkpoint = Checkpoint.open(folder)
    head = model.get_output_embeddings()
    assert isinstance(head, W4A8Linear)
    assert (head.bits, head.group_size, head.kernel) == (8, 64, shared_kernels().target)
    linear = checkpoint.read_linear("lm_head")
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(4))
    codes, scale = numerics.quantize_dynamic(x.numpy().reshape(15, 64))
    integers = codes.astype(np.int64) @ linear.codes.T.astype(np.int64)
    wanted = integers * scale.astype(np.float64) * linear.scales.T
    assert (np.abs(head(x).numpy().reshape(15, -1) - wanted) <= 5 * 2.0**-24 * np.abs(wanted)).all()
    np.testing.assert_array_equal(ScoredModel(model).log_probabilities(x[0]), torch.log_softmax(head(x[0]), -1))

    embedding = model.get_input_embeddings()
    ids = token_ids(1, 160)
    if checkpoint.tied_head:
        factor = 8.0 if variant == "gemma3" else 1.0
        np.testing.assert_array_equal(embedding(ids)[0], (linear.codes * linear.scales * factor)[ids[0]])
    with torch.no_grad():
        before = model(ids).logits
        model.tie_weights()
        assert torch.equal(model(ids).logits, before)
    assert all(not t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert generate(model, tokenizer, "w3 w4", max_new_tokens=4).strip()


def test_an_int8_head_runs_by_the_reference_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_of(tmp_path, "llama", lm_head="int8", spread=0.5, tie_word_embeddings=True)
    head = load(folder)[0].lm_head
    monkeypatch.setattr("fptq.integrations.transformers.shared_kernels", lambda: Kernels(target="reference"))
    slow = load(folder)[0].lm_head
    assert slow.kernel == "reference"
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(head(x), slow(x), rtol=1e-6, atol=0)


def test_a_config_that_ties_otherwise_than_the_int8_head_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path, "llama", lm_head="int8")
    rewrite_config(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"layer 'lm_head' is \[160, 64\], the config makes it \[\]"):
        load(folder)


@pytest.mark.parametrize("variant", ["llama", "mistral-sliding", "gemma3", "bloom", "opt", "falcon-40b", "gpt_neox"])
def test_decoding_token_by_token_equals_prefill(variant: str, tmp_path: Path) -> None:
    """Codes enter the cache once and are read back the same, also behind a sliding window."""
    model, _ = load(checkpoint_of(tmp_path, variant, spread=0.5))
    ids = token_ids(2, 20)
    whole = new_cache(model)
    assert whole is not None
    with torch.no_grad():
        at_once = model(ids, past_key_values=whole, use_cache=True).logits
        cache = new_cache(model)
        one_by_one = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(20)]
    assert cache.layers[0].keys.dtype is torch.int8
    got = torch.cat(one_by_one, dim=1)
    # Both compute the same numbers up to float32 rounding in attention, which can move a value over a rounding
    # boundary of the next layer's activations: then one code differs by one step, 1/127 of that layer's range.
    assert float((got - at_once).abs().median()) <= 1e-5 * float(at_once.abs().max())
    assert float((got - at_once).abs().max()) <= 0.05 * float(at_once.abs().max())


def test_cache_really_rounds_to_its_steps() -> None:
    layer = Int8CacheLayer(KVScales(0.1, 0.2))
    states = torch.tensor([[[[0.04, 0.16, 99.0]]]])
    keys, values = layer.update(states, states)
    torch.testing.assert_close(keys, torch.tensor([[[[0.0, 0.2, 12.7]]]]))
    torch.testing.assert_close(values, torch.tensor([[[[0.0, 0.2, 25.4]]]]))
    assert layer.keys.dtype is layer.values.dtype is torch.int8
    keys, _ = layer.update(states, states)
    assert keys.shape == (1, 1, 2, 3)


def test_sliding_layers_keep_their_window_only(tmp_path: Path) -> None:
    model, _ = load(checkpoint_of(tmp_path, "mistral-sliding"))
    cache = new_cache(model)
    with torch.no_grad():
        model(token_ids(1, 20), past_key_values=cache, use_cache=True)
    assert isinstance(cache.layers[0], Int8SlidingCacheLayer)
    assert cache.layers[0].keys.shape[2] == 7


def test_weight_only_checkpoints_keep_a_float_cache(tmp_path: Path) -> None:
    model, _ = load(checkpoint_of(tmp_path, "llama", "rtn-w4a16"))
    assert new_cache(model) is None


def test_greedy_text_is_repeatable_and_streamed(llama: Path) -> None:
    model, tokenizer = load(llama)
    pieces: list[str] = []
    text = generate(model, tokenizer, "w3 w4 w5", max_new_tokens=8, on_text=pieces.append)
    assert text == generate(model, tokenizer, "w3 w4 w5", max_new_tokens=8)
    assert "".join(pieces).split() == text.split()
    assert text.strip()


def test_sampling_obeys_its_seed(llama: Path) -> None:
    model, tokenizer = load(llama)
    first, again, other = (
        generate(model, tokenizer, "w3 w4", max_new_tokens=12, temperature=2.0, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other
    assert first != generate(model, tokenizer, "w3 w4", max_new_tokens=12, temperature=2.0, top_p=1e-6, seed=1)


def test_chat_uses_the_template(llama: Path) -> None:
    model, tokenizer = load(llama)
    prompt = tokenizer("w1 w9 w2", add_special_tokens=False, return_tensors="pt")  # the template has no <bos>
    output = model.generate(**prompt, max_new_tokens=6, do_sample=False, past_key_values=new_cache(model))
    wanted = tokenizer.decode(output[0, 3:], skip_special_tokens=True)
    assert generate(model, tokenizer, "w9", chat=True, max_new_tokens=6) == wanted
    tokenizer.chat_template = None
    with pytest.raises(GenerationError, match="no chat template"):
        generate(model, tokenizer, "w9", chat=True)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 300}]
)
def test_impossible_options_are_refused(llama: Path, options: dict[str, float]) -> None:
    model, tokenizer = load(llama)
    with pytest.raises(GenerationError):
        generate(model, tokenizer, "w1", **options)


def rewrite_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_config_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "q")
    rewrite_config(folder, intermediate_size=128)
    with pytest.raises(CheckpointError, match="the config makes it"):
        load(folder)
    rewrite_config(folder, intermediate_size=96, vocab_size=200)
    with pytest.raises(CheckpointError, match=r"'(lm_head|model\.embed_tokens)\.weight' is \[160, 64\]"):
        load(folder)
    rewrite_config(folder, vocab_size=160, attention_bias=False)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias|k_proj\.bias"):
        load(folder)
    rewrite_config(folder, attention_bias=True, num_hidden_layers=1)
    with pytest.raises(CheckpointError):
        load(folder)


def test_foreign_checkpoint_without_our_record_loads(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "q")
    (folder / "fptq.json").unlink()
    (folder / "fptq_statistics.npz").unlink()
    with torch.no_grad():
        ours, theirs = (load(f)[0](token_ids(1, 8)).logits for f in (llama, folder))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_record_without_a_layer_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "q")
    record = json.loads((folder / "fptq.json").read_text())
    record["layers"].popitem()
    (folder / "fptq.json").write_text(json.dumps(seal(record)))
    with pytest.raises(CheckpointError, match="disagree about layer"):
        load(folder)


# ---- what is built on generate


def tokens_of(model: torch.nn.Module, ids: torch.Tensor, **options: object) -> list[int]:
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


@pytest.mark.parametrize("variant", ["llama", "mistral-sliding", "gemma3"])
def test_generate_makes_an_int8_cache_of_every_kind(variant: str, tmp_path: Path) -> None:
    model, _ = load(checkpoint_of(tmp_path, variant, spread=0.5))
    ids = token_ids(1, 12)
    wanted = tokens_of(model, ids, past_key_values=new_cache(model))
    result = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    assert result.sequences[0].tolist() == wanted
    assert {layer.keys.dtype for layer in result.past_key_values.layers} == {torch.int8}
    assert tokens_of(model, ids, cache_implementation="static") == wanted
    assert tokens_of(model, ids, cache_implementation="static") == wanted  # transformers keeps a static cache
    assert tokens_of(model, ids, past_key_values=new_cache(model, max_length=32)) == wanted
    assert tokens_of(model, ids, assistant_model=model) == wanted
    assert tokens_of(model, ids, prompt_lookup_num_tokens=3) == wanted
    plain = DynamicCache()  # it has no layers yet
    tokens_of(model, ids, past_key_values=plain)
    assert {layer.keys.dtype for layer in plain.layers} == {torch.int8}


def test_a_float_cache_is_there_for_who_wants_it(llama: Path) -> None:
    model, _ = load(llama, float_cache=True)
    assert new_cache(model) is None
    result = model.generate(token_ids(1, 5), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert result.past_key_values.layers[0].keys.dtype is torch.float32


def test_a_pipeline_writes_the_same(llama: Path) -> None:
    model, tokenizer = load(llama)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = writer("w3 w4 w5", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text.split() == generate(model, tokenizer, "w3 w4 w5", max_new_tokens=8).split()


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_compiled_with_a_static_int8_cache(variant: str, tmp_path: Path) -> None:
    model, _ = load(checkpoint_of(tmp_path, variant, spread=0.5))
    ids = token_ids(1, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    caches = [new_cache(model, max_length=32), new_cache(model, max_length=32)]
    with torch.no_grad():
        for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:11]):
            wanted = model(part, past_key_values=caches[0]).logits
            got = compiled(part, past_key_values=caches[1]).logits
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert caches[1].layers[0].keys.dtype is torch.int8


def test_scales_stay_float32_in_a_bfloat16_model(llama: Path) -> None:
    model, _ = load(llama, dtype=torch.bfloat16)
    cast = load(llama)[0].to(torch.bfloat16)
    exact = load(llama)[0]
    for name in Checkpoint.open(llama).schemes:
        wanted = exact.get_submodule(name)
        for layer in (model.get_submodule(name), cast.get_submodule(name)):
            assert torch.equal(layer.packed, wanted.packed)
            assert torch.equal(layer.bias, wanted.bias)
            assert layer.input_scale == wanted.input_scale
            x = torch.randn(3, layer.in_features).bfloat16()
            assert torch.equal(layer(x), wanted(x.float()).bfloat16())
    assert model.model.norm.weight.dtype is torch.bfloat16
    with torch.no_grad():
        wanted, got = exact(token_ids()).logits, model(token_ids()).logits
    assert got.dtype is torch.bfloat16
    assert float((got - wanted).abs().median()) < 0.05 * float(wanted.abs().max())
    assert tokens_of(model, token_ids(1, 4))


def test_memory_is_that_of_int4(llama: Path) -> None:
    model, _ = load(llama)
    layers = [module for module in model.modules() if isinstance(module, W4A8Linear)]
    stored = sum(layer.packed.nbytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert 8 * stored / weights < 6  # groups of 32, and rows padded to the kernel's tile
    assert not any(isinstance(module, torch.nn.Linear) for module in model.model.modules())


def test_what_a_loaded_model_cant_do_is_said(llama: Path, tmp_path: Path) -> None:
    model, _ = load(llama)
    with pytest.raises(OutputError, match="copy its folder"):
        model.save_pretrained(tmp_path / "copy")
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"W4A8Linear\(.*\) is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
