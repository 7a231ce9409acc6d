"""Benchmark tasks of lm-evaluation-harness: its documents, prompts and metrics, our models.

model, tokenizer = ...
scores = run_tasks(model, tokenizer, TaskSpec(("piqa", "mmlu"), data_dir="benchmarks"), store=Path("piqa.jsonl"))
print(scores["piqa"].estimate)
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fptq.errors import EvaluationError, MissingDependencyError
from fptq.evaluate.fidelity import Scored
from fptq.evaluate.results import ResultFile, digest, stamps
from fptq.evaluate.scores import TaskScore, TaskSpec
from fptq.progress import progress_bar

MMLU_EXAMPLES = 5
"""Examples in an MMLU prompt unless told otherwise: the paper's number, not the harness' 0."""
_EXAMPLES_SEED = 1234  # the harness' own
_HEADLINES = {"hellaswag": "acc_norm"}  # of the others "acc", as in the paper's tables


def run_tasks(
    model: Scored,
    tokenizer: Any,
    spec: TaskSpec,
    *,
    store: Path | None = None,
    progress: bool = True,
) -> dict[str, TaskScore]:
    """Return the scores of all tasks, and of the groups among them, by name.

    Args:
        model: what is scored.
        tokenizer: its transformers tokenizer.
        spec: the tasks.
        store: a file for answers and scores; with it, what was interrupted goes on where it was.
        progress: show a progress bar for each task.

    Raises:
        MissingDependencyError: lm-eval isn't installed.
        EvaluationError: there is no such task, its data can't be had, or the file is another model's.
    """
    harness = require_harness()
    lm = harness.HarnessModel(model, tokenizer=tokenizer)
    if store is not None:
        if not model.identity:
            raise EvaluationError(f"{store}: results can't be kept of a model without an identity")
        subject = {"model": model.identity, **asdict(spec), "data": digest(stamps(spec.data_dir))}
        lm.results = ResultFile.open(store, {**subject, "harness": harness.VERSION})
    scores: dict[str, TaskScore] = {}
    for name in spec.tasks:
        if lm.results and name in lm.results.scores:
            found = [TaskScore(**values) for values in lm.results.scores[name]]
        else:
            try:
                found = list(_run(lm, name, spec, harness, progress))
            finally:
                if lm.results:
                    lm.results.flush()
            if lm.results:
                lm.results.finish(name, [score.to_dict() for score in found])
        scores |= {score.task: score for score in found}
    return scores


def require_harness() -> Any:
    """Return the module that speaks with the harness.

    Raises:
        MissingDependencyError: lm-eval isn't installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("benchmark tasks need lm-eval", "eval") from cause
    from fptq.evaluate import harness

    return harness


def prepare_tasks(name: str, spec: TaskSpec) -> tuple[dict[str, Any], dict[str, int], dict[str, list[str]]]:
    """Return the harness' tasks that a name stands for, how many documents of each are meant, and groups of them.

    Raises:
        EvaluationError: there is no such task, its data can't be had, or it has too few examples for its prompts.
    """
    harness = require_harness()
    tasks, groups = harness.load_tasks(name, spec.data_dir)
    for task, definition in tasks.items():
        _set_examples_(definition, spec.num_fewshot, task, harness)
    sizes = {task: len(definition.eval_docs) for task, definition in tasks.items()}
    limit = spec.limits.get(name, spec.limit)
    return tasks, {task: min(limit or size, size) for task, size in sizes.items()}, groups


def _run(lm: Any, name: str, spec: TaskSpec, harness: Any, progress: bool) -> Iterator[TaskScore]:
    """Yield the scores of the groups that a name stands for, outer ones last, or of its tasks."""
    with quiet():
        tasks, counts, groups = prepare_tasks(name, spec)
    parts: dict[str, TaskScore] = {}
    with progress_bar(sum(counts.values()), what=name, show=progress) as bar:
        for task, definition in tasks.items():
            lm.truncated = 0
            lm.advance = lambda share, documents=counts[task]: bar.update(share * documents)
            with quiet():
                values = harness.per_document(lm, definition, counts[task])
            metric = _HEADLINES.get(task, "acc" if "acc" in values else next(iter(values)))
            examples = definition.config.num_fewshot
            parts[task] = TaskScore(task, metric, values, {task: counts[task]}, examples, lm.truncated)
    for group, members in reversed(groups.items()):
        yield _gather(group, [parts[member] for member in members])
    if not groups:
        yield from parts.values()


def _set_examples_(task: Any, wanted: int | None, name: str, harness: Any) -> None:
    """Set how many examples a task's prompts have, and the choice of them."""
    defined = task.config.num_fewshot
    if wanted is None:
        wanted = defined if defined is not None else MMLU_EXAMPLES if harness.belongs_to(name, "mmlu") else 0
    if defined == 0 and wanted:
        raise EvaluationError(f"task '{name}' takes no examples, so not --num-fewshot {wanted}")
    available = len(list(task.fewshot_docs() or [])) if wanted else 0
    if wanted > available:
        raise EvaluationError(
            f"task '{name}' has {available} examples for its prompts, --num-fewshot asks for {wanted}; from --data-dir "
            f"they are rows of {name}/train.jsonl, of MMLU of mmlu/dev"
        )
    task.set_config(key="num_fewshot", value=wanted)
    task.set_fewshot_seed(seed=_EXAMPLES_SEED)


def _gather(group: str, parts: list[TaskScore]) -> TaskScore:
    """Return the score of a group: its members' documents taken together, in the metrics that all of them have."""
    shared = [metric for metric in parts[0].values if all(metric in part.values for part in parts)]
    if not shared:
        raise EvaluationError(f"the tasks of group '{group}' have no metric in common; name them one by one")
    return TaskScore(
        group,
        parts[0].metric if parts[0].metric in shared else shared[0],
        {metric: [value for part in parts for value in part.values[metric]] for metric in shared},
        {task: count for part in parts for task, count in part.documents.items()},
        max(part.num_fewshot for part in parts),
        sum(part.truncated for part in parts),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness' own progress bars and notices out of ours."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
