"""Benchmark tasks: the harness' own documents and figures, answers that don't depend on the way, files that resume."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import evaluate as harness_evaluate
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import aggregate_subtask_metrics, mean_stderr, pooled_sample_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from fptq.cli import main
from fptq.errors import EvaluationError, MissingDependencyError
from fptq.evaluate import harness, results
from fptq.evaluate.estimates import mean, stratified_mean
from fptq.evaluate.fidelity import Scored, ScoredEngine
from fptq.evaluate.runner import open_models
from fptq.evaluate.scores import TaskScore, TaskSpec
from fptq.evaluate.tasks import prepare_tasks, run_tasks
from fptq.runtime.engine import Engine
from quantizing import checkpoint_of
from scored import Counting, open_float, quantize_model, save_model

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
DEFINITIONS = Path(harness.lm_eval.tasks.__file__).parent
SUBJECTS = sorted(path.stem.removeprefix("mmlu_") for path in (DEFINITIONS / "mmlu/default").glob("mmlu_*.yaml"))
COUNT = 6

# Rows as the Hub's data sets have them; files are made from these, with what files have differently.
HUB: dict[str, dict[str, list[dict[str, Any]]]] = {
    "lambada_openai": {"test": [{"text": f'"No {i}," she said, "not every dog {i}"'} for i in range(COUNT)]},
    "winogrande": {
        "validation": [
            {
                "sentence": f"Cat {i} saw dog {i} so _ ran.",
                "option1": "cat",
                "option2": f"dog {i}",
                "answer": "12"[i % 2],
            }
            for i in range(COUNT)
        ]
    },
    "piqa": {
        "validation": [
            {"goal": f"boil {i} eggs", "sol1": f"use {i} pots", "sol2": "use ice ", "label": i % 2}
            for i in range(COUNT)
        ]
    },
    "hellaswag": {
        "validation": [
            {
                "ind": i,
                "activity_label": "Cooking",
                "ctx_a": f"A man has {i} [step] eggs.",
                "ctx_b": "the man" if i % 2 else "",
                "ctx": "not used",
                "endings": [f"eats {i}.", "sings [title] a song.", f"leaves  {i}", "cooks."],
                "source_id": "x",
                "split": "val",
                "label": str(i % 4),
            }
            for i in range(COUNT)
        ]
    },
    "arc_easy": {
        "test": [
            {
                "id": f"x{i}",
                "question": f"What has {i} legs?",
                "choices": {
                    "text": ["stone", f"{i} cats", "sky"],
                    "label": ["1", "2", "3"] if i % 2 else ["A", "B", "C"],
                },
                "answerKey": "2" if i % 2 else "C",
            }
            for i in range(COUNT)
        ]
    },
}


def mmlu_rows(subject: str, split: str) -> list[dict[str, Any]]:
    texts = [f'Of {subject} {i},\nwhat is "{i}"? ' for i in range(2 + len(subject) % 2 if split == "test" else 5)]
    return [
        {
            "question": text,
            "subject": subject,
            "choices": [f"{i}", f"{i},5", "no", "a b"],
            "answer": (i + len(subject)) % 4,
        }
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task, splits in HUB.items():
        (folder / task).mkdir()
        for split, rows in splits.items():
            if task == "hellaswag":
                rows = [{**row, "label": int(row["label"])} for row in rows]
                rows = [{k: v for k, v in row.items() if k not in ("ind", "split", "source_id")} for row in rows]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("test", "dev"):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / "mmlu" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                for row in mmlu_rows(subject, split):
                    csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_model(model, tmp_path_factory.mktemp("checkpoint") / "q")


def run(model: Path, spec: TaskSpec, **options: Any) -> dict[str, TaskScore]:
    return run_tasks(*open_float(model), spec, progress=False, **options)


@pytest.mark.parametrize("task", [*HUB, "mmlu_anatomy"])
def test_documents_are_those_of_the_harness(task: str, data_dir: Path) -> None:
    mmlu = task.startswith("mmlu")
    rows = {s: mmlu_rows("anatomy", s) for s in ("test", "dev")} if mmlu else HUB[task]
    hub = {split: datasets.Dataset.from_list(values) for split, values in rows.items()}
    if not mmlu:
        hub["train"] = next(iter(hub.values())).select([])
    folder = {"lambada_openai": "lambada", "arc_easy": "arc", "mmlu_anatomy": "mmlu/default"}.get(task, task)
    path = DEFINITIONS / folder / ("default.yaml" if task == "winogrande" else f"{task}.yaml")
    config = load_yaml(path)
    config.pop("tag", None)
    theirs = ConfigurableTask(config={**config, "custom_dataset": lambda **_: datasets.DatasetDict(hub)})
    theirs.set_config("num_fewshot", 5 if mmlu else 0)
    theirs.set_fewshot_seed(1234)
    prepared, counts, groups = prepare_tasks(task, TaskSpec((task,), str(data_dir)))
    ours = prepared[task]
    assert counts == {task: len(rows["test" if "test" in rows else "validation"])}
    assert not groups
    for definition in (theirs, ours):
        definition.build_all_requests()
    assert len(ours.instances) == len(theirs.instances)
    for mine, other in zip(ours.instances, theirs.instances, strict=True):
        assert mine.args == other.args
        for part in ("doc_to_text", "doc_to_target", *(["doc_to_choice"] if task != "lambada_openai" else [])):
            assert getattr(ours, part)(mine.doc) == getattr(theirs, part)(other.doc)
    assert ours.config.metric_list == theirs.config.metric_list


@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen2"])
def test_scores_are_those_of_the_harness_own_model(variant: str, data_dir: Path, tmp_path: Path) -> None:
    """Log-likelihoods to 1e-4: sums of up to 50 float32 terms of size 10, each right to some 1e-6."""
    scored, tokenizer = open_float(save_model(tmp_path, variant))
    ours = harness.HarnessModel(scored, tokenizer=tokenizer)
    theirs = HFLM(pretrained=scored.model, tokenizer=tokenizer, batch_size=4)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    for name in (*HUB, "mmlu_anatomy"):
        spec = TaskSpec((name,), str(data_dir), num_fewshot=2 if name == "mmlu_anatomy" else None)
        samples = []
        for lm in (ours, theirs):
            tasks, _, _ = prepare_tasks(name, spec)
            samples.append(harness_evaluate(lm, {"tasks": tasks}, bootstrap_iters=0)["samples"][name])
        for mine, other in zip(*samples, strict=True):
            assert {m: mine[m] for m in mine["metrics"] if "acc" in m} == {
                m: other[m] for m in other["metrics"] if "acc" in m
            }
            for (log_p, greedy), (expected, hit) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                assert log_p == pytest.approx(expected, abs=1e-4)
                assert greedy == hit


def test_other_requests_are_those_of_the_harness_own_model(tmp_path: Path) -> None:
    """Empty contexts, a written <bos>, texts longer than the context, and greedy continuations."""
    scored, tokenizer = open_float(save_model(tmp_path, max_position_embeddings=32))
    ours = harness.HarnessModel(scored, tokenizer=tokenizer)
    theirs = HFLM(pretrained=scored.model, tokenizer=tokenizer, batch_size=1)

    def ask(kind: str, *arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        requests = [Instance(kind, {}, arguments=a, idx=i) for i, a in enumerate(arguments)]
        return tuple(getattr(lm, kind)(requests) for lm in (ours, theirs))

    pairs = [("", "empty"), ("", "<bos>x"), ("<bos>a b", " c"), ("a b  ", "c"), ("long " * 20, "end"), ("x", "y" * 32)]
    mine, expected = ask("loglikelihood", *pairs)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]
    assert ours.truncated == 2  # "long" and "x": <bos>, x and 32 tokens are one more than fits
    mine, expected = ask("loglikelihood_rolling", ("short",), ("rolling over several windows " * 4,))
    assert mine == pytest.approx(expected, abs=1e-3)
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    mine, expected = ask("generate_until", ("Once upon", dict(options)), ("a b c d " * 10, dict(options)))
    assert mine == expected
    with pytest.raises(EvaluationError, match="doesn't fit the model's context of 32"):
        ask("loglikelihood", ("a", "b" * 40))
    with pytest.raises(EvaluationError, match="num_beams"):
        ours.generate_until(
            [Instance("generate_until", {}, arguments=("a", {"num_beams": 2, "max_gen_toks": 4}), idx=0)]
        )
    with pytest.raises(EvaluationError, match="max_length 64"):
        harness.HarnessModel(scored, tokenizer=tokenizer, max_length=64)


def test_groups_are_the_mean_of_all_questions(model: Path, data_dir: Path) -> None:
    scores = run(model, TaskSpec(("mmlu",), str(data_dir), num_fewshot=1))
    parts = [f"mmlu_{part}" for part in ("stem", "other", "social_sciences", "humanities")]
    assert set(scores) == {"mmlu", *parts}
    assert list(scores)[-1] == "mmlu"
    assert sum(len(scores[part].documents) for part in parts) == len(SUBJECTS) == len(scores["mmlu"].documents)
    for score in scores.values():
        rest = iter(score.values["acc"])
        subjects = [[next(rest) for _ in range(count)] for count in score.documents.values()]
        sizes, errors = [len(s) for s in subjects], [mean_stderr(s) for s in subjects]
        assert score.estimate.value == pytest.approx(
            aggregate_subtask_metrics([sum(s) / len(s) for s in subjects], sizes)
        )
        assert score.estimate.standard_error == pytest.approx(pooled_sample_stderr(errors, sizes))
    assert stratified_mean([[1.0, 0.0, 1.0]]) == mean([1.0, 0.0, 1.0])
    assert stratified_mean([[1.0], [0.0]]).standard_error is None


def test_metrics_to_quote_and_paired_differences(model: Path, checkpoint: Path, data_dir: Path) -> None:
    spec = TaskSpec(tuple(HUB), str(data_dir))
    base = run(model, spec)
    assert {name: score.metric for name, score in base.items() if score.metric != "acc"} == {"hellaswag": "acc_norm"}
    assert {"acc", "acc_norm"} == set(base["piqa"].values) == set(base["arc_easy"].values)
    lambada = base["lambada_openai"]
    losses = torch.tensor(lambada.values["perplexity"])
    assert lambada.estimates["perplexity"].value == pytest.approx(float(torch.exp(-losses.mean())), rel=1e-6)
    models, tokenizer = open_models({"quantized": str(checkpoint)}, None)
    scores = run_tasks(models["quantized"], tokenizer, spec, progress=False)
    for name, score in scores.items():
        pairs = [a - b for a, b in zip(score.values["acc"], base[name].values["acc"], strict=True)]
        assert score.differences(base[name])["acc"] == mean(pairs)
    ratio = scores["lambada_openai"].differences(lambada)["perplexity"].value
    assert ratio == pytest.approx(
        scores["lambada_openai"].estimates["perplexity"].value / lambada.estimates["perplexity"].value
    )
    with pytest.raises(EvaluationError, match="same documents"):
        scores["piqa"].differences(base["arc_easy"])


def counting(model: Path) -> tuple[Counting, Any]:
    scored, tokenizer = open_float(model)
    return Counting(scored.model, identity="tiny"), tokenizer


def test_an_interrupted_run_goes_on_where_it_was(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store = TaskSpec(("piqa", "winogrande"), str(data_dir)), tmp_path / "results.jsonl"
    scored, tokenizer = counting(model)
    expected = run_tasks(scored, tokenizer, spec, progress=False)
    for failing, flush_sec in ((5, 0.0), (COUNT * 2 + 5, 1e9)):  # in the first task; in the second
        monkeypatch.setattr(results, "FLUSH_SEC", flush_sec)
        broken, _ = counting(model)
        broken.fails_after = failing - (5 if flush_sec else 0)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(broken, tokenizer, spec, store=store, progress=False)
        with store.open("a") as file:
            file.write('{"answers": {"abc": [1.0, tr')  # the machine went down while a line was written
    last, _ = counting(model)
    assert run_tasks(last, tokenizer, spec, store=store, progress=False) == expected
    assert last.texts == scored.texts - (COUNT * 2 + 5)
    again, _ = counting(model)
    assert run_tasks(again, tokenizer, spec, store=store, progress=False) == expected
    assert again.texts == 0
    assert not list(tmp_path.glob("*.partial"))


def test_results_of_something_else_are_refused(model: Path, data_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "results.jsonl"
    run(model, TaskSpec(("piqa",), str(data_dir), limit=2), store=store)
    with pytest.raises(EvaluationError, match=r"results of limit 2, these are of 3; give another file"):
        run(model, TaskSpec(("piqa",), str(data_dir), limit=3), store=store)
    scored, tokenizer = open_float(model)
    scored.identity = "another"
    with pytest.raises(EvaluationError, match="results of model 'tiny', these are of 'another'"):
        run_tasks(scored, tokenizer, TaskSpec(("piqa",), str(data_dir), limit=2), store=store, progress=False)
    scored.identity = ""
    with pytest.raises(EvaluationError, match="without an identity"):
        run_tasks(scored, tokenizer, TaskSpec(("piqa",), str(data_dir), limit=2), store=store, progress=False)
    changed = Path(shutil.copytree(data_dir, tmp_path / "data"))
    run(model, TaskSpec(("piqa",), str(changed), limit=2), store=tmp_path / "changing.jsonl")
    next(changed.rglob("piqa/*.jsonl")).touch()
    with pytest.raises(EvaluationError, match="has results of data"):
        run(model, TaskSpec(("piqa",), str(changed), limit=2), store=tmp_path / "changing.jsonl")
    for content in ("hello\n", "[]\n", ""):
        store.write_text(content)
        with pytest.raises(EvaluationError, match="isn't a file of results"):
            run(model, TaskSpec(("piqa",), str(data_dir), limit=2), store=store)


def test_metrics_that_are_no_means_are_refused(model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.aggregation", lambda _: {"acc": max, "acc_norm": max})
    with pytest.raises(EvaluationError, match="'acc' isn't an average over documents"):
        run(model, TaskSpec(("piqa",), str(data_dir), limit=2))


@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_a_checkpoint_has_the_context_of_its_float_model(variant: str, tmp_path: Path) -> None:
    """BLOOM's config names no longest text."""
    folder = checkpoint_of(tmp_path, variant)
    models, tokenizer = open_models({"quantized": str(folder)}, str(tmp_path / "model"))
    own, reference = (harness.HarnessModel(models[name], tokenizer=tokenizer) for name in ("quantized", "reference"))
    assert own.max_length == reference.max_length


