"""Benchmark data from files, in the schema of the Hub data sets that the harness' task definitions expect.

A folder holds one folder a task. docs/evaluation.md shows a row of each.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from fptq.errors import EvaluationError
from fptq.models.text import read_text

Row = dict[str, Any]
_LETTERS = "ABCD"
_MMLU = "mmlu_"
_MMLU_FORM = "rows of question, four choices and the answer's letter, without a header"


@dataclass(frozen=True)
class LocalTask:
    """How one task's data lies in files.

    Attributes:
        split: the split that is evaluated, `<split>.jsonl` in the task's folder.
        form: a row, as an error shows it.
        convert: makes the Hub's row of a file's row; KeyError, TypeError and ValueError say that it can't.
    """

    split: str
    form: str
    convert: Callable[[Row], Row]


def _lambada(row: Row) -> Row:
    return {"text": _string(row["text"])}


def _winogrande(row: Row) -> Row:
    _string(row["sentence"]).index("_")
    return _strings(row, "sentence", "option1", "option2") | {"answer": str(("1", "2").index(str(row["answer"])) + 1)}


def _piqa(row: Row) -> Row:
    return _strings(row, "goal", "sol1", "sol2") | {"label": (0, 1).index(int(row["label"]))}


def _hellaswag(row: Row) -> Row:
    endings = [_string(ending) for ending in row["endings"]]
    label = str(range(len(endings)).index(int(row["label"])))
    return _strings(row, "activity_label", "ctx_a", "ctx_b") | {"endings": endings, "label": label}


def _arc(row: Row) -> Row:
    choices = {name: [_string(value) for value in row["choices"][name]] for name in ("text", "label")}
    if len(choices["text"]) != len(choices["label"]):
        raise ValueError
    choices["label"].index(row["answerKey"])
    return _strings(row, "question", "answerKey") | {"choices": choices}


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _strings(row: Row, *names: str) -> Row:
    return {name: _string(row[name]) for name in names}


LOCAL_TASKS = {
    "lambada_openai": LocalTask("test", '{"text": "… the last word"}', _lambada),
    "winogrande": LocalTask(
        "validation", '{"sentence": "… _ …", "option1": "…", "option2": "…", "answer": "1"}', _winogrande
    ),
    "piqa": LocalTask("validation", '{"goal": "…", "sol1": "…", "sol2": "…", "label": 0}', _piqa),
    "hellaswag": LocalTask(
        "validation", '{"activity_label": "…", "ctx_a": "…", "ctx_b": "…", "endings": ["…"], "label": 0}', _hellaswag
    ),
    "arc_easy": LocalTask(
        "test", '{"question": "…", "choices": {"text": ["…"], "label": ["A"]}, "answerKey": "A"}', _arc
    ),
}


def local_dataset(data_dir: Path, task: str) -> Callable[..., Any]:
    """Return what the harness calls for the data set of a task, its `custom_dataset`.

    Raises:
        EvaluationError: there is no such folder, or no local form is known for this task.
    """
    if not data_dir.is_dir():
        raise EvaluationError(f"{data_dir}: no such folder; --data-dir needs a folder with one folder for each task")
    if task.startswith(_MMLU):
        return partial(_mmlu_dataset, data_dir / "mmlu", task.removeprefix(_MMLU))
    if task not in LOCAL_TASKS:
        raise EvaluationError(
            f"task '{task}' has no local form; from --data-dir there are {', '.join([*LOCAL_TASKS, 'mmlu'])}; "
            "leave --data-dir out to load it from the Hub"
        )
    return partial(_jsonl_dataset, data_dir / task, LOCAL_TASKS[task])


def _jsonl_dataset(folder: Path, task: LocalTask, **_: Any) -> Any:
    """Return a DatasetDict of the evaluated split, and of "train", which the harness wants for few-shot examples.

    Without a file for it "train" is empty: enough as long as no example is drawn.
    """
    import datasets

    def read(split: str) -> Any:
        path = folder / f"{split}.jsonl"
        return datasets.Dataset.from_list(
            _read(path, task.form, lambda text: text.split("\n"), lambda line: task.convert(json.loads(line)))
        )

    rows = read(task.split)
    train = read("train") if (folder / "train.jsonl").exists() else rows.select([])
    return datasets.DatasetDict({task.split: rows, "train": train})


def _mmlu_dataset(folder: Path, subject: str, **_: Any) -> Any:
    """Return a DatasetDict of one subject's splits "test" and "dev"."""
    import datasets

    def convert(cells: list[str]) -> Row:
        question, *choices, letter = cells
        if len(choices) != len(_LETTERS):
            raise ValueError
        return {"question": question, "subject": subject, "choices": choices, "answer": _LETTERS.index(letter)}

    def read(split: str) -> Any:
        path = folder / split / f"{subject}_{split}.csv"
        return datasets.Dataset.from_list(_read(path, _MMLU_FORM, lambda text: csv.reader(StringIO(text)), convert))

    return datasets.DatasetDict({split: read(split) for split in ("test", "dev")})


def _read(path: Path, form: str, cut: Callable[[str], Iterable[Any]], convert: Callable[[Any], Row]) -> list[Row]:
    """Return all rows of a file.

    Raises:
        EvaluationError: there is no such file, it has no rows, or one isn't of the form.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; needed: {form}")
    rows = []
    for number, raw in enumerate(cut(read_text(path)), 1):
        if not raw:
            continue
        try:
            rows.append(convert(raw))
        except (KeyError, TypeError, ValueError) as cause:
            raise EvaluationError(f"{path}, row {number}: needed {form}") from cause
    if not rows:
        raise EvaluationError(f"{path}: has no rows; needed: {form}")
    return rows
