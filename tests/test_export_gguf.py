"""Exported GGUF files: the codes to the bit when read back, and llama.cpp computes what they stand for."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fptq.checkpoint import Checkpoint
from fptq.cli import main
from fptq.errors import CheckpointError, ModelError, OutputError
from fptq.export import export
from fptq.integrations.transformers import load
from fptq.models.loading import checkpoint_skeleton
from fptq.models.sources import GGUFLayout, GGUFSource, open_gguf
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from tiny import save_tiny
from tokens import save_byte_tokenizer

ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("FPTQ_LLAMACPP", ROOT / "build" / "engine-peers" / "llamacpp"))
PERPLEXITY = BUILD / "bin" / "llama-perplexity"
VARIANTS = {
    "llama-bias-untied": "llama",
    "mistral-sliding": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
}
WORDS = 260


def make(folder: Path, variant: str = "llama-bias-untied", **changes: object) -> Path:
    model = save_tiny(folder / "model", variant, vocab_size=WORDS, spread=0.5)
    save_byte_tokenizer(model)
    wanted = get_recipe("fptq-figure4", **{"group_size": 32, **changes})
    return quantize(str(model), folder / "q", wanted, CalibrationSpec("random", 4, 24), Options(progress=False))


def write_metadata(path: Path, folder: Path, architecture: str, **changes: Any) -> Path:
    """Write a GGUF file without tensors, as llama.cpp's converter does for a vocabulary alone."""
    config = Checkpoint.open(folder).config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(changes.get("feed_forward_length", config["intermediate_size"]))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = changes.get("words", tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<") else 1 for word in words])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    if "tensor" in changes:
        writer.add_tensor(changes["tensor"], np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if "tensor" in changes:
        writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def metadata(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_metadata(tmp_path_factory.mktemp("metadata") / "metadata.gguf", made, "llama")


def read_back(path: Path, folder: Path) -> GGUFSource:
    return GGUFSource(path, checkpoint_skeleton(folder), open_gguf(path))


@pytest.mark.parametrize(("variant", "architecture"), VARIANTS.items())
@pytest.mark.parametrize("head", ["float", "int8"])
def test_codes_are_the_same_to_the_bit(variant: str, architecture: str, head: str, tmp_path: Path) -> None:
    folder = make(tmp_path, variant, lm_head=head)
    metadata = write_metadata(tmp_path / "metadata.gguf", folder, architecture)
    checkpoint = Checkpoint.open(folder)
    file = export(checkpoint, tmp_path / "out.gguf", "gguf", metadata=str(metadata))
    source = read_back(file, folder)
    kinds = {tensor.tensor_type.name for tensor in open_gguf(file).tensors}
    assert kinds == {"Q4_0", "F32", *(["Q8_0"] if head == "int8" else [])}
    tied = [name for name in checkpoint.schemes if f"{name}.weight" not in source.shapes]
    assert tied == (["lm_head"] if checkpoint.tied_head else [])
    for name in checkpoint.schemes.keys() - set(tied):
        linear = checkpoint.read_linear(name)
        scales = linear.scales.astype(np.float16).astype(np.float32).repeat(linear.group_size, axis=1)
        np.testing.assert_array_equal(source.read(f"{name}.weight").numpy(), linear.codes * scales)
    for name in checkpoint.float_tensors():
        np.testing.assert_array_equal(source.read(name).numpy(), checkpoint.read(name))


def test_llamas_rows_are_where_llama_cpp_wants_them(made: Path) -> None:
    """Its rotary positions turn neighbouring rows, transformers' turn those half a head apart."""
    rows = GGUFLayout("llama", checkpoint_skeleton(made)).rows("blk.0.attn_q.weight", 64)
    assert rows[:6].tolist() == [0, 8, 1, 9, 2, 10]
    assert rows[16:18].tolist() == [16, 24]


def test_the_file_is_described_by_its_metadata(made: Path, metadata: Path, tmp_path: Path) -> None:
    extra = write_metadata(tmp_path / "extra.gguf", made, "llama", tensor="rope_freqs.weight")
    file = export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf", metadata=str(extra))
    fields = open_gguf(file).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["general.quantized_by"].contents().startswith("fptq ")
    given = {n: f.contents() for n, f in open_gguf(metadata).fields.items() if n.startswith(("llama.", "tokenizer."))}
    assert given == {name: fields[name].contents() for name in given}
    factors = [tensor for tensor in open_gguf(file).tensors if tensor.name == "rope_freqs.weight"]
    np.testing.assert_array_equal(factors[0].data, np.arange(8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feed_forward_length": 100}, "its feed_forward_length is 100, the checkpoint's intermediate_size 96"),
        ({"words": ["<pad>"] * 3}, "has 3 words, the checkpoint 260"),
        ({"words": [f"<x{i}>" for i in range(WORDS)]}, "260 of its 260 words are others"),
    ],
)
def test_metadata_of_another_model_is_refused(changes: dict[str, Any], words: str, made: Path, tmp_path: Path) -> None:
    other = write_metadata(tmp_path / "other.gguf", made, "llama", **changes)
    with pytest.raises(ModelError, match=words):
        export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf", metadata=str(other))
    assert not list(tmp_path.glob("out*"))


def test_metadata_of_another_architecture_are_refused(made: Path, tmp_path: Path) -> None:
    other = write_metadata(tmp_path / "other.gguf", made, "qwen2")
    with pytest.raises(ModelError, match="its architecture is qwen2, needed llama"):
        export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf", metadata=str(other))


def test_what_a_gguf_cant_say_is_refused(made: Path, metadata: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="needs --metadata"):
        export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf")
    with pytest.raises(OutputError, match="--metadata has no use for w4a16"):
        export(Checkpoint.open(made), tmp_path / "out", "w4a16", metadata=str(metadata))
    with pytest.raises(ModelError, match=r"no such file; it is convert_hf_to_gguf\.py"):
        export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf", metadata="missing.py")
    with pytest.raises(ModelError, match="is no GGUF file"):
        export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf", metadata=str(made))
    small = make(tmp_path / "small", group_size=16)
    with pytest.raises(CheckpointError, match="groups of 16, needed a multiple of 32"):
        export(Checkpoint.open(small), tmp_path / "out.gguf", "gguf", metadata=str(metadata))
    bloom = quantize(
        str(save_tiny(tmp_path / "bloom", "bloom")),
        tmp_path / "bloom-q",
        get_recipe("fptq", group_size=32),
        CalibrationSpec("random", 4, 24),
        Options(progress=False),
    )
    with pytest.raises(CheckpointError, match="bloom models aren't among those"):
        export(Checkpoint.open(bloom), tmp_path / "out.gguf", "gguf", metadata=str(metadata))
    checkpoint = Checkpoint.open(made)
    checkpoint.config["rope_parameters"] = {"rope_type": "llama3"}
    with pytest.raises(ModelError, match="rotary scaling 'llama3' needs one"):
        export(checkpoint, tmp_path / "out.gguf", "gguf", metadata=str(metadata))
    assert not list(tmp_path.glob("out*"))


def test_a_failure_midway_leaves_no_file(
    made: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(made)
    whole = checkpoint.read_linear

    def damaged(name: str) -> Any:
        if name.endswith("1.mlp.down_proj"):
            raise CheckpointError("damaged")
        return whole(name)

    monkeypatch.setattr(checkpoint, "read_linear", damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        export(checkpoint, tmp_path / "out.gguf", "gguf", metadata=str(metadata))
    assert not list(tmp_path.glob("out*"))


def test_llama_cpps_script_makes_the_metadata(made: Path, metadata: Path, tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import json, pathlib, shutil, sys\n"
        "folder, vocabulary, outfile, result = sys.argv[1:]\n"
        "assert (vocabulary, outfile) == ('--vocab-only', '--outfile')\n"
        "folder = pathlib.Path(folder)\n"
        "assert folder.name == 'q' and (folder / 'tokenizer.json').exists()\n"
        "assert 'quantization_config' not in json.loads((folder / 'config.json').read_text())\n"
        f"shutil.copyfile({str(metadata)!r}, result)\n"
    )
    whole = export(Checkpoint.open(made), tmp_path / "whole.gguf", "gguf", metadata=str(metadata))
    file = export(Checkpoint.open(made), tmp_path / "out.gguf", "gguf", metadata=str(script))
    assert file.read_bytes() == whole.read_bytes()
    script.write_text("raise SystemExit('BPE pre-tokenizer was not recognized')")
    with pytest.raises(ModelError, match=r"doesn't take .*pre-tokenizer was not recognized"):
        export(Checkpoint.open(made), tmp_path / "other.gguf", "gguf", metadata=str(script))


def test_the_command(made: Path, metadata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(made), "--to", "gguf", "-o", str(tmp_path / "out.gguf")]
    assert main(command) == 1
    assert "--to gguf needs --metadata" in capsys.readouterr().err
    assert main([*command, "--metadata", str(metadata)]) == 0
    assert "llama.cpp" in capsys.readouterr().out


# ---- llama.cpp itself; bench/engine_peers.sh builds it

needs_llama_cpp = pytest.mark.skipif(
    not PERPLEXITY.exists(), reason="needs llama.cpp: bench/engine_peers.sh builds it, or FPTQ_LLAMACPP says where"
)


def windows(tokenizer: Any, text: str, length: int) -> Iterator[list[int]]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for first in range(0, len(ids) - length + 1, length):
        yield [1, *ids[first + 1 : first + length]]


def llama_cpps_perplexity(file: Path, text: Path) -> float:
    command = [PERPLEXITY, "-m", file, "-f", text, "-c", "64", "-b", "64", "-t", "1"]
    for _ in range(8):  # the last lines of its log get lost now and then
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
        if found:
            return float(found[1])
    raise AssertionError("llama-perplexity says no perplexity")


@needs_llama_cpp
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "mistral-sliding"])
def test_llama_cpp_has_the_models_perplexity(variant: str, tmp_path: Path) -> None:
    """It scores the second half of each window, which begins with <bos> in place of its first token."""
    folder = make(tmp_path, variant)
    metadata = write_metadata(tmp_path / "metadata.gguf", folder, VARIANTS[variant])
    file = export(Checkpoint.open(folder), tmp_path / "out.gguf", "gguf", metadata=str(metadata))
    rng = np.random.default_rng(0)
    text = "".join(chr(c) for c in rng.integers(33, 127, 64 * 8))
    (tmp_path / "text.txt").write_text(text)
    found = llama_cpps_perplexity(file, tmp_path / "text.txt")
    model, tokenizer = load(folder, simulate=True)
    losses = []
    for window in windows(tokenizer, text, 64):
        ids = torch.tensor([window])
        with torch.no_grad():
            logs = torch.log_softmax(model(ids).logits[0], -1)
        losses += (-logs[:-1].gather(1, ids[0, 1:, None])[:, 0])[31:].tolist()
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=0.03)
