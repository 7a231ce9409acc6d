"""The real demo model, SmolLM2-135M-Instruct in GGUF: read as transformers reads it, quantized, made to write."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq.checkpoint import Checkpoint
from fptq.errors import ModelError
from fptq.integrations.transformers import generate, load
from fptq.models import loading
from fptq.models.loading import FloatModel
from fptq.models.sources import open_gguf
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.runtime.engine import Engine
from lockstep import full_cache, use_engine_rounding_

GOLDEN = "The capital of France is Paris, with the iconic"


@pytest.fixture(scope="module")
def demo() -> FloatModel:
    return FloatModel.open("demo")


def test_gguf_tensors_equal_transformers_own_reading(demo: FloatModel) -> None:
    path = demo.location
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    assert set(demo.file_names) | {"lm_head.weight"} == set(theirs)
    for name in demo.file_names:
        if "layers.1" in name or "layers" not in name:
            torch.testing.assert_close(demo.read(name), theirs[name], rtol=0, atol=0)


def test_demo_model_end_to_end(tmp_path: Path) -> None:
    spec = CalibrationSpec("random", samples=4, length=64)
    folder = quantize("demo", tmp_path / "q", "fptq", spec, Options(progress=False))
    checkpoint = Checkpoint.open(folder)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 114e6
    layers = checkpoint.record["layers"]
    assert len(layers) == 210
    # The paper's picture: attention outputs are small, down_proj inputs reach thousands.
    ranges = {name: layer["range_before"] for name, layer in layers.items()}
    assert max(r for name, r in ranges.items() if name.endswith("o_proj")) < 15
    assert max(r for name, r in ranges.items() if name.endswith("down_proj")) > 1000
    model, tokenizer = load(folder)
    assert "Paris" in generate(model, tokenizer, "What is the capital of France?", chat=True, max_new_tokens=12)
    with Engine.open(folder) as engine:
        prompts = [
            engine.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}]),
            engine.tokenizer.encode("Once upon a time, there was a"),
            engine.tokenizer.encode("def fibonacci(n):"),
        ]
        written = engine.generate_batch(prompts, max_new_tokens=40, stop_ids=())
        assert written[0].text.startswith(GOLDEN)
        use_engine_rounding_(model, engine)
        for prompt, completion in zip(prompts, written, strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                tokens = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=40,
                    do_sample=False,
                    past_key_values=full_cache(model),
                    eos_token_id=None,
                )
            assert list(completion.tokens) == tokens[0, len(prompt) :].tolist()


class Field:
    def __init__(self, value: object):
        self.value = value

    def contents(self) -> object:
        return self.value


def test_a_turns_end_ends_an_answer_too(demo: FloatModel) -> None:
    reader = open_gguf(demo.location)
    assert loading._read_gguf_config(demo.location, reader).eos_token_id == 2
    reader.fields["tokenizer.ggml.eot_token_id"] = Field(5)
    assert loading._read_gguf_config(demo.location, reader).eos_token_id == [2, 5]


def test_gguf_files_that_transformers_would_read_wrongly_are_refused(demo: FloatModel) -> None:
    for key, value, match in (
        ("llama.rope.scaling.type", "yarn", r"rotary scaling \(yarn\).*safetensors"),
        ("llama.rope.scale_linear", 4.0, r"rotary scaling \(linear\)"),
        ("split.count", 3, "split GGUF"),
        ("general.architecture", None, "which architecture"),
    ):
        reader = open_gguf(demo.location)
        reader.fields[key] = Field(value)
        with pytest.raises(ModelError, match=match):
            loading._read_gguf_config(demo.location, reader)
