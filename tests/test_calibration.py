"""Calibration tokens: seeded, of equal length, led by the beginning-of-sequence token, fingerprinted."""

import json
from pathlib import Path

import numpy as np
import pytest

from fptq.errors import CalibrationError
from fptq.models.text import JSONLines, beginning_of_sequence, hub_documents, hub_text
from fptq.quantize.calibration import CalibrationSpec, load_calibration
from tokens import save_tokenizer


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [" ".join(f"w{i}" for i in rng.integers(0, 150, rng.integers(3, 40))) for _ in range(60)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def spec(source: Path | str, samples: int = 8, length: int = 16, seed: int = 0) -> CalibrationSpec:
    return CalibrationSpec(str(source), samples, length, seed)


def test_random_tokens_leave_out_special_ones_and_cover_the_vocabulary(tmp_path: Path) -> None:
    data = load_calibration(spec("random", 64, 32), save_tokenizer(tmp_path), 160)
    assert data.tokens.shape == (64, 32)
    assert (data.tokens[:, 0] == 1).all()
    body = data.tokens[:, 1:]
    assert set(np.unique(body)) == set(range(4, 154))  # neither special tokens nor ids beyond the tokenizer's


def test_random_tokens_need_no_tokenizer() -> None:
    assert load_calibration(spec("random"), None, 50).tokens.max() < 50


@pytest.mark.parametrize("bos", [True, False])
def test_samples_from_a_file(documents: Path, tmp_path: Path, bos: bool) -> None:
    tokenizer = save_tokenizer(tmp_path, bos=bos)
    assert beginning_of_sequence(tokenizer) == ([1] if bos else [])
    data = load_calibration(spec(documents), tokenizer, 160)
    assert data.tokens.shape == (8, 16)
    assert (data.tokens[:, 0] == 1).all() == bos
    assert (data.tokens[:, 1:] >= 4).all()


def test_seed_chooses_other_text_and_repeats_itself(documents: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    first, again, other = (load_calibration(spec(documents, seed=s), tokenizer, 160) for s in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    described = first.describe()
    assert described["source"] == "documents.jsonl"  # not the user's folders
    assert described["tokens"] == 128
    assert described["fingerprint"] == first.fingerprint()


def test_a_long_document_fills_one_sample_only(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = [" ".join(["w0"] * 500), *(" ".join(["w5"] * 40) for _ in range(20))]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokens = load_calibration(spec(path, 12), save_tokenizer(tmp_path, bos=False), 160).tokens
    assert (tokens == 4).sum() <= 16


def test_text_files_are_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(" ".join([f"w{i}"] * 30) for i in range(100)))
    tokens = load_calibration(spec(path), save_tokenizer(tmp_path), 160).tokens
    assert tokens.shape == (8, 16)
    assert len(np.unique(tokens)) > 5  # from all over the book


def test_less_text_gives_fewer_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "short.txt"
    path.write_text(" ".join(["w1"] * 40))
    data = load_calibration(spec(path, length=8), save_tokenizer(tmp_path, bos=False), 160)
    assert data.tokens.shape[0] == 5
    assert data.describe()["samples"] == 5
    assert "too short for 8 samples of 8 tokens: it gives 5" in caplog.text


@pytest.mark.parametrize("between", [" \n \n ", "\n", " ", "\n\n"])
def test_text_of_any_layout_gives_its_samples(between: str, tmp_path: Path) -> None:
    """WikiText's raw files have a space in blank lines; others a paragraph a line, or no line breaks at all."""
    path = tmp_path / "book.txt"
    path.write_text(between.join(" ".join([f"w{i % 150}"] * 20) for i in range(400)))
    tokens = load_calibration(spec(path, 100, 64), save_tokenizer(tmp_path, bos=False), 160).tokens
    assert tokens.shape == (100, 64)  # of 125 that there could be
    assert len(np.unique(tokens)) > 100


def test_a_file_of_lines_is_read_line_by_line(documents: Path) -> None:
    texts = JSONLines(documents)
    lines = documents.read_text().splitlines()
    assert [texts[i] for i in (7, 0, 59)] == [json.loads(lines[i])["text"] for i in (7, 0, 59)]
    assert list(texts) == [json.loads(line)["text"] for line in lines]
    assert len(texts) == 60


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "gives 0 tokens"),
        (b'{"text": "w1"}\n', "gives 1 tokens"),
        (b'{"text": "w1"}\n{"txt": 1}\n', "line 2: needed a JSON object"),
        (b'{"text": 7}\n', '"text" is int'),
        (b"[1]\n", "line 1"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=match):
        load_calibration(spec(path), save_tokenizer(tmp_path), 160)


def test_missing_file_and_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="can't be read"):
        load_calibration(spec(tmp_path / "none.txt"), save_tokenizer(tmp_path), 160)
    for values in ({"samples": 0}, {"length": 1}):
        with pytest.raises(CalibrationError):
            CalibrationSpec("random", **values)


def test_tokenizer_of_another_model_is_refused(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="the model has 20 embeddings"):
        load_calibration(spec(documents), save_tokenizer(tmp_path), 20)


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the datasets library itself, on a data set that lies in a local folder."""
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, word in (("train", "w5"), ("test", "w6")):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(20)))
    assert len(list(hub_documents(str(folder), count=7, seed=0))) == 7
    assert all(t.startswith("w5") for t in hub_documents(str(folder), count=20, seed=0))
    assert hub_text(str(folder)).split("\n\n")[0] == "w6 0"


def test_unreachable_hub_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    with pytest.raises(CalibrationError, match=r"can't be fetched from the Hub.*random"):
        load_calibration(spec("nobody/nothing"), save_tokenizer(tmp_path), 160)
