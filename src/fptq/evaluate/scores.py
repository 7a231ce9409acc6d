"""Which benchmark tasks to run, and what came out: values without torch or the harness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fptq.errors import EvaluationError
from fptq.evaluate.estimates import Estimate, exponential_of_mean, stratified_mean

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class TaskSpec:
    """Which tasks to run, and on what.

    Attributes:
        tasks: names of the harness' tasks or groups.
        data_dir: a folder with their data (docs/evaluation.md); by default it comes from the Hub.
        limit: use the first so many documents of a task, of MMLU of each subject.
        limits: other limits, of single tasks.
        num_fewshot: examples in a prompt; by default 5 for MMLU, as in the paper, for the others the harness' number.
    """

    tasks: tuple[str, ...]
    data_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.limits) - set(self.tasks))
        if unknown:
            raise EvaluationError(f"--limit {unknown[0]}=…: there is no such task among {', '.join(self.tasks)}")
        if not self.tasks or not all(self.tasks) or len(set(self.tasks)) < len(self.tasks):
            raise EvaluationError(f"--tasks {','.join(self.tasks)}: needed names of tasks, each once")
        if any(limit < 1 for limit in (*self.limits.values(), *([] if self.limit is None else [self.limit]))):
            raise EvaluationError(f"--limit {self.limit}, {dict(self.limits)}: needed at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise EvaluationError(f"--num-fewshot {self.num_fewshot}: needed at least 0")

    def only(self, task: str) -> TaskSpec:
        """Return the specification of one of the tasks alone."""
        return replace(self, tasks=(task,), limit=self.limits.get(task, self.limit), limits={})


@dataclass(frozen=True)
class TaskScore:
    """What a model reached in a task or a group of tasks.

    Attributes:
        task: its name.
        metric: the one to quote.
        values: metric → one value for each document, in the data's order, the tasks of a group one after the other.
            Of "perplexity" they are log p of the right continuation.
        documents: how many each task has, of a group all its members.
        num_fewshot: examples in a prompt.
        truncated: requests that were longer than the model's context and lost tokens on the left.
    """

    task: str
    metric: str
    values: dict[str, list[float]]
    documents: dict[str, int]
    num_fewshot: int
    truncated: int = 0

    @property
    def estimate(self) -> Estimate:
        """The metric to quote."""
        return self.estimates[self.metric]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every metric with its standard error; a group's is the mean of all questions, as MMLU's in the harness."""
        return {metric: self._summary(metric, values) for metric, values in self.values.items()}

    def differences(self, reference: TaskScore) -> dict[str, Estimate]:
        """Return for every metric the paired difference to another model's score, of "perplexity" the ratio.

        Raises:
            EvaluationError: the scores aren't of the same documents.
        """
        if (self.task, self.documents, self.num_fewshot) != (
            reference.task,
            reference.documents,
            reference.num_fewshot,
        ):
            raise EvaluationError(f"scores of {self.task} and {reference.task} aren't of the same documents")
        pairs = {
            metric: [a - b for a, b in zip(values, reference.values[metric], strict=True)]
            for metric, values in self.values.items()
        }
        return {metric: self._summary(metric, values) for metric, values in pairs.items()}

    def _summary(self, metric: str, values: list[float]) -> Estimate:
        if metric == PERPLEXITY:
            return exponential_of_mean([-value for value in values])
        rest = iter(values)
        return stratified_mean([[next(rest) for _ in range(count)] for count in self.documents.values()])

    def to_dict(self) -> dict[str, Any]:
        """Return the score JSON-ready; TaskScore(**d) makes it again."""
        return asdict(self)
