"""What `fptq doctor DIR` says of engines is what they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptq.checkpoint import Checkpoint
from fptq.cli import main
from fptq.errors import UnsupportedModelError
from fptq.export import export
from fptq.integrations.transformers import W4A8Linear, load
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.report.engines import engine_verdicts
from fptq.runtime.engine import Engine
from tiny import save_tiny

NATIVE, LOAD, STOCK, PLUGIN, VLLM, LLAMA = range(6)
CASES = {
    "fptq": ("fptq", "llama", {}, ("runs", "runs", "in float", "runs", "refuses static", "export DIR")),
    "dynamic": (
        "rtn-w4a8",
        "llama",
        {},
        ("runs", "runs", "in float", "runs", "refuses the int8 KV cache", "export DIR"),
    ),
    "head": ("fptq", "llama", {"lm_head": "int8"}, ("runs", "runs", "in float", "refuses", "can't load", "export DIR")),
    "weights": (
        "rtn-w4a16",
        "llama",
        {},
        ("refuses", "all layers in float", "in float", "refuses", "runs it as W4A16", "export DIR"),
    ),
    "rows": (
        "rtn-w8a8",
        "llama",
        {"group_size": 0},
        ("runs", "runs", "in float", "refuses", "can't load", "export DIR"),
    ),
    "simulated": (
        "llm-int8",
        "llama",
        {},
        ("refuses", "in float", "can't load", "refuses", "can't load", "is simulated"),
    ),
    "neox": ("fptq", "gpt_neox", {}, ("refuses", "runs", "in float", "runs", "refuses static", "there is no export")),
}


def make(folder: Path, recipe: str, variant: str, changes: dict[str, object]) -> Path:
    wanted = get_recipe(recipe, **{"group_size": 32, "v0": 2.0, **changes})
    spec = CalibrationSpec("random", 4, 24)
    return quantize(str(save_tiny(folder / "model", variant)), folder / "q", wanted, spec, Options(progress=False))


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str, tmp_path: Path) -> None:
    recipe, variant, changes, words = CASES[case]
    checkpoint = Checkpoint.open(make(tmp_path, recipe, variant, changes))
    verdicts = [verdict for _, verdict in engine_verdicts(checkpoint)]
    for verdict, word in zip(verdicts, words, strict=True):
        assert word in verdict
    if "refuses" in verdicts[NATIVE]:
        with pytest.raises(UnsupportedModelError) as error:
            Engine.open(checkpoint.folder)
        assert str(error.value) in verdicts[NATIVE]
    else:
        Engine.open(checkpoint.folder).close()
    model, _ = load(str(checkpoint.folder))
    in_int8 = [m.kernel in verdicts[LOAD] for m in model.modules() if isinstance(m, W4A8Linear)]
    assert all(in_int8) == ("with int8 arithmetic" in verdicts[LOAD])


def test_an_export_is_no_longer_the_plugins(tmp_path: Path) -> None:
    folder = make(tmp_path, "fptq", "llama", {})
    for target, word in (("w4a16", "runs it as W4A16"), ("compressed-tensors-dynamic", "elsewhere W4A16")):
        exported = Checkpoint.open(export(Checkpoint.open(folder), tmp_path / target, target))
        verdicts = [verdict for _, verdict in engine_verdicts(exported)]
        assert "leaves it to vLLM" in verdicts[PLUGIN]
        assert word in verdicts[VLLM]


def test_the_command_checks_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, "fptq", "llama", {})
    assert main(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "files are as they were written" in shown
    assert "vLLM, stock: refuses static int8 activations" in shown
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert main(["doctor", str(folder)]) == 1
    assert "differs from the file that was written" in capsys.readouterr().err
