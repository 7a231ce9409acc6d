"""Quantizing the head, and an embedding tied to it, to int8."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq.checkpoint import Checkpoint
from fptq.errors import OutputError, QuantizationError
from fptq.evaluate.fidelity import ScoredModel, score_windows
from fptq.integrations.transformers import load, new_cache
from fptq.presets import get_recipe
from fptq.quantize import quantize, rounding
from fptq.recipe import Activation
from quantizing import QUIET, RANDOM, SMALL_GROUPS, KilledError, files, spoil_weight
from tiny import VARIANTS, save_tiny, token_ids

INT8_HEAD = get_recipe("fptq", group_size=32, lm_head="int8")


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64, with ml_dtypes' rounding to bfloat16."""
    absmax = np.abs(weight).max(axis=1, keepdims=True)
    scales = (absmax / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float64)
    scales[absmax == 0] = 1
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


@pytest.mark.parametrize(
    ("variant", "embedding", "changes"),
    [
        ("llama", "model.embed_tokens", {"tie_word_embeddings": True}),
        ("llama-bias-untied", "model.embed_tokens", {}),
        ("gemma3", "model.embed_tokens", {}),
        ("gpt_neox", "gpt_neox.embed_in", {}),
        ("bloom", "transformer.word_embeddings", {}),
    ],
)
@pytest.mark.parametrize("recipe", ["fptq", "rtn-w4a16"])
def test_an_int8_head_is_the_rounded_weight(
    variant: str, embedding: str, changes: dict[str, object], recipe: str, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", variant, dtype=torch.bfloat16, **changes)
    weights = load_file(model / "model.safetensors")
    name = next((n for n in ("lm_head.weight", "embed_out.weight") if n in weights), None)
    weight = weights[name or f"{embedding}.weight"]
    weight[7] = 0  # a row without a scale of its own
    weight[9, :3] = torch.tensor([2.5, -300, 300])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    wanted = get_recipe(recipe, group_size=32, lm_head="int8")
    folder = quantize(str(model), tmp_path / "q", wanted, RANDOM, QUIET)
    in_float = quantize(str(model), tmp_path / "f", get_recipe(recipe, group_size=32), RANDOM, QUIET)

    checkpoint, other = Checkpoint.open(folder), Checkpoint.open(in_float)
    assert list(checkpoint.verify())
    codes, scales = int8_rows(weight.float().numpy())
    layers = ["lm_head"] if name else ["lm_head", embedding]
    assert checkpoint.tied_head == (name is None)
    assert {n: s.bits for n, s in checkpoint.schemes.items() if n not in other.schemes} == dict.fromkeys(layers, 8)
    dynamic = Activation.DYNAMIC if wanted.quantizes_activations else Activation.NONE
    for layer, activation in zip(layers, [dynamic, Activation.NONE], strict=False):
        linear = checkpoint.read_linear(layer)
        np.testing.assert_array_equal(linear.codes, codes)
        np.testing.assert_array_equal(linear.scales, scales)
        assert (linear.activation, linear.bits) == (activation, 8)
        entry = checkpoint.record["layers"][layer]
        assert (entry["shape"], entry["range_before"], entry["group_size"]) == ([160, 64], None, None)
        assert entry["activation"] == activation.value
        assert entry.keys() == checkpoint.record["layers"][next(iter(other.schemes))].keys()
    assert "lm_head" not in checkpoint.config["quantization_config"]["ignore"]
    assert "lm_head" in other.config["quantization_config"]["ignore"]

    # codes of one byte for bfloat16's two, and two bytes for each name of each row's scale
    def stored(c: Checkpoint) -> int:
        return sum(entry.stop - entry.start for _, entry in c.tensors.values())

    assert stored(other) - stored(checkpoint) == 160 * 64 - 2 * 160 * len(layers)
    same = set(other.tensors) - {"lm_head.weight", f"{embedding}.weight"}
    assert all(other.read(n).tobytes() == checkpoint.read(n).tobytes() for n in same)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_int8_head_changes_little(variant: str, tmp_path: Path) -> None:
    """Against the same checkpoint with a float head.

    The divergence grows with the square of the noise. A head of 4 bits gives 0.003 to 0.07 here, 8 bits 16 times as
    fine should give a 256th: below 0.0003. An int8 embedding also moves codes of all blocks over their ties.
    """
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    models = {}
    for name, recipe in [("reference", SMALL_GROUPS), ("int8", INT8_HEAD)]:
        quantized, _ = load(quantize(str(model), tmp_path / name, recipe, RANDOM, QUIET))
        models[name] = ScoredModel(quantized, lambda quantized=quantized: new_cache(quantized))
    scores = score_windows(models, token_ids(), progress=False)
    tied = Checkpoint.open(tmp_path / "int8").tied_head
    assert 0 < scores["int8"]["kl_divergence"].value < (0.01 if tied else 0.0003)


def test_a_head_is_rounded_by_slabs_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    whole = quantize(str(model), tmp_path / "whole", INT8_HEAD, RANDOM, QUIET)
    sizes = []
    original = rounding._check_size

    def counted(name: str, weight: torch.Tensor) -> None:
        if name == "model.embed_tokens":
            sizes.append(tuple(weight.shape))
        original(name, weight)

    monkeypatch.setattr(rounding, "_check_size", counted)
    monkeypatch.setattr(rounding, "_SLAB_WEIGHTS", 64 * 48 + 63)
    by_slabs = quantize(str(model), tmp_path / "slabs", INT8_HEAD, RANDOM, QUIET)
    assert sizes == [(48, 64), (48, 64), (48, 64), (16, 64)]
    assert files(by_slabs) == files(whole)


@pytest.mark.parametrize("where", ["head", "journal", "merge"])
def test_interrupted_with_an_int8_head_and_resumed_is_bit_identical(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    whole = quantize(str(model), tmp_path / "whole", INT8_HEAD, RANDOM, QUIET)

    def dying(*_: object, **__: object) -> None:
        raise KilledError

    place = {
        "head": "fptq.checkpoint.writer.write_shard",
        "journal": "fptq.quantize.walk.CalibrationWalk.observe",
        "merge": "fptq.checkpoint.writer.merge_shards",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, dying)
        with pytest.raises(KilledError):
            quantize(str(model), tmp_path / "q", INT8_HEAD, RANDOM, QUIET)
    with pytest.raises(OutputError, match="another recipe"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert files(quantize(str(model), tmp_path / "q", INT8_HEAD, RANDOM, QUIET)) == files(whole)


def test_a_head_too_large_for_a_scale_is_refused(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    spoil_weight(model, "lm_head.weight", 1e37)
    with pytest.raises(QuantizationError, match="lm_head: its weights are too large"):
        quantize(str(model), tmp_path / "q", INT8_HEAD, RANDOM, QUIET)
