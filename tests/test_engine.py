"""The engine beside the transformers path, and beside itself: alone and batched, in chunks and whole."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq.checkpoint import Checkpoint
from fptq.errors import EngineError
from fptq.integrations.transformers import load, new_cache
from fptq.runtime import engine as engines
from fptq.runtime.decoder import PythonDecoder
from fptq.runtime.engine import Engine
from fptq.runtime.kernels import Kernels
from fptq.runtime.kv_cache import PAGE_TOKENS
from fptq.runtime.sampling import Sampling
from lockstep import full_cache, use_engine_rounding_
from quantizing import checkpoint_of
from tiny import ENGINE_REFUSES, VARIANTS, token_ids

MODELS = {name: (name, {}, {}) for name in VARIANTS if name not in ENGINE_REFUSES} | {
    "llama-head8": ("llama", {"lm_head": "int8"}, {}),
    "gemma2-head8-capped": ("gemma2", {"lm_head": "int8"}, {"final_logit_softcapping": 3.0}),
    "untied-head8": ("llama-bias-untied", {"lm_head": "int8"}, {}),
    "one-layer-in-float": ("llama", {"skip": ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj")}, {}),
    "int8-weights": ("llama", {"weight_bits": 8}, {}),
    "int8-weights-of-attention": ("gemma3", {"int8_roles": ("qkv", "dense")}, {}),
    "mixed-formats": ("gemma3", {"layer_formats": ("*.v_proj=int8", "*.k_proj=16", "*.1.mlp.down_proj=0")}, {}),
    "int8-weights-dynamic": ("phi3", {"weight_bits": 8, "activations": "dynamic"}, {}),
    "int4-by-rows": ("qwen2", {"group_size": 0}, {}),
    "int4-by-rows-static": ("opt", {"group_size": 0, "activations": "static", "equalization": "none"}, {}),
    "all-dynamic": ("qwen2", {"v0": 0.0, "v1": 0.0}, {}),
    "odd-widths": (
        "llama",
        {},
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 155},
    ),
    "llama3-rotary": (
        "llama",
        {},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "yarn-rotary": (
        "qwen3",
        {},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "longrope-rotary": (
        "phi3",
        {},
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [2.0] * 8,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "linear-rotary": ("gemma", {}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "bloom-residual-from-norm": ("bloom", {}, {"apply_residual_connection_post_layernorm": True}),
    "bloom-six-heads": ("bloom", {}, {"hidden_size": 96, "n_head": 6}),
}
"""Name → (variant of tiny.py, changes to the recipe, changes to the model)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}

    class Folders(dict):
        def __missing__(self, name: str) -> Path:
            variant, recipe, changes = MODELS[name]
            made[name] = checkpoint_of(tmp_path_factory.mktemp(name), variant, recipe=recipe, **changes)
            self[name] = made[name]
            return made[name]

    return Folders()


@pytest.fixture
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model, _ = load(folder)
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], past_key_values=new_cache(model), use_cache=True).logits[0].numpy()


