"""Publishing: the model card says what is known of a checkpoint, and nothing unsound goes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from fptq.cli import main
from fptq.errors import CheckpointError, OutputError
from fptq.presets import get_recipe
from fptq.publish import hub_id, push
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.report.card import model_card
from fptq.report.subject import Subject
from fptq.runtime.kernels import Kernels
from tiny import save_tiny
from tokens import save_tokenizer

PLACE = "me/tiny-W4A8"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny(folder / "model")
    save_tokenizer(model)
    recipe = get_recipe("fptq", group_size=32, v0=2.0, v1=20.0)
    return quantize(str(model), folder / "q", recipe, CalibrationSpec("random", 4, 24), Options(progress=False))


@pytest.fixture
def measured(made: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(made, tmp_path / "measured")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 40)
    model, text, file = str(made.parent / "model"), str(tmp_path / "text.txt"), str(folder / "evaluation.json")
    evaluate = ["evaluate", str(folder), "--reference", model, "--text", text, "--length", "32", "--json", file]
    assert main(evaluate) == 0
    return folder


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_was_measured(measured: Path) -> None:
    card = model_card(Subject.open(measured), PLACE, base_model="them/tiny", licence="mit")
    values = json.loads((measured / "evaluation.json").read_text())
    assert f"{values['quantized']['perplexity']:.4g} ±" in card
    assert "windows of 32 tokens of text.txt" in card
    matter = front_matter(card)
    assert matter["base_model"] == "them/tiny"
    assert matter["license"] == "mit"
    assert matter["base_model_relation"] == "quantized"
    assert {"fptq", "w4a8"} <= set(matter["tags"])


def test_the_card_says_what_was_decided(made: Path) -> None:
    subject = Subject.open(made)
    card = model_card(subject, PLACE)
    assert "Not measured." in card
    assert "base_model" not in front_matter(card)
    assert "| recipe: v1 | 20.0 |" in card
    down = [layer for layer in subject.layers if layer.module == "down_proj"]
    row = next(line for line in card.splitlines() if line.startswith("| down (FC2) |"))
    assert sum(int(part.split()[0]) for part in row.split(" | ")[1].split(", ") if part[0].isdigit()) == len(down)
    ranges = [layer.plan["range_before"] for layer in down]
    assert f"{min(ranges):.4g} to {max(ranges):.4g}" in row
    assert Kernels().target not in card  # the reader has another machine
    assert f"hf download {PLACE}" in card


class FakeHub:
    """Keeps what would be sent."""

    def __init__(self, **_: Any) -> None:
        self.sent: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        FakeHub.last = self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.made = {"repo_id": repo_id, **options}
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **_: Any) -> None:
        assert "README.md" not in self.sent
        self.sent |= {name: (folder_path / name).read_bytes() for name in allow_patterns}

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **_: Any) -> None:
        self.sent[path_in_repo] = path_or_fileobj


def test_push_sends_the_checkpoint_and_then_the_card(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    (measured / "private-notes.txt").write_text("not for others")
    assert push(measured, PLACE, private=True) == f"https://huggingface.co/{PLACE}"
    hub = FakeHub.last
    assert hub.made == {"repo_id": PLACE, "private": True, "exist_ok": True}
    expected = {path.name for path in measured.iterdir()} - {"private-notes.txt"} | {"README.md"}
    assert set(hub.sent) == expected
    assert hub.sent["model.safetensors"] == (measured / "model.safetensors").read_bytes()
    assert b"## Accuracy" in hub.sent["README.md"]


def test_a_damaged_checkpoint_stays_here(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    data = bytearray((measured / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (measured / "model.safetensors").write_bytes(data)
    FakeHub.last = None
    with pytest.raises(CheckpointError, match="differs from the file that was written"):
        push(measured, PLACE)
    assert FakeHub.last is None


def test_what_the_hub_says_is_passed_on(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    with pytest.raises(OutputError, match=r"Token is required.*hf auth login"):
        push(made, PLACE)


def test_only_hub_ids_are_taken_for_base_models(made: Path) -> None:
    subject = Subject.open(made)
    for name, expected in (("a/b", "a/b"), ("model", None), ("a/b.gguf", None), ("../b", None), ("/a", None)):
        subject.checkpoint.record["model"]["name"] = name
        assert hub_id(subject) == expected


def test_the_command_writes_the_card(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["push", str(made), PLACE, "--card-only", str(tmp_path / "card.md")]
    assert main(command) == 0
    assert (tmp_path / "card.md").read_text().startswith("---\n")
    assert main(command) == 1
    assert "is there already" in capsys.readouterr().err
