"""What the engine refuses, and what it says."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fptq.errors import CheckpointError, EngineError, GenerationError, KernelError, UnsupportedModelError
from fptq.presets import get_recipe
from fptq.runtime.engine import Engine
from quantizing import checkpoint_of, make
from tiny import ENGINE_REFUSES, save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.generate([]), GenerationError, "the prompt is empty"),
        (lambda e: e.logits([]), GenerationError, "the prompt is empty"),
        (lambda e: e.generate([160]), GenerationError, "from 160 to 160: needed integers from 0 to 159"),
        (lambda e: e.logits([-1]), GenerationError, "needed integers from 0"),
        (lambda e: e.generate([0.5]), GenerationError, "needed integers"),
        (lambda e: e.generate([1] * 256), GenerationError, "256 tokens, the context 256: shorten the prompt"),
        (lambda e: e.logits([1] * 257), EngineError, "257 tokens don't fit the context of 256"),
        (lambda e: e.generate([1], max_new_tokens=0), GenerationError, "max_new_tokens 0"),
        (lambda e: e.generate([1], log_probabilities=-1), GenerationError, "log_probabilities -1"),
        (lambda e: e.generate_batch([[1]], concurrent=0), GenerationError, "0 texts at a time"),
        (lambda e: e.generate("text"), GenerationError, "needed integers in a row"),
        (lambda e: e.generate([[1, 2]]), GenerationError, "needed integers in a row"),
        (lambda e: e.forward([(e.sequence(), [1, 2])], last=[3]), EngineError, "from 0 to its new tokens"),
        (lambda e: e.forward([(e.sequence(), [1, 2])], last=[1, 1]), EngineError, "for each of 1 sequences"),
        (lambda e: e.sequence().truncate(-1), EngineError, "can't be cut to -1 tokens"),
        (lambda e: (lambda s: e.forward([(s, [1]), (s, [2])]))(e.sequence()), EngineError, "twice"),
    ],
)
def test_mistakes_are_explained(llama: Path, call: object, error: type, message: str) -> None:
    with Engine.open(llama, threads=1) as engine:
        with pytest.raises(error, match=message):
            call(engine)
        assert engine.logits([1, 2]).shape == (2, 160)
        assert engine.cache.free_tokens == engine.cache.tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, KernelError, "0 threads"),
        ({"context": 0}, EngineError, "context 0"),
        ({"context": 257}, EngineError, "at most 256"),
        ({"sequences": 0}, EngineError, "sequences 0"),
    ],
)
def test_openings_that_cannot_be(llama: Path, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Engine.open(llama, **options)


@pytest.mark.parametrize("variant", ENGINE_REFUSES)
def test_what_the_engine_does_not_run_it_names(variant: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the engine doesn't run .*--runtime transformers"):
        Engine.open(checkpoint_of(tmp_path, variant))


def test_weight_only_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = make(save_tiny(tmp_path / "model"), get_recipe("rtn-w4a16", group_size=32), tmp_path / "q").folder
    with pytest.raises(UnsupportedModelError, match="a KV cache in float"):
        Engine.open(folder)


def edited(folder: Path, tmp_path: Path, **values: object) -> Path:
    """Return a copy of a checkpoint with other values in config.json."""
    import json

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    return copy


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"hidden_act": "mish"}, UnsupportedModelError, "activation 'mish'"),
        ({"model_type": "mamba"}, UnsupportedModelError, "architecture 'mamba'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, UnsupportedModelError, "type 'spiral'"),
        ({"intermediate_size": 128}, CheckpointError, r"is \[96, 64\], the config makes it \[128, 64\]"),
        ({"num_hidden_layers": 1}, CheckpointError, "has no place in the model"),
        ({"num_hidden_layers": 3}, CheckpointError, "has no KV cache scales"),
        ({"hidden_size": "wide"}, CheckpointError, "a value of architecture 'llama' is missing or wrong"),
        ({"vocab_size": 161}, CheckpointError, r"the config makes it \[161, 64\]"),
        ({"num_key_value_heads": 3}, CheckpointError, "4 query heads over 3 key/value heads"),
        ({**LINEAR, "partial_rotary_factor": 1.5}, CheckpointError, "24 of a head's 16 channels to rotate"),
        ({**LINEAR, "partial_rotary_factor": 0.2}, CheckpointError, "3 of a head's 16 channels to rotate"),
        ({"rope_parameters": {"rope_type": "llama3"}}, CheckpointError, "rotary type 'llama3' is missing or wrong"),
        ({"rope_parameters": [1]}, CheckpointError, "missing or wrong"),
        ({"tie_word_embeddings": True}, CheckpointError, "'lm_head.weight' has no place in the model"),
    ],
)
def test_configs_that_do_not_fit(llama: Path, tmp_path: Path, values: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Engine.open(edited(llama, tmp_path, **values))


def test_sequences_stay_with_their_engine(llama: Path) -> None:
    with Engine.open(llama, threads=1) as one, Engine.open(llama, threads=1, context=64) as other:
        with pytest.raises(EngineError, match="belongs to another engine"):
            other.forward([(one.sequence(), [1])])
        kept = one.sequence()
        one.forward([(kept, [1, 2, 3])])
        with pytest.raises(GenerationError, match="has 3 tokens, the prompt 3: nothing new"):
            one.generate([1, 2, 3], sequence=kept)


@pytest.mark.parametrize("target", ["native", "reference"])
@pytest.mark.parametrize("where", ["key bias", "output head"])
def test_no_number_goes_unnoticed(where: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where keys become codes nor where a product stays in float."""
    if target == "reference":
        monkeypatch.setenv("FPTQ_KERNEL", "reference")
    with Engine.open(checkpoint_of(tmp_path, "llama-bias-untied"), threads=1) as engine:
        if where == "key bias":
            engine.weights.blocks[1].qkv.parts[0].bias[engine.weights.blocks[1].key_column] = np.nan
        else:
            engine.weights.final_norm.weight[0] = np.nan
        with pytest.raises(EngineError, match="in block 1" if where == "key bias" else "before the output head"):
            engine.logits([1, 2, 3])


def test_activations_that_are_no_numbers_are_an_error(llama: Path) -> None:
    with Engine.open(llama, threads=1) as engine:
        engine.weights.blocks[1].mlp_norm.weight[3] = np.nan
        with pytest.raises(EngineError, match="infinite or NaN in block 1"):
            engine.logits([1, 2, 3])


def test_a_file_that_is_cut_while_it_runs_is_an_error(llama: Path, tmp_path: Path) -> None:
    """Float embeddings are read from the file when a token needs them."""
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    with Engine.open(copy, threads=2) as engine:
        wanted = engine.logits([1, 2, 3])
        (copy / "model.safetensors").unlink()
        np.testing.assert_array_equal(engine.logits([1, 2, 3]), wanted)
    shutil.copytree(llama, copy, dirs_exist_ok=True)
    with Engine.open(copy, threads=2) as engine:
        os.truncate(copy / "model.safetensors", 100)
        with pytest.raises(EngineError, match="can't be read any more"):
            engine.logits([1, 2, 3])