@pytest.mark.parametrize(
    ("task", "line", "match"),
    [
        ("piqa", None, r"piqa.validation.jsonl: no such file; needed: \{\"goal\""),
        ("piqa", "", "has no rows"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}', r"row 1: needed \{\"goal\""),
        ("piqa", "{", "row 1"),
        ("lambada_openai", '{"text": 3}', "row 1"),
        ("winogrande", '{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}', "row 1"),
        ("winogrande", '{"sentence": "_", "option1": "a", "option2": "b", "answer": "0"}', "row 1"),
        ("hellaswag", '{"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": 1}', "row 1"),
        ("arc_easy", '{"question": "", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}', "row 1"),
        ("mmlu_anatomy", "question,a,b,c,A", "row 1: needed rows of question, four choices"),
        ("mmlu_anatomy", "question,a,b,c,d,E", "row 1"),
    ],
)
def test_broken_data_is_named(task: str, line: str | None, match: str, tmp_path: Path) -> None:
    file = tmp_path / "mmlu/test/anatomy_test.csv"
    if task != "mmlu_anatomy":
        file = tmp_path / task / f"{'test' if 'test' in HUB[task] else 'validation'}.jsonl"
    file.parent.mkdir(parents=True)
    if line is not None:
        file.write_text(line + "\n" * bool(line))
    with pytest.raises(EvaluationError, match=match):
        prepare_tasks(task, TaskSpec((task,), str(tmp_path)))