def is_near(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether logits differ by no more than what a code that falls on the other side of a rounding boundary makes.

    Both paths round float32 sums differently. That moves a value across a boundary of the next layer's codes now and
    then: one step, 1/127 of the layer's range. Nearly all values are equal to float32 precision.
    """
    scale = np.abs(wanted).max()
    difference = np.abs(got - wanted)
    return bool(np.median(difference) <= 1e-5 * scale and difference.max() <= 0.05 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_transformers_path(folders: dict[str, Path], name: str) -> None:
    ids = token_ids(1, 40, 150)[0].numpy()
    with Engine.open(folders[name], threads=2) as engine:
        assert is_near(engine.logits(ids), transformers_logits(folders[name], ids))


@pytest.mark.parametrize("name", MODELS)
def test_native_step_is_the_one_in_python(folders: dict[str, Path], name: str) -> None:
    """To the bit, but for the tanh of capped logits: both call the same kernels, and nothing depends on threads."""
    ids = token_ids(1, 150, 150)[0].numpy()
    with Engine.open(folders[name], threads=3) as engine:
        native = engine.logits(ids)
        engine._decoder = PythonDecoder(Kernels(threads=1), engine.weights)
        np.testing.assert_allclose(native, engine.logits(ids), rtol=16 * 2.0**-24 if engine.plan.logit_softcap else 0)


@pytest.mark.parametrize("fault", ["key scale", "rotation", "norm", "window", "bias"])
def test_planted_faults_are_found(folders: dict[str, Path], fault: str) -> None:
    name = {"window": "mistral-sliding", "bias": "llama-bias-untied"}.get(fault, "llama")
    ids = token_ids(1, 40, 150)[0].numpy()
    with Engine.open(folders[name], threads=1) as engine:
        right = engine.logits(ids)
        block = engine.weights.blocks[1]
        if fault == "key scale":
            changed = dataclasses.replace(block, cache_scales=dataclasses.replace(block.cache_scales, key=0.9))
        elif fault == "rotation":
            cosines, sines = block.rotation
            changed = dataclasses.replace(block, rotation=(np.roll(cosines, 1, 0), sines))
        elif fault == "norm":
            norm = dataclasses.replace(block.mlp_norm, weight=block.mlp_norm.weight[::-1].copy())
            changed = dataclasses.replace(block, mlp_norm=norm)
        elif fault == "window":
            changed = dataclasses.replace(block, window=block.window + 1)
        else:
            part = dataclasses.replace(block.qkv.parts[0], bias=None)
            changed = dataclasses.replace(block, qkv=dataclasses.replace(block.qkv, parts=(part,)))
        weights = dataclasses.replace(engine.weights, blocks=(engine.weights.blocks[0], changed))
        wrong = Engine(engine.folder, engine.plan, weights, engine.cache, engine.kernels, engine.context)
        assert not is_near(wrong.logits(ids), right)


@pytest.mark.parametrize(
    "name", ["llama-bias-untied", "mistral-sliding", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "opt"]
)
def test_with_equal_rounding_the_paths_are_equal(folders: dict[str, Path], name: str) -> None:
    """No code differs: only the output head, a float product here, adds up in another order: 64 terms."""
    ids = token_ids(1, 150, 150)[0].numpy()
    model, _ = load(folders[name])
    with Engine.open(folders[name], threads=2) as engine, torch.no_grad():
        use_engine_rounding_(model, engine)
        wanted = model(torch.from_numpy(ids)[None], past_key_values=full_cache(model), use_cache=True).logits[0].numpy()
        got = engine.logits(ids)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * 2.0**-24 * 8 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "opt", "mistral-sliding", "glm4"])
def test_greedy_tokens_are_those_of_the_transformers_path(folders: dict[str, Path], name: str) -> None:
    model, _ = load(folders[name])
    prompt = token_ids(1, 12, 150)
    with torch.no_grad():
        wanted = model.generate(
            prompt, max_new_tokens=24, do_sample=False, past_key_values=new_cache(model), eos_token_id=None
        )
    with Engine.open(folders[name], threads=2) as engine:
        pieces = list(engine.generate(prompt[0].tolist(), max_new_tokens=24, stop_ids=()))
    assert [piece.token for piece in pieces] == wanted[0, 12:].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "mistral-sliding"])
def test_chunked_prefill_is_the_whole_and_decoding_is_prefill(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: a token's result doesn't depend on what is computed beside it."""
    ids = token_ids(1, 150, 150)[0].numpy()
    with Engine.open(folders[name], threads=2) as engine:
        whole = engine.logits(ids)
        for rows in (1, 7, 64, 149):
            np.testing.assert_array_equal(np.concatenate(list(engine.score(ids, rows=rows))), whole)
        monkeypatch.setattr(engines, "PREFILL_ROWS", 11)  # a step ends within a text
        first, second = engine.sequence(), engine.sequence()
        last = engine.forward([(first, ids[:90]), (second, ids[:40])], last=[3, 40])
        np.testing.assert_array_equal(last, np.concatenate([whole[87:90], whole[:40]]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_batched_is_alone(folders: dict[str, Path], name: str) -> None:
    prompts = [row[:length].tolist() for row, length in zip(token_ids(5, 70, 150), (1, 64, 9, 70, 33), strict=True)]
    options = {
        "max_new_tokens": 20,
        "stop_ids": (),
        "sampling": Sampling(temperature=0.8, seed=3),
        "log_probabilities": 2,
    }
    with Engine.open(folders[name], threads=2, sequences=3) as engine:
        together = engine.generate_batch(prompts, **options)
        for prompt, completion in zip(prompts, together, strict=True):
            alone = tuple(engine.generate(prompt, **options))
            assert completion.pieces == alone
            assert completion.finish_reason == "length"
        assert engine.cache.free_tokens == engine.cache.tokens


def test_pages_are_reused_safely(llama: Path) -> None:
    """A sequence that gets another's pages, in another order, computes what it would in fresh ones."""
    rows = token_ids(3, 200, 150).numpy()
    with Engine.open(llama, threads=2, context=200, sequences=2) as engine:
        fresh = engine.logits(rows[2])
        a, b = engine.sequence(), engine.sequence()
        engine.forward([(a, rows[0, :70]), (b, rows[1, :130])])
        with pytest.raises(EngineError, match="the KV cache is full"):
            engine.forward([(engine.sequence(), rows[2, :199])])
        a.close()
        c = engine.sequence()
        again = engine.forward([(c, rows[2, :100])], last=[100])
        before = engine.forward([(b, rows[1, 130:140])], last=[10])
        np.testing.assert_array_equal(again, fresh[:100])
        np.testing.assert_array_equal(before, engine_logits_alone(llama, rows[1, :140])[130:])
        c.truncate(40)
        np.testing.assert_array_equal(engine.forward([(c, rows[2, 40:120])], last=[80]), fresh[40:120])
        b.close()
        c.close()
        assert engine.cache.free_tokens == engine.cache.tokens


def engine_logits_alone(folder: Path, ids: np.ndarray) -> np.ndarray:
    with Engine.open(folder, threads=1) as engine:
        return engine.logits(ids)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "bloom"])
def test_threads_do_not_change_a_bit(folders: dict[str, Path], name: str) -> None:
    """With more threads than key/value heads, decoding divides the heads that share a key."""
    ids = token_ids(1, 60, 150)[0].numpy()
    with Engine.open(folders[name], threads=5) as many, Engine.open(folders[name], threads=1) as one:
        got = np.concatenate(list(many.score(ids, rows=1)))
        np.testing.assert_array_equal(got, np.concatenate(list(one.score(ids, rows=1))))


def test_text_stops_where_it_should(llama: Path) -> None:
    with Engine.open(llama, threads=1) as engine:
        tokenizer = engine.tokenizer
        prompt = tokenizer.encode("w1 w2 w3")
        options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0, seed=0)}
        free = engine.generate_batch([prompt], stop_ids=(), **options)[0]
        assert free.text == tokenizer.decode(free.tokens)
        assert free.finish_reason == "length"
        words = free.text.split()
        assert len(words) > 4
        stopped = engine.generate_batch([prompt], stop_ids=(), stop=[words[3]], **options)[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text.split() == words[: words.index(words[3])]
        ended = list(engine.generate(prompt, stop_ids=[free.tokens[2]], **options))
        assert [piece.token for piece in ended] == list(free.tokens[: free.tokens.index(free.tokens[2]) + 1])
        assert ended[-1].finish_reason == "stop"
        full = list(engine.generate(token_ids(1, 250, 150)[0].tolist(), stop_ids=()))
        assert len(full) == 6
        assert full[-1].finish_reason == "length"


def test_log_probabilities_are_those_of_the_logits(llama: Path) -> None:
    with Engine.open(llama, threads=1) as engine:
        prompt = [5, 6, 7]
        pieces = list(engine.generate(prompt, max_new_tokens=3, stop_ids=(), log_probabilities=4))
        tokens = [*prompt, *(piece.token for piece in pieces)]
        wanted = torch.log_softmax(torch.from_numpy(engine.logits(tokens)[2:-1]).double(), -1)
        for piece, row in zip(pieces, wanted, strict=True):
            assert piece.log_probability == pytest.approx(float(row[piece.token]), abs=1e-4)
            assert [token for token, _ in piece.alternatives] == row.topk(4).indices.tolist()
        assert next(iter(engine.generate(prompt, max_new_tokens=1))).log_probability is None


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else threading.active_count()


def test_closing_gives_threads_back_and_two_engines_live_side_by_side(llama: Path) -> None:
    before = threads_of_process()
    one, two = Engine.open(llama, threads=3), Engine.open(llama, threads=2)
    ids = [1, 2, 3]
    np.testing.assert_array_equal(one.logits(ids), two.logits(ids))
    one.close()
    assert two.logits(ids).shape == (3, 160)
    with pytest.raises(EngineError, match="closed"):
        one.logits(ids)
    two.close()
    assert threads_of_process() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_and_does_not_hang(llama: Path) -> None:
    with Engine.open(llama, threads=3) as engine:
        wanted = engine.logits([1, 2, 3])
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if np.array_equal(engine.logits([1, 2, 3]), wanted) else 1)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_array_equal(engine.logits([1, 2, 3]), wanted)


