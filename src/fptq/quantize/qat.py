"""Data-free quantization-aware training of the linear layers before they are rounded (LLM-QAT, arXiv 2305.17888).

The model writes its own training text. A student, which is the model with its blocks' linear layers rounded as the
checkpoint will have them, learns to predict what the float model predicts on that text. Rounding to nearest has no
gradient: the straight-through estimator takes it for the identity, so that the gradient by a rounded weight moves the
weight behind it. Nothing here saturates, since every scale comes from the largest value (MinMax).

Unlike the rest of quantizing, this needs the whole model in memory: 4 bytes for each weight of the model, 20 more for
each weight that is trained (itself, rounded, its gradient, two moments), and what one sequence's backward pass needs,
of which the logits are length · vocabulary · 4 bytes some five times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fptq import numerics
from fptq.errors import OutputError, QuantizationError
from fptq.models.loading import FloatModel, cache_argument
from fptq.models.simulation import straight_through
from fptq.models.stepping import PassingCache, empty_cache
from fptq.models.text import beginning_of_sequence
from fptq.progress import progress_bar
from fptq.quantize.calibration import plain_tokens
from fptq.quantize.divergence import divergence
from fptq.quantize.policy import choose_group_size, is_skipped
from fptq.recipe import Activation
from fptq.shards import read_header, read_tensor, write_durably, write_json, write_shard

WEIGHTS_FILE = "trained.safetensors"
LOG_FILE = "training.json"
_STATE_FILE = "training.safetensors"
_STEPS_BETWEEN_STATES = 20
_SEQUENCES_AT_ONCE = 64  # when generating: more make its KV cache larger, and hardly make it faster


@dataclass(frozen=True)
class TrainingSpec:
    """How to train.

    Attributes:
        steps: updates of the weights.
        batch: sequences in a step. The text has steps · batch of them: none is seen twice.
        length: tokens in a sequence.
        learning_rate: of the first step; it falls to zero along a half cosine. The default suits the few steps that a
            CPU has time for (docs/experiments.md, 2026-11-26); the paper's for its 100,000 sequences is 2e-5.
        weight_bits: of a weight's code.
        group_size: input channels that share a weight scale; 0 is one scale for each output channel. Where it doesn't
            divide a layer's in_features, a smaller one is taken, as in every recipe.
        quantize_activations: whether the layers' inputs are 8-bit codes with a scale for each token, and the KV cache
            too.
        skip: shell patterns; linear layers whose full name matches one stay in float and are not trained.
        seed: of the text.
    """

    steps: int = 50
    batch: int = 4
    length: int = 128
    learning_rate: float = 3e-4
    weight_bits: int = numerics.WEIGHT_BITS
    group_size: int = 0
    quantize_activations: bool = True
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.length < 2:
            raise QuantizationError(
                f"training of {self.steps} steps, {self.batch} sequences each, of {self.length} tokens: "
                "needed at least 1, 1 and 2"
            )
        if not 0 < self.learning_rate < 1:
            raise QuantizationError(f"learning rate {self.learning_rate}: needed a number between 0 and 1")
        if not 2 <= self.weight_bits <= 8:
            raise QuantizationError(f"training for {self.weight_bits} weight bits: needed 2 to 8")
        if self.group_size < 0 or self.seed < 0:
            raise QuantizationError(
                f"training with group size {self.group_size}, seed {self.seed}: needed 0 or a positive number"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as JSON-ready values."""
        return {**asdict(self), "skip": list(self.skip)}


def train(source: FloatModel, spec: TrainingSpec, folder: Path, *, progress: bool = True) -> Path:
    """Return the safetensors file of the trained weights, float32 under their names in the model's state dict.

    `numerics.quantize_weight` with `spec`'s bits and group sizes gives the codes and scales that the student has with
    them. Beside the file, training.json has the loss of each step. The source is as before, afterwards.

    Args:
        source: the float model. The architecture's linear layers inside the decoder blocks are trained, and nothing
            else.
        spec: how.
        folder: is made if need be, and belongs to this model and `spec` alone. An interrupted training goes on from
            what it has there: text by 64 sequences, weights and the optimizer's moments every 20 steps.
        progress: show a progress bar.

    Raises:
        QuantizationError: no layer is left to train, the text is too long for the model, or the loss isn't finite.
        CalibrationError: the vocabulary has only special tokens.
        OutputError: the folder can't be written, or what it has is damaged.
    """
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    source.check_length(spec.length, QuantizationError)
    sizes = group_sizes(source, spec)
    folder.mkdir(exist_ok=True)
    with source.loaded(torch.float32) as model:
        text = generate_text(source, model, spec, folder, progress=progress)
        training = _Training(model, spec, sizes, folder)
        with progress_bar(spec.steps, initial=len(training.losses), show=progress) as bar:
            for step in range(len(training.losses), spec.steps):
                training.step(text[step * spec.batch : (step + 1) * spec.batch])
                bar.set_description(f"loss {training.losses[-1]:.4f}")
                bar.update()
                if (step + 1) % _STEPS_BETWEEN_STATES == 0:
                    training.save_state()
    write_json(folder / LOG_FILE, {"losses": training.losses})
    write_shard(path, {name: weight.numpy() for name, weight in training.weights.items()})
    (folder / _STATE_FILE).unlink(missing_ok=True)
    return path


