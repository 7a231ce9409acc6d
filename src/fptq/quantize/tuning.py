"""Tuning the weight scales and norms of a quantized model by what the whole model predicts.

Nothing that looks at one layer or one block sees what the rounding errors of all of them come to. Here the codes stay,
and each weight scale and each gain of a norm gets a factor. All factors learn together, by Adam: on calibration text,
the quantized model's distribution of the next token shall be the float model's. Scales learn so, from other targets, in
the second phase of EfficientQAT (arXiv 2407.11062, E2E-QP), and norms in Norm Tweaking (arXiv 2309.02784).

Most tokens can be guessed from the few before them, and left alone the factors learn those at the cost of what only the
text from further back tells. So tokens that a text repeats from far back count for more.

In memory are one block at a time, in float32, with its gradients; what lies outside the blocks; each block's input for
one sample; and four numbers for each factor, of which there is one for a group of weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from fptq import numerics
from fptq.checkpoint import LayerScheme, QuantizedLinear, read_linear
from fptq.errors import OutputError, QuantizationError
from fptq.models.architectures import NormSource, attention_name
from fptq.models.loading import FloatModel, fill_buffers, is_finite
from fptq.models.simulation import simulating, straight_through
from fptq.models.stepping import BlockStepper, products_in_bfloat16
from fptq.progress import progress_bar
from fptq.quantize.activations import cut_batches
from fptq.quantize.divergence import divergence
from fptq.quantize.quantized import quantized
from fptq.recipe import Activation
from fptq.shards import read_header, read_tensor, write_shard

LEARNING_RATE = 1e-3
"""Of the factors, once it has risen; from there it falls to zero. See `learning_rate`."""
MOST_CHANGE = 0.5
"""How far a factor can go from 1."""

RECALL_WEIGHT = 9.0
"""What a token that is recalled counts for, where others count for 1: see `token_weights`."""

_FAR_BACK = 16  # tokens
_RARE_SHARE = 8  # a token is rare that no more than one sample of so many has
_WIDTH = 600
_WARMUP_STEPS = 10
_BETAS = (0.9, 0.95)
_HELD_OUT_SHARE = 8  # one sample of so many, and not more than so many
_STEPS_BETWEEN_STATES = 10
_PASSES_OF_A_STEP = 4  # forward, forward again, and twice that backward


def learning_rate(hidden_size: int) -> float:
    """Return the rate for a model so wide: LEARNING_RATE, and less beyond a width of 600.

    Adam moves all factors by as much, whatever their gradients, and the more of them an output depends on, the further
    it moves: the rate has to fall as the width grows (μP, arXiv 2203.03466).
    """
    return LEARNING_RATE * min(1.0, _WIDTH / hidden_size)


def held_out(samples: int) -> int:
    """Return how many samples, the first ones, aren't tuned on but tell whether tuning was worth it."""
    return min(_HELD_OUT_SHARE, math.ceil(samples / _HELD_OUT_SHARE))


def samples_needed(samples: int, steps: int) -> int:
    """Return how many of the samples, the first ones, tuning looks at."""
    return min(samples, held_out(samples) + steps)


def token_weights(tokens: np.ndarray) -> np.ndarray:
    """Return what the prediction at each token counts for in what is learned, float32 [samples, length].

    `RECALL_WEIGHT` where the next token is recalled: the sample had it before, not within the last 16 tokens, and few
    samples have it at all. Names and what a text is about are so, where "the" and commas aren't.

    Args:
        tokens: int64 [samples, length].
    """
    weights = np.ones(tokens.shape, np.float32)
    in_samples = np.bincount(np.concatenate([np.unique(sample) for sample in tokens]))
    rare = in_samples <= len(tokens) // _RARE_SHARE
    for sample, of_sample in zip(tokens.tolist(), weights, strict=True):
        last_places: dict[int, int] = {}
        for place, token in enumerate(sample):
            if rare[token] and place - last_places.get(token, place) >= _FAR_BACK:
                of_sample[place - 1] = RECALL_WEIGHT
            last_places[token] = place
    return weights


