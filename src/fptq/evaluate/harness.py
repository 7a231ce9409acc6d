"""Our models in lm-evaluation-harness, and its tasks for us.

    python -m fptq.evaluate.harness run --model fptq --model_args pretrained=DIR,runtime=engine --tasks piqa

is the harness' own command line, which has no way to find models of other packages, with ours made known first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval import utils
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from fptq.errors import EvaluationError, FPTQError
from fptq.evaluate.fidelity import Scored, Writing
from fptq.evaluate.local_data import local_dataset
from fptq.evaluate.requests import Likelihood, Request, answer
from fptq.evaluate.results import ResultFile
from fptq.evaluate.runner import LONGEST_TEXT, open_models
from fptq.evaluate.scores import PERPLEXITY

VERSION: str = lm_eval.__version__
DEFAULT_CONTEXT = 2048  # as HFLM has it for a model without a limit
_DEFAULT_NEW_TOKENS = 256
_FOLDERS = ("arc", "hellaswag", "lambada", "mmlu/default", "piqa", "winogrande")
"""Where the usual tasks are defined. Looking through all of the harness' definitions takes it twenty seconds."""


@register_model("fptq")
class HarnessModel(TemplateLM):
    """A scored model as the harness wants one: texts and tokens as in its `hf` model, so that figures can be compared.

    Args:
        pretrained: a checkpoint folder or a float model; or a scored model that is open already.
        runtime: what runs a checkpoint, "engine" or "transformers"; by default the engine.
        tokenizer: of a model that is open already.
        max_length: tokens that a text may have; by default the model's context, up to `LONGEST_TEXT`, so that a
            checkpoint and its float model get the same texts, whatever runs them.
        batch_size: and the other options that the harness hands on are taken and don't matter.

    Attributes:
        truncated: how many requests were longer than the context and lost tokens on the left.
        results: where answers are kept, and needn't be computed a second time.
        advance: is called with the share of a task's requests that has been answered.
    """

    def __init__(
        self,
        pretrained: str | Scored,
        runtime: str | None = None,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, str):
            models, tokenizer = open_models({"model": pretrained}, None, runtime, max_length or LONGEST_TEXT)
            pretrained = models["model"]
        if max_length and pretrained.context and max_length > pretrained.context:
            raise EvaluationError(f"max_length {max_length}: the model's context has {pretrained.context} tokens")
        self.model = pretrained
        self.tokenizer = tokenizer
        limit = pretrained.context or _tokenizer_limit(tokenizer) or DEFAULT_CONTEXT
        self.max_length = max_length or min(limit, LONGEST_TEXT)
        self.truncated = 0
        self.results: ResultFile | None = None
        self.advance: Callable[[float], None] = lambda share: None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else beginning

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its caches by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text that the model reads."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, with the tokenizer's special ones unless told otherwise or already written."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        likelihoods = self._answer([self._fitted(context, continuation) for _, context, continuation in requests])
        results = [(likelihood.log_probability, likelihood.greedy) for likelihood in likelihoods]
        for (texts, *_rest), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _answer(self, requests: list[Request]) -> list[Likelihood]:
        distinct = set(requests)
        known = ((request, self.results.answer(request)) for request in distinct) if self.results else ()
        answers = {request: likelihood for request, likelihood in known if likelihood is not None}
        self.advance(len(answers) / max(1, len(distinct)))
        for request, likelihood in answer(self.model, distinct - answers.keys()):
            answers[request] = likelihood
            if self.results:
                self.results.add(request, likelihood)
            self.advance(1 / len(distinct))
        return [answers[request] for request in requests]

    def _fitted(self, context: list[int], continuation: list[int]) -> Request:
        """Return a request that fits the context: the last token isn't read, so one more than it has room for."""
        if len(continuation) > self.max_length:
            raise EvaluationError(
                f"a continuation of {len(continuation)} tokens doesn't fit the model's context of {self.max_length}"
            )
        room = self.max_length + 1 - len(continuation)
        self.truncated += len(context) > room
        return Request(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts, each in windows of the context's length."""
        windows: list[list[Request]] = []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows.append([self._fitted(*utils.make_disjoint_window(window)) for window in cut])
        likelihoods = iter(self._answer([window for text in windows for window in text]))
        totals = [sum(next(likelihoods).log_probability for _ in text) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return each prompt's continuation, up to a stop string.

        Raises:
            EvaluationError: a task wants an option that isn't there, or leaves no room for a prompt.
        """
        written = []
        for prompt, options in (request.args for request in requests):
            wanted = dict(normalize_gen_kwargs(options, _DEFAULT_NEW_TOKENS))
            stop = handle_stop_sequences(wanted.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
            length = wanted.pop("max_gen_toks")
            wanted.pop("do_sample", None)
            sampling = {name: wanted.pop(name) for name in ("temperature", "top_k", "top_p") if name in wanted}
            if wanted or length >= self.max_length:
                raise EvaluationError(
                    f"{length} new tokens in a context of {self.max_length}, other options {wanted}: needed fewer, and "
                    "none but until, max_gen_toks, do_sample, temperature, top_k, top_p"
                )
            tokens = self.tok_encode(prompt)
            self.truncated += len(tokens) > self.max_length - length
            writing = Writing(length, tuple(term for term in stop if term), **sampling)
            text = self.model.write(tokens[-(self.max_length - length) :], self.tokenizer, writing)
            written.append(postprocess_generated_text(text, stop, None))
            self.cache_hook.add_partial("generate_until", (prompt, options), written[-1])
            self.advance(1 / len(requests))
        return written


def _tokenizer_limit(tokenizer: Any) -> int | None:
    """Return the longest text that a tokenizer was made for, None if it names none."""
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if limit and limit < 2**31 else None


def load_tasks(name: str, data_dir: str | None) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the harness' tasks that a name stands for, and the groups among them as lists of their tasks.

    With `data_dir` their data sets come from files there; everything else is the harness' definition.

    Raises:
        EvaluationError: there is no such task, or its data can't be had.
    """
    manager = _manager(name)
    try:
        if data_dir is None:
            loaded = manager.load([name])
            return loaded["tasks"], {g: _names(group.get_all_tasks()) for g, group in loaded["groups"].items()}
        groups: dict[str, list[str]] = {}
        tasks = _leaves(manager.task_index, name, groups)
        folder = Path(data_dir).expanduser()
        local = [{"task": task, "custom_dataset": local_dataset(folder, task)} for task in tasks]
        return manager.load([{"group": "local", "task": local}])["tasks"], groups
    except EvaluationError:
        raise
    # data sets of the Hub end in errors of several libraries without a common base class
    except Exception as cause:
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise EvaluationError(
            f"task '{name}' can't be loaded ({reason}); for a machine without the Hub give local files with --data-dir"
        ) from cause


def per_document(lm: HarnessModel, task: Any, limit: int) -> dict[str, list[float]]:
    """Return the harness' metrics of a task, each as one value for each of the first `limit` documents.

    Raises:
        EvaluationError: a metric isn't a mean over documents, nor perplexity.
    """
    name = task.task_name
    evaluated = lm_eval.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    means = {PERPLEXITY: perplexity}
    values: dict[str, list[float]] = {}
    for sample in sorted(evaluated["samples"][name], key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            if task.aggregation().get(metric) is not means.get(metric, mean):
                raise EvaluationError(
                    f"task '{name}': its metric '{metric}' isn't an average over documents; run it with the harness' "
                    "own command (docs/evaluation.md)"
                )
            full = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            values.setdefault(full, []).append(sample[metric])
    return {metric: [float(value) for value in found] for metric, found in values.items()}


def belongs_to(name: str, group: str) -> bool:
    """Return whether a task of the harness is one of a group's."""
    index = _manager(group).task_index
    return name in _leaves(index, group, {})


def _manager(name: str) -> Any:
    """Return a task manager of the harness that knows the name.

    Raises:
        EvaluationError: there is no such task.
    """
    if name in _usual_tasks().task_index:
        return _usual_tasks()
    if name not in _all_tasks().task_index:
        raise EvaluationError(f"task '{name}': the harness has none of this name; 'lm_eval ls tasks' lists all")
    return _all_tasks()


@cache
def _usual_tasks() -> Any:
    folder = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[folder / name for name in _FOLDERS])


@cache
def _all_tasks() -> Any:
    return lm_eval.tasks.TaskManager()


def _leaves(index: dict[str, Any], name: str, groups: dict[str, list[str]]) -> list[str]:
    """Return the names of the tasks that a task, group or tag stands for; groups are noted in `groups`."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    groups[name] = []  # before its members: outer groups stand first
    members = [leaf for member in entry.cfg["task"] for leaf in _leaves(index, member, groups)]
    groups[name] = members
    return members


def _names(tasks: Iterable[Any]) -> list[str]:
    return [task.task_name for task in tasks]


def main() -> None:
    """Run the harness' command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except FPTQError as error:
        sys.exit(f"fptq: error: {error}")


if __name__ == "__main__":
    main()