def disk_bytes(source: FloatModel, spec: TrainingSpec) -> int:
    """Return how much `train` writes into its folder at most: weights and two moments twice, and the text."""
    shapes = (source.tensors.shapes[source.file_names[name]] for name in group_sizes(source, spec))
    return 24 * sum(map(math.prod, shapes)) + 4 * spec.steps * spec.batch * spec.length


def group_sizes(source: FloatModel, spec: TrainingSpec) -> dict[str, int]:
    """Return the group size of each weight that is trained, by its name in the state dict.

    Raises:
        QuantizationError: there is none, or no group size fits it.
    """
    sizes = {}
    for index, block in enumerate(source.blocks):
        for layer in (layer for group in source.groups for layer in group.layers):
            name = f"{source.block_name(index)}.{layer}"
            width = block.get_submodule(layer).weight.shape[1]
            if not is_skipped(name, spec.skip):
                size = choose_group_size(width, spec.group_size, name) if spec.group_size else width
                sizes[f"{name}.weight"] = size
    if not sizes:
        raise QuantizationError("--skip leaves no layer to train")
    return sizes


def generate_text(
    source: FloatModel, model: nn.Module, spec: TrainingSpec, folder: Path, *, progress: bool
) -> torch.Tensor:
    """Return token ids [steps · batch, length] that the model writes; what the folder has of them isn't made again.

    A sequence goes on behind an end-of-text token, as in text that is packed for training.
    """
    count = spec.steps * spec.batch
    ordinary = plain_tokens(source.tokenizer, source.config.vocab_size)
    start = torch.tensor(beginning_of_sequence(source.tokenizer), dtype=torch.int64)
    parts = []
    with progress_bar(count * spec.length, what="generating", show=progress) as bar:
        for first in range(0, count, _SEQUENCES_AT_ONCE):
            path = folder / f"text-{first:07d}.npy"
            rows = min(_SEQUENCES_AT_ONCE, count - first)
            if path.is_file():
                bar.update(rows * spec.length)
            else:
                random = np.random.default_rng([spec.seed, first])
                begun = torch.from_numpy(random.choice(ordinary, size=(rows, 1)))
                begun = torch.cat([start.expand(rows, -1), begun], dim=1)[:, : spec.length]
                written = _continue(model, begun, spec.length, random, bar)
                write_durably(path, partial(_save, written.numpy().astype(np.int32)))
            parts.append(np.load(path))
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _save(array: np.ndarray, file: Any) -> None:
    np.save(file, array)