def test_mistakes_are_explained(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ({"tasks": ()}, {"tasks": ("piqa", "piqa")}, {"tasks": ("piqa",), "limit": 0}, {"tasks": ("",)}):
        with pytest.raises(EvaluationError):
            TaskSpec(**spec)
    with pytest.raises(EvaluationError, match="--num-fewshot -1"):
        TaskSpec(("piqa",), num_fewshot=-1)
    with pytest.raises(EvaluationError, match="has 0 examples for its prompts, --num-fewshot asks for 2"):
        prepare_tasks("piqa", TaskSpec(("piqa",), str(data_dir), num_fewshot=2))
    with pytest.raises(EvaluationError, match=r"'arc_challenge' has no local form; .* leave --data-dir out"):
        prepare_tasks("arc_challenge", TaskSpec(("arc_challenge",), str(data_dir)))
    with pytest.raises(EvaluationError, match="no such folder"):
        prepare_tasks("piqa", TaskSpec(("piqa",), str(data_dir / "none")))
    with pytest.raises(EvaluationError, match=r"'piqa' can't be loaded .* --data-dir"):
        prepare_tasks("piqa", TaskSpec(("piqa",)))  # the tests have no Hub
    monkeypatch.setattr(harness, "_all_tasks", harness._usual_tasks)  # the real one takes twenty seconds
    with pytest.raises(EvaluationError, match="the harness has none of this name"):
        prepare_tasks("pica", TaskSpec(("pica",), str(data_dir)))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fptq\[eval\]'"):
        prepare_tasks("piqa", TaskSpec(("piqa",), str(data_dir)))


def test_examples_come_from_train_where_there_is_one(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "piqa" / f"{split}.jsonl").write_text((data_dir / "piqa/validation.jsonl").read_text())
    tasks, _, _ = prepare_tasks("piqa", TaskSpec(("piqa",), str(tmp_path), num_fewshot=2))
    tasks["piqa"].build_all_requests(limit=1)
    assert tasks["piqa"].instances[0].args[0].count("Question:") == 3


@pytest.mark.parametrize("runtime", ["engine", "transformers"])
def test_the_harness_runs_a_checkpoint_by_name(runtime: str, checkpoint: Path, data_dir: Path) -> None:
    tasks, _, _ = prepare_tasks("piqa", TaskSpec(("piqa",), str(data_dir)))
    found = simple_evaluate(
        "fptq",
        f"pretrained={checkpoint},runtime={runtime}",
        tasks=list(tasks.values()),
        task_manager=harness._usual_tasks(),
        bootstrap_iters=0,
    )
    models, tokenizer = open_models({"model": str(checkpoint)}, None, runtime)
    score = run_tasks(models["model"], tokenizer, TaskSpec(("piqa",), str(data_dir)), progress=False)["piqa"]
    assert found["results"]["piqa"]["acc,none"] == score.estimate.value


def test_both_runtimes_write(checkpoint: Path) -> None:
    """Greedy texts of engine and transformers: the same arithmetic, so the same words in all but a tie."""
    texts = []
    for runtime in ("engine", "transformers"):
        lm = harness.HarnessModel(str(checkpoint), runtime)
        options = {"until": ["zz"], "max_gen_toks": 6}
        texts.append(lm.generate_until([Instance("generate_until", {}, arguments=("Once upon", options), idx=0)])[0])
    assert texts[0] == texts[1] != ""


def evaluate_json(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    path = tmp_path / "figures.json"
    assert main(["evaluate", *map(str, arguments), "--json", str(path), "--quiet"]) == 0
    return json.loads(path.read_text())


def test_the_command(
    model: Path, checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text " * 20)
    results_file = tmp_path / "r.jsonl"
    usual = ["--tasks", "piqa,lambada_openai", "--data-dir", data_dir]
    values = evaluate_json(
        tmp_path, checkpoint, "--reference", model, *usual, "--text", text, "--length", 32, "--results", results_file
    )
    out = capsys.readouterr().out
    for word in ("piqa", "acc_norm", "points", "×", "top-1", "runtime: engine"):
        assert word in out
    piqa = values["tasks"]["piqa"]
    assert piqa["documents"] == COUNT
    assert piqa["difference"]["acc"]["value"] == pytest.approx(
        piqa["quantized"]["acc"]["value"] - piqa["reference"]["acc"]["value"]
    )
    assert values["quantized"]["perplexity"] > 0
    assert results_file.exists()
    assert (tmp_path / "r.reference.jsonl").exists()
    few = evaluate_json(tmp_path, checkpoint, *usual, "--limit", 2)
    assert few["tasks"]["piqa"]["documents"] == few["tasks"]["lambada_openai"]["documents"] == 2
    other = evaluate_json(tmp_path, checkpoint, *usual, "--runtime", "transformers")
    assert other["settings"]["runtime"] == "transformers"
    alone = evaluate_json(tmp_path, model, *usual)
    assert alone["tasks"]["piqa"]["float"] == piqa["reference"]
    assert alone["settings"]["kernels"] == ["float32"]
    shots = [
        evaluate_json(tmp_path, model, "--tasks", "mmlu_anatomy", "--data-dir", data_dir, *more)["tasks"][
            "mmlu_anatomy"
        ]
        for more in ([], ["--num-fewshot", "1"])
    ]
    assert [score["num_fewshot"] for score in shots] == [5, 1]
    assert shots[0]["truncated"] == 0


def test_truncation_is_said(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = save_model(tmp_path / "small", max_position_embeddings=64)
    values = evaluate_json(tmp_path, small, "--tasks", "mmlu_anatomy", "--data-dir", data_dir)
    assert values["tasks"]["mmlu_anatomy"]["truncated"] == 4 * len(mmlu_rows("anatomy", "test"))
    assert "mmlu_anatomy: 12 requests were longer than the model's context" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["{model}", "--tasks", "piqa", "--limit", "0"], "--limit 0"),
        (
            ["{model}", "--tasks", "piqa", "--data-dir", "{data}", "--runtime", "engine"],
            "the engine runs checkpoints only",
        ),
        (["{model}", "--text", "x", "--data-dir", "{data}"], "is about tasks: it needs --tasks"),
        (["{model}", "--text", "x", "--num-fewshot", "2"], "is about tasks: it needs --tasks"),
        (["{model}", "--text", "x", "--results", "r"], "it needs --tasks"),
        (["{model}", "--tasks", "piqa,", "--data-dir", "{data}"], "names of tasks, each once"),
    ],
)
def test_wrong_options(
    arguments: list[str], match: str, model: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(a.format(model=model, data=data_dir) for a in arguments)]) == 1
    assert match in capsys.readouterr().err


def test_a_model_is_what_the_protocol_says(model: Path, checkpoint: Path) -> None:
    with Engine.open(checkpoint) as engine:
        both: list[Scored] = [open_float(model)[0], ScoredEngine(engine)]
        assert [scored.context for scored in both] == [768, 768]
