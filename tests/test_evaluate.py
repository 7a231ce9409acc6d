"""The metrics against independent computations, and the command's data handling."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from fptq.errors import EvaluationError, ModelError, TextError
from fptq.evaluate.estimates import Estimate, share
from fptq.evaluate.fidelity import (
    ScoredModel,
    cut_windows,
    read_lambada,
    score_lambada,
    score_windows,
)
from fptq.evaluate.runner import EvaluationSpec, evaluate
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.report.tables import accuracy_table
from tiny import save_tiny, token_ids
from tokens import save_tokenizer


def float_model(folder: Path, variant: str = "llama", **changes: object) -> torch.nn.Module:
    return FloatModel.open(str(save_tiny(folder, variant, spread=0.5, **changes))).load_all(torch.float32)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "bloom", "opt-post-norm"])
def test_perplexity_and_divergence_equal_the_textbook(variant: str, tmp_path: Path) -> None:
    changes = {"final_logit_softcapping": 3.0} if variant == "gemma2" else {}
    one = float_model(tmp_path / "one", variant, **changes)
    other = float_model(tmp_path / "other", variant, **changes)
    for parameter in other.parameters():
        parameter.mul_(1.05)
    windows = token_ids(3, 20)
    scores = score_windows({"reference": ScoredModel(one), "quantized": ScoredModel(other)}, windows, progress=False)
    with torch.no_grad():
        logits = {"reference": one(windows).logits[:, :-1], "quantized": other(windows).logits[:, :-1]}
    targets = windows[:, 1:]
    for name, values in logits.items():
        loss = cross_entropy(values.reshape(-1, 160), targets.reshape(-1))
        assert scores[name]["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
    p, q = (logits[name].log_softmax(-1) for name in ("reference", "quantized"))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert scores["quantized"]["kl_divergence"].value == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-6)
    assert scores["quantized"]["kl_divergence"].standard_error == pytest.approx(
        float(divergence.mean(1).std() / 3**0.5), rel=1e-3, abs=1e-6
    )
    ratio = math.exp(cross_entropy(logits["quantized"].reshape(-1, 160), targets.reshape(-1)))
    ratio /= math.exp(cross_entropy(logits["reference"].reshape(-1, 160), targets.reshape(-1)))
    assert scores["quantized"]["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-4)
    agreement = (logits["reference"].argmax(-1) == logits["quantized"].argmax(-1)).float().mean()
    assert scores["quantized"]["top1_agreement"].value == pytest.approx(float(agreement))


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model = ScoredModel(float_model(tmp_path))
    scores = score_windows({"reference": model, "quantized": model}, token_ids(), progress=False)
    assert scores["quantized"]["kl_divergence"] == Estimate(0.0, 0.0)
    assert scores["quantized"]["top1_agreement"].value == 1.0


def test_one_window_has_no_standard_error(tmp_path: Path) -> None:
    scores = score_windows({"quantized": ScoredModel(float_model(tmp_path))}, token_ids(1), progress=False)
    assert scores["quantized"]["perplexity"].standard_error is None
    assert "kl_divergence" not in scores["quantized"]


def test_windows_are_cut_without_overlap() -> None:
    windows = cut_windows(list(range(10, 31)), [1], 6, None)
    assert windows.tolist()[0] == [1, 10, 11, 12, 13, 14]
    assert windows.tolist()[-1] == [1, 25, 26, 27, 28, 29]
    assert len(cut_windows(list(range(100)), [], 10, 3)) == 3
    with pytest.raises(EvaluationError, match="one window needs 9"):
        cut_windows([1, 2], [1], 10, None)


def test_lambada_equals_greedy_decoding_one_by_one(tmp_path: Path) -> None:
    """Batches of unequal lengths, padded, against each text alone."""
    torch.manual_seed(0)
    model = float_model(tmp_path / "m")
    tokenizer = save_tokenizer(tmp_path)

    def likeliest(context: str) -> int:
        with torch.no_grad():
            return int(model(tokenizer(context, return_tensors="pt").input_ids).logits[0, -1].argmax())

    texts = []
    for i in range(24):
        context = " ".join(f"w{int(j)}" for j in torch.randint(0, 150, (3 + i,)))
        best = likeliest(context)
        word = tokenizer.decode([best]) if i % 2 and 4 <= best < 154 else "w7"
        texts.append(f"{context} {word}")
    expected = []
    for text in texts:
        context, _, word = text.rpartition(" ")
        expected.append(tokenizer.convert_tokens_to_ids(word) == likeliest(context))
    got = score_lambada({"quantized": ScoredModel(model)}, texts, tokenizer, progress=False)["quantized"]
    assert got == expected
    assert True in got
    assert False in got


def test_a_share_has_the_binomial_error() -> None:
    assert share([True] * 30 + [False] * 70) == Estimate(0.3, pytest.approx(math.sqrt(0.3 * 0.7 / 100)))


def test_lambada_files(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"text": "a b"}\n\n{"text": "c d"}\n')
    assert read_lambada(path, None) == ["a b", "c d"]
    assert read_lambada(path, 1) == ["a b"]
    path.write_text("")
    with pytest.raises(EvaluationError, match="no examples"):
        read_lambada(path, None)
    with pytest.raises(TextError):
        read_lambada(tmp_path / "none.jsonl", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    model = save_tiny(folder / "model", spread=0.5)
    save_tokenizer(model)
    spec = CalibrationSpec("random", samples=4, length=24)
    recipe = get_recipe("fptq", group_size=32)
    return model, quantize(str(model), folder / "q", recipe, spec, Options(progress=False))


def test_evaluate_gives_both_models_and_json(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, folder = models
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 150}" for i in range(400)))
    lambada = tmp_path / "l.jsonl"
    lambada.write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(20)))
    spec = EvaluationSpec(str(text), str(lambada), length=32, limit=5)
    results = evaluate(str(folder), str(model), spec, progress=False)
    values = results.to_dict()
    assert set(values["reference"]) == set(values["quantized"]) == {"perplexity", "lambada_accuracy"}
    assert values["kl_divergence"] > 0
    assert 0 <= values["top1_agreement"] <= 1
    assert values["standard_error"]["reference"]["perplexity"] > 0
    assert values["perplexity_ratio"] == pytest.approx(
        values["quantized"]["perplexity"] / values["reference"]["perplexity"], rel=1e-6
    )
    assert values["lambada_difference"] == pytest.approx(
        values["quantized"]["lambada_accuracy"] - values["reference"]["lambada_accuracy"], abs=1e-9
    )
    assert values["settings"]["windows"] == 5
    assert values["settings"]["lambada_examples"] == 5
    assert json.loads(json.dumps(values)) == values
    table = accuracy_table(results.quantized, results.reference)
    for word in ("perplexity", "LAMBADA", "KL divergence", "top-1", "±", "%"):
        assert word in table
    alone = evaluate(str(folder), None, spec, progress=False).to_dict()
    assert alone["quantized"] == pytest.approx(values["quantized"])
    assert "reference" not in alone


def test_evaluate_refuses_what_it_cannot_use(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing to evaluate on"):
        EvaluationSpec()
    with pytest.raises(EvaluationError):
        EvaluationSpec("x", limit=0)
    other = save_tiny(tmp_path / "other", vocab_size=200)
    with pytest.raises(ModelError, match="vocabularies of"):
        evaluate(str(models[1]), str(other), EvaluationSpec("x.txt"), progress=False)
    with pytest.raises(TextError, match="can't be read"):
        evaluate(str(models[1]), None, EvaluationSpec(str(tmp_path / "none.txt"), length=64), progress=False)
    with pytest.raises(EvaluationError, match="longer than the model's context of 256"):
        evaluate(str(models[1]), None, EvaluationSpec("x.txt"), progress=False)