@torch.no_grad()
def _continue(
    model: nn.Module, tokens: torch.Tensor, length: int, random: np.random.Generator, bar: Any
) -> torch.Tensor:
    """Return `tokens` continued to `length`: the likeliest 3 to 5 times, then drawn from the whole distribution."""
    generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    greedy_until = tokens.shape[1] + torch.from_numpy(random.integers(3, 6, size=(len(tokens), 1)))
    bar.update(tokens.numel())
    fed, cache = tokens, empty_cache(model)
    while tokens.shape[1] < length:
        logits = model(fed, **cache_argument(model, cache), use_cache=True).logits[:, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise QuantizationError("the float model's logits have a NaN or an infinity: its weights are damaged")
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        fed = torch.where(tokens.shape[1] < greedy_until, logits.argmax(dim=-1, keepdim=True), drawn)
        tokens = torch.cat([tokens, fed], dim=1)
        bar.update(len(fed))
    return tokens


def _round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., k] rounded to 8-bit codes with a scale for each row, and back."""
    return straight_through(x, lambda rows: numerics.simulate(rows, Activation.DYNAMIC))


def _round_cached(states: torch.Tensor) -> torch.Tensor:
    """Return keys or values [batch, heads, length, head_dim] rounded; the heads of a token share its scale."""
    tokens = states.transpose(1, 2)
    return _round_tokens(tokens.flatten(2)).view_as(tokens).transpose(1, 2)


def fake_quantize(weights: Mapping[str, torch.Tensor], sizes: Mapping[str, int], bits: int) -> dict[str, torch.Tensor]:
    """Return the weights as their codes and scales give them back; `sizes` are their group sizes."""
    return {
        name: numerics.dequantize_weight(*numerics.quantize_weight(weight, sizes[name], bits))
        for name, weight in weights.items()
    }


@contextmanager
def quantized_layers(model: nn.Module, rounded: Mapping[str, torch.Tensor], *, activations: bool) -> Iterator[None]:
    """Let the layers that have these weights compute with `rounded` ones, and with rounded inputs if `activations`."""

    def forward(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(_round_tokens(x) if activations else x, weight, bias)

    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in rounded}
    for name, layer in layers.items():
        layer.forward = partial(forward, rounded[name], layer.bias)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def student_logits(
    model: nn.Module, rounded: Mapping[str, torch.Tensor], tokens: torch.Tensor, *, activations: bool
) -> torch.Tensor:
    """Return the student's logits [batch, length, vocabulary]; if `activations`, its KV cache is rounded as well."""
    cache = PassingCache(lambda keys, values: (_round_cached(keys), _round_cached(values))) if activations else None
    with quantized_layers(model, rounded, activations=activations):
        return model(tokens, **cache_argument(model, cache), use_cache=activations).logits


class _Training:
    """The weights under training, the optimizer, and the losses so far; goes on from the folder's state, if any."""

    def __init__(self, model: nn.Module, spec: TrainingSpec, sizes: dict[str, int], folder: Path):
        self._model = model
        self._spec = spec
        self._sizes = sizes
        self._path = folder / _STATE_FILE
        self.losses: list[float] = []
        self.weights = {name: model.get_parameter(name).detach().clone() for name in sizes}
        self._optimizer = torch.optim.AdamW(self.weights.values(), lr=spec.learning_rate, weight_decay=0.0)
        if self._path.is_file():
            self._load_state()

    def step(self, tokens: torch.Tensor) -> None:
        """Update the weights by the mean gradient over sequences [batch, length], one after the other."""
        rounded = fake_quantize(self.weights, self._sizes, self._spec.weight_bits)
        for weight in rounded.values():
            weight.requires_grad_()
        loss = 0.0
        for sequence in tokens.split(1):
            with torch.no_grad():
                wanted = self._model(sequence, use_cache=False).logits
            logits = student_logits(self._model, rounded, sequence, activations=self._spec.quantize_activations)
            part = divergence(logits, wanted).mean() / len(tokens)
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise QuantizationError(
                f"training: the loss of step {len(self.losses) + 1} is {loss}; "
                f"train for fewer steps, or in Python with a learning_rate below {self._spec.learning_rate:g}"
            )
        for name, weight in self.weights.items():
            weight.grad = rounded[name].grad
        done = len(self.losses) / self._spec.steps
        self._optimizer.param_groups[0]["lr"] = self._spec.learning_rate * (1 + math.cos(math.pi * done)) / 2
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss)

    def save_state(self) -> None:
        """Write all that the next step depends on. Nothing random is left in it: the text is on the disk."""
        tensors = {"losses": np.array(self.losses)}
        for name, weight in self.weights.items():
            state = self._optimizer.state[weight]
            for part, tensor in (("weight", weight), ("mean", state["exp_avg"]), ("square", state["exp_avg_sq"])):
                tensors[f"{part}:{name}"] = tensor.numpy()
        write_shard(self._path, tensors)

    def _load_state(self) -> None:
        entries = read_header(self._path, OutputError)

        def read(name: str) -> np.ndarray:
            if name not in entries:
                raise OutputError(f"{self._path}: has no '{name}'; it belongs to another training: remove it")
            return read_tensor(self._path, entries[name])

        self.losses = read("losses").tolist()
        for name, weight in self.weights.items():
            weight.copy_(torch.from_numpy(read(f"weight:{name}")))
            self._optimizer.state[weight] = {
                "step": torch.tensor(float(len(self.losses))),
                "exp_avg": torch.from_numpy(read(f"mean:{name}")),
                "exp_avg_sq": torch.from_numpy(read(f"square:{name}")),
            }