@dataclass(frozen=True)
class Tuning:
    """What tuning came to.

    Attributes:
        tensors: new values of the checkpoint's tensors, by name; none, if the model got no better.
        kl_before: KL(float model ‖ quantized model) in nats, the mean over the tokens of the samples held out of
            tuning, to which codes were fitted as to all others.
        kl_after: the same, tuned; None, if learning ended in numbers that aren't finite.
    """

    tensors: dict[str, np.ndarray]
    kl_before: float
    kl_after: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the divergences, and whether the new values are kept, as JSON-ready values."""
        return {"kl_before": self.kl_before, "kl_after": self.kl_after, "kept": bool(self.tensors)}


@dataclass(frozen=True)
class _Block:
    """A block as the checkpoint has it; names are those within the block.

    Attributes:
        linears: its quantized layers.
        floats: the rest of its weights, float32.
        cache: the step sizes of keys and values, None for a cache in float.
    """

    linears: dict[str, QuantizedLinear]
    floats: dict[str, torch.Tensor]
    cache: tuple[float, float] | None

    @property
    def norms(self) -> dict[str, torch.Tensor]:
        """The weights of its norms."""
        return {name: tensor for name, tensor in self.floats.items() if _is_norm(name, tensor.shape)}


class Tuner:
    """A quantized model whose scales and norms learn.

    Args:
        source: the float model.
        parts: for each block, the safetensors file of its tensors in the checkpoint.
        schemes: of the quantized layers, by full name.
        tokens: int64 [samples, length], at least 2 samples.
        float_outputs: gives what the float model's last block gives for a sample, float32 [1, length, hidden].
        state: the file from which an interrupted tuning goes on.
    """

    def __init__(
        self,
        source: FloatModel,
        parts: Sequence[Path],
        schemes: Mapping[str, LayerScheme],
        tokens: np.ndarray,
        float_outputs: Callable[[int], torch.Tensor],
        state: Path,
    ):
        self._source = source
        self._parts = parts
        self._schemes = schemes
        self._tokens = torch.from_numpy(tokens)
        self._weights = torch.from_numpy(token_weights(tokens))
        self._float_outputs = float_outputs
        self._state = state
        self._stepper = BlockStepper(source, torch.float32)
        fused = [group.source for group in source.groups if isinstance(group.source, NormSource)]
        self._plus = float(any(norm.plus_one for norm in fused))  # what this architecture's norms add to their weights
        shapes = {name: source.tensors.shapes[source.file_names[name]] for name in source.names_outside_blocks()}
        self._outside = {name: source.read(name).float() for name, shape in shapes.items() if _is_norm(name, shape)}
        self._changes = {name: torch.zeros_like(weight) for name, weight in self._outside.items()}
        """Factors less 1, by the name of the tensor that each multiplies."""
        for index in range(len(parts)):
            block = self._read(index)
            for layer, linear in block.linears.items():
                self._changes[self._name(index, f"{layer}.weight_scale")] = torch.zeros(linear.scales.shape)
            for norm, weight in block.norms.items():
                self._changes[self._name(index, norm)] = torch.zeros_like(weight)
        self._rate = learning_rate(source.config.hidden_size)
        self._optimizer = torch.optim.Adam(self._changes.values(), lr=self._rate, betas=_BETAS)

    @torch.no_grad()
    def tune(self, steps: int, *, progress: bool = True) -> Tuning:
        """Return what learning comes to, from one sample in each step.

        Raises:
            QuantizationError: the divergence isn't finite before anything was learned.
            OutputError: the state can't be read or written.
        """
        kept_back = held_out(len(self._tokens))
        seen = range(kept_back, samples_needed(len(self._tokens), steps))
        done, before = self._load_state()
        total, initial = 2 * kept_back + _PASSES_OF_A_STEP * steps, _PASSES_OF_A_STEP * done
        with (
            self._source.loaded_outside(torch.float32),
            progress_bar(total, initial=initial, what="tuning", show=progress) as bar,
        ):
            if before is None:
                before = self._divergence_held_out(bar)
            if not math.isfinite(before):
                raise QuantizationError(f"the quantized model's divergence from the float model is {before}")
            for step in range(done, steps):
                epoch, place = divmod(step, len(seen))
                if not self._learn(seen[np.random.default_rng(epoch).permutation(len(seen))[place]]):
                    return Tuning({}, before, None)
                self._optimizer.param_groups[0]["lr"] = (
                    self._rate * min(1, (step + 1) / _WARMUP_STEPS) * (1 - step / steps)
                )
                self._optimizer.step()
                self._optimizer.zero_grad()
                for change in self._changes.values():
                    change.clamp_(-MOST_CHANGE, MOST_CHANGE)
                if (step + 1) % _STEPS_BETWEEN_STATES == 0:
                    self._save_state(step + 1, before)
                bar.set_description(f"tuning {step + 1}/{steps}")
                bar.update(_PASSES_OF_A_STEP)
            after = self._divergence_held_out(bar)
        return Tuning(self._tensors() if after < before else {}, before, after if math.isfinite(after) else None)

    def _divergence_held_out(self, bar: Any) -> float:
        """Return the mean divergence of the samples that aren't learned from."""
        divergences = []
        for start, count in cut_batches(self._tokens[: held_out(len(self._tokens))]):
            (outputs,) = deque(self._run(start, count), maxlen=1)
            divergences += [self._divergence(outputs[i : i + 1], start + i) for i in range(count)]
            bar.update(count)
        return sum(divergences) / len(divergences)

    def _learn(self, sample: int) -> bool:
        """Give every factor its gradient for a sample; return whether all of them are finite."""
        states = list(self._run(sample, 1))
        outputs = states.pop().requires_grad_()
        self._divergence(outputs, sample)
        for index in reversed(range(len(self._parts))):
            inputs = states.pop().requires_grad_()
            with self._running(index, learns=True) as run, torch.enable_grad():
                run(inputs).backward(outputs.grad)
            outputs = inputs
        gradients = [change.grad for change in self._changes.values() if change.grad is not None]
        return all(is_finite(gradient) for gradient in gradients)

    def _run(self, start: int, count: int) -> Iterator[torch.Tensor]:
        """Yield each block's input for some samples, and what the last one gives, [count, length, hidden] each."""
        states = self._stepper.embed(self._tokens[start : start + count])
        yield states
        for index in range(len(self._parts)):
            with self._running(index) as run:
                states = run(states)
            yield states

    def _divergence(self, outputs: torch.Tensor, sample: int) -> float:
        """Return the mean KL(float ‖ quantized model) of a sample.

        If `outputs` asks for gradients, it and the norms outside the blocks get those of the weighted mean.
        """
        targets, learns = self._float_outputs(sample), outputs.requires_grad
        total = 0.0
        for piece in self._stepper.pieces(targets.shape[1]):
            with self._norms_outside(tuned=False), products_in_bfloat16(learns):
                wanted = self._stepper.logits(targets[:, piece])
            with self._norms_outside(tuned=True), torch.set_grad_enabled(learns):
                with products_in_bfloat16(learns):
                    logits = self._stepper.logits(outputs[:, piece])
                parts = divergence(logits, wanted)[0] / targets.shape[1]
                if learns:
                    (parts * self._weights[sample, piece]).sum().backward()
            total += parts.sum().item()
        return total

    @contextmanager
    def _norms_outside(self, *, tuned: bool) -> Iterator[None]:
        """Let the norms outside the blocks be the float model's, or the tuned ones, which learn."""
        for name, weight in self._outside.items():
            value = self._gained(name, weight) if tuned else weight
            self._owner(name).weight = nn.Parameter(value, requires_grad=tuned)
        yield
        if tuned:
            for name, weight in self._outside.items():
                self._learn_from(name, self._owner(name).weight.grad, weight + self._plus)

    @contextmanager
    def _running(self, index: int, *, learns: bool = False) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Give what runs a block as it is now; if it learns, its factors get their gradients at the end."""
        stored, block = self._read(index), self._source.blocks[index]
        layers = simulating if learns else quantized  # integers are faster, where no gradient has to pass
        scaled = {
            layer: replace(linear, scales=self._scaled(self._name(index, f"{layer}.weight_scale"), linear))
            for layer, linear in stored.linears.items()
        }
        gained = {norm: self._gained(self._name(index, norm), weight) for norm, weight in stored.norms.items()}
        fill_buffers(self._source.model, block)
        block.load_state_dict({**stored.floats, **gained}, strict=False, assign=True)

        def run(states: torch.Tensor) -> torch.Tensor:
            with products_in_bfloat16(learns):
                return self._stepper.run_with_gradients(index, states, partial(_cached, stored.cache)).float()

        try:
            with layers(block, scaled):
                for key, parameter in block.named_parameters():
                    parameter.requires_grad_(learns and (key in gained or key.removesuffix(".weight") in scaled))
                yield run
                for layer, linear in scaled.items() if learns else ():
                    weight = block.get_submodule(layer).weight
                    products = weight.grad.mul_(weight.detach()).unflatten(1, (-1, linear.group_size)).sum(-1)
                    unscaled = torch.from_numpy(stored.linears[layer].scales / linear.scales)
                    self._learn_from(self._name(index, f"{layer}.weight_scale"), products, unscaled)
            for norm, weight in stored.norms.items() if learns else ():
                self._learn_from(self._name(index, norm), block.get_parameter(norm).grad, weight + self._plus)
        finally:
            block.to("meta")

    def _learn_from(self, name: str, gradient: torch.Tensor | None, value: torch.Tensor) -> None:
        """Add to a factor's gradient that of what it multiplies, times that; a norm that nothing passes has none."""
        if gradient is not None:
            change = self._changes[name]
            change.grad = gradient * value if change.grad is None else change.grad + gradient * value

    def _gained(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight of a norm whose gain its factor has multiplied."""
        return (weight + self._plus) * (1 + self._changes[name]) - self._plus

    def _read(self, index: int) -> _Block:
        part = self._parts[index]
        entries = read_header(part, OutputError)
        prefix, block = self._name(index, ""), self._source.blocks[index]

        def read(name: str) -> np.ndarray:
            return read_tensor(part, entries[name])

        names = [name.removeprefix(prefix) for name in self._schemes if name.startswith(prefix)]
        linears = {layer: read_linear(read, prefix + layer, self._schemes[prefix + layer]) for layer in names}
        floats = [
            key for key in block.state_dict() if prefix + key in entries and key.removesuffix(".weight") not in linears
        ]
        attention = prefix + attention_name(self._source.groups)
        scales = [
            float(read(f"{attention}.{kind}_scale")[0]) for kind in "kv" if f"{attention}.{kind}_scale" in entries
        ]
        return _Block(
            linears,
            {key: torch.from_numpy(read(prefix + key).astype(np.float32)) for key in floats},
            (scales[0], scales[1]) if scales else None,
        )

    def _scaled(self, name: str, linear: QuantizedLinear) -> np.ndarray:
        """Return the scales of a layer times their factors, exact in bfloat16: what learns is what will be stored."""
        scales = torch.from_numpy(linear.scales) * (1 + self._changes[name])
        return numerics.round_to_bfloat16(scales).numpy()

    def _tensors(self) -> dict[str, np.ndarray]:
        """Return the tuned tensors as the checkpoint stores them: scales in bfloat16, norms in float32."""
        tensors = {name: self._gained(name, weight).numpy() for name, weight in self._outside.items()}
        for index in range(len(self._parts)):
            block = self._read(index)
            for layer, linear in block.linears.items():
                name = self._name(index, f"{layer}.weight_scale")
                tensors[name] = self._scaled(name, linear).astype(ml_dtypes.bfloat16)
            for norm, weight in block.norms.items():
                tensors[self._name(index, norm)] = self._gained(self._name(index, norm), weight).numpy()
        return tensors

    def _name(self, index: int, inside: str) -> str:
        return f"{self._source.block_name(index)}.{inside}"

    def _owner(self, weight: str) -> nn.Module:
        return self._source.model.get_submodule(weight.rpartition(".")[0])

    def _save_state(self, done: int, before: float) -> None:
        """Write all that the next step depends on."""
        tensors = {"done": np.array([done]), "kl_before": np.array([before])}
        for name, change in self._changes.items():
            state = self._optimizer.state[change]
            if state:
                parts = (("change", change), ("mean", state["exp_avg"]), ("square", state["exp_avg_sq"]))
                tensors |= {f"{part}:{name}": tensor.numpy() for part, tensor in parts}
        write_shard(self._state, tensors)

    def _load_state(self) -> tuple[int, float | None]:
        """Return how many steps an interrupted tuning has done, and the divergence before them."""
        if not self._state.is_file():
            return 0, None
        entries = read_header(self._state, OutputError)
        stored = {name: torch.from_numpy(read_tensor(self._state, entry)) for name, entry in entries.items()}
        done = int(stored["done"])
        for name, change in self._changes.items():
            if f"change:{name}" in stored:
                change.copy_(stored[f"change:{name}"])
                moments = {"exp_avg": stored[f"mean:{name}"], "exp_avg_sq": stored[f"square:{name}"]}
                self._optimizer.state[change] = {"step": torch.tensor(float(done)), **moments}
        return done, float(stored["kl_before"])


def _is_norm(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 1


def _cached(
    scales: tuple[float, float] | None, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as the int8 cache has them."""
    if scales is None:
        return keys, values

    def rounded(states: torch.Tensor, scale: float) -> torch.Tensor:
        return straight_through(states, lambda x: numerics.simulate(x, Activation.STATIC, scale))

    return rounded(keys, scales[0]), rounded(values, scales[1])