def test_an_interrupt_ends_generation_and_leaves_a_sound_engine(llama: Path, request: pytest.FixtureRequest) -> None:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    with Engine.open(llama, threads=2) as engine:
        wanted = [piece.token for piece in engine.generate([1, 2], max_new_tokens=50, stop_ids=())]

        def interrupted() -> None:
            for number, _ in enumerate(engine.generate([1, 2], max_new_tokens=50, stop_ids=())):
                if number == 10:
                    signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert engine.cache.free_tokens == engine.cache.tokens
        assert [piece.token for piece in engine.generate([1, 2], max_new_tokens=50, stop_ids=())] == wanted


def test_the_numpy_reference_runs_it_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(1, 20, 150)[0].numpy()
    native = engine_logits_alone(llama, ids)
    monkeypatch.setenv("FPTQ_KERNEL", "reference")
    with Engine.open(llama) as engine:
        assert engine.kernels.target == "reference"
        assert is_near(engine.logits(ids), native)


def test_running_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys; from fptq.cli import main; "
        f"assert main(['generate', {str(llama)!r}, 'w1 w2', '--max-new-tokens', '3']) == 0; "
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_engines_hold_little_more_than_weights_and_cache(llama: Path) -> None:
    with Engine.open(llama, threads=1, context=100) as engine:
        checkpoint = Checkpoint.open(llama)
        codes = sum(checkpoint.read_linear(name).codes.size for name in checkpoint.schemes)
        assert codes / 2 < engine.weight_bytes < codes * (0.5 + 2 / 32) + 160 * 64 * 4 + 1
        assert engine.cache.tokens == 2 * PAGE_TOKENS
        assert engine.cache.token_bytes == 2 * 2 * 2 * 16
