"""How much the float model's predictions mind errors in the outputs of each layer.

GPTQ makes the error of a layer's outputs small, and counts all outputs and all tokens alike. Predictions don't: some
outputs hardly matter to them, errors of some cancel those of others, and at some tokens errors do more than at others.
The Fisher information of a layer's weights says which. It is taken for a Kronecker product (K-FAC, arXiv 1503.05671) of
the inputs' Gram matrix, in which tokens have weights (GuidedQuant, arXiv 2505.07004), and the Gram matrix of gradients
of the outputs. Weights and the latter are made here, from the gradient g of the negative log likelihood of tokens that
the model itself draws. Its direction goes into the outputs' matrix, the sum of g·gᵀ / |g|² over tokens, and its length
into the inputs': a token's weight is |g|. (The information itself has |g|² for it, but then few tokens would speak for
all.) Rounding by both matrices is YAQA (arXiv 2505.22988).

The float model has run forward before, and its blocks' inputs were kept (`FloatRun`); here it is gone through backward,
block by block. In memory is one block at a time, and for the gradients it begins with what lies outside the blocks. The
matrix of a long output is cut into squares along its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fptq.errors import OutputError
from fptq.models.loading import FloatModel
from fptq.models.stepping import BlockStepper, products_in_bfloat16
from fptq.progress import progress_bar
from fptq.quantize.activations import ActivationFile, cut_batches, require_finite
from fptq.quantize.float_run import FloatRun
from fptq.quantize.gram import add_to_gram_, complete_gram_, rescale_gram
from fptq.shards import read_header, read_tensor, write_shard

MOST_OUTPUTS = 2048
"""A layer with more outputs has a matrix for each so many of them, as if those of others were independent."""

_NOISE = 1e-6  # of the mean energy: what a gradient that should be 0 has, as that of the first token's query
_TINY = torch.finfo(torch.float32).tiny
_GRADIENTS = torch.float32  # what the files hold


class FisherInformation:
    """The Fisher information of every linear layer: its outputs' matrices, and what its inputs' tokens count for.

    Args:
        source: the float model.
        tokens: int64 [samples, length], all of which are looked at.
        float_run: of the model over these samples, which keeps their inputs; they are removed when they have served.
        folder: where files are; an interrupted computation goes on from them.
        needed: full names of the layers whose outputs' matrices are wanted; others have none.
    """

    def __init__(
        self,
        source: FloatModel,
        tokens: np.ndarray,
        float_run: FloatRun,
        folder: Path,
        needed: Collection[str],
    ):
        self._source = source
        self._tokens = torch.from_numpy(tokens)
        self._float_run = float_run
        self._layers = [layer for group in source.groups for layer in group.layers]
        self._needed = needed
        self._folder = folder
        self._stepper = BlockStepper(source, torch.float32)
        self._batches = cut_batches(tokens)

    def compute(self, *, progress: bool = True) -> None:
        """Make the matrices of all blocks, from the last to the first one; the float run must be complete.

        Raises:
            QuantizationError: gradients have a NaN or an infinity.
            OutputError: a file can't be read or written.
        """
        blocks, batches, samples = len(self._source.blocks), len(self._batches), len(self._tokens)
        done = [index for index in range(blocks) if self._matrices(index).is_file()]
        due = min(done, default=blocks)
        # first the gradient of each sample's loss; then a block runs forward again, backward, and sums as long
        total = samples + 3 * blocks * batches
        initial = samples + 3 * (blocks - due) * batches if done else 0
        with progress_bar(total, initial=initial, what="sensitivities", show=progress) as bar:
            self._stepper.learn_arguments(self._tokens, self._batches)
            if not done:
                self._begin(bar)
            for index in reversed(range(due)):
                self._run_backward(index, bar)
                self._float_run.inputs(index).path.unlink(missing_ok=True)
        for file in (self._gradients(0), self._gradients(1)):
            file.path.unlink(missing_ok=True)

    def output_grams(
        self, index: int, divisors: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Return the matrices of a block's layers, float32 [r, r] each, of r outputs that follow each other.

        Args:
            index: of the block.
            divisors: what each output [n] of a layer has been divided by since, of the layers where any was.
        """
        path, block = self._matrices(index), self._source.blocks[index]
        entries = read_header(path, OutputError)
        grams = {}
        for layer in self._layers_needed(index):
            sides = _sides(block.get_submodule(layer))
            # an output that is divided by d has a gradient d times as large
            factors = (1 / (divisors or {}).get(layer, torch.ones(sum(sides)))).split(sides)
            parts = [torch.from_numpy(read_tensor(path, entries[f"{layer}.{number}"])) for number in range(len(sides))]
            grams[layer] = [rescale_gram(part, factor) for part, factor in zip(parts, factors, strict=True)]
        return grams

    def token_weights(self, index: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return what each token counts for in the inputs of a block, float32 [tokens], by first layer.

        It is |g| over all outputs of the layers that read the input, and has the mean 1.

        Args:
            index: of the block.
            tokens: how many there are in all; those of samples that weren't looked at count 1.
        """
        path = self._matrices(index)
        entries = read_header(path, OutputError)
        weights = {}
        for group in self._source.groups:
            energies = [torch.from_numpy(read_tensor(path, entries[_energies(layer)])) for layer in group.layers]
            roots = torch.stack(energies).sum(0).sqrt()
            mean = roots.mean()
            known = roots / mean if mean > 0 else torch.ones_like(roots)
            weights[group.layers[0]] = functional.pad(known, (0, tokens - len(known)), value=1.0)
        return weights

    def drop(self, index: int) -> None:
        """Remove what was made for a block."""
        self._matrices(index).unlink(missing_ok=True)

    def disk_bytes(self, reached: int | None = None) -> int:
        """Return what the files take at most, or what is left of them when the walk has come to block `reached`."""
        gradients = 2 * _GRADIENTS.itemsize * self._tokens.numel() * self._source.config.hidden_size
        size = gradients if reached is None else 0
        for index in range(reached or 0, len(self._source.blocks)):
            layers = [self._source.blocks[index].get_submodule(layer) for layer in self._layers_needed(index)]
            size += sum(4 * side**2 for layer in layers for side in _sides(layer))
            size += 4 * self._tokens.numel() * len(self._layers)
        return size

    def _begin(self, bar: Any) -> None:
        """Make the gradients of what the last block gives."""
        last = len(self._source.blocks) - 1
        with self._source.loaded_block(last, torch.float32):  # the stepper learns what blocks give
            self._stepper.run(last, self._float_run.inputs(last).read(*self._batches[0]).float())
        gradients = self._gradients(last + 1)
        with self._source.loaded_outside(torch.float32):
            for sample in range(len(self._tokens)):
                gradients.write(sample, self._gradient(sample))
                bar.update()
        gradients.flush()

    def _gradient(self, sample: int) -> torch.Tensor:
        """Return the gradient, in the last block's outputs, of the loss of tokens drawn from what they predict."""
        outputs = self._float_run.outputs(sample).requires_grad_()
        generator = torch.Generator().manual_seed(sample)
        for piece in self._stepper.pieces(outputs.shape[1]):
            with torch.enable_grad():
                with products_in_bfloat16(True):
                    logits = self._stepper.logits(outputs[:, piece])
                require_finite(logits, "the output head", sample)
                gradient = logits.detach().float().softmax(-1)  # of -log p(drawn), once 1 is taken from what is drawn
                drawn = torch.multinomial(gradient[0], 1, generator=generator)
                gradient[0].scatter_add_(1, drawn, -torch.ones(drawn.shape))
                logits.backward(gradient.to(logits.dtype))
        assert outputs.grad is not None
        return outputs.grad

    def _run_backward(self, index: int, bar: Any) -> None:
        """Make a block's matrices and energies, and the gradients of its inputs."""
        with self._source.loaded_block(index, torch.float32) as block, self._summing(index, block) as (sums, energies):
            for start, count in self._batches:
                inputs = self._float_run.inputs(index).read(start, count).float().requires_grad_()
                with torch.enable_grad(), products_in_bfloat16(True):
                    outputs = self._stepper.run_with_gradients(index, inputs, lambda keys, values: (keys, values))
                outputs.float().backward(self._gradients(index + 1).read(start, count))
                assert inputs.grad is not None
                require_finite(inputs.grad, self._source.block_name(index), start, "the gradient of its input")
                self._gradients(index).write(start, inputs.grad)
                bar.update(3)
        self._gradients(index).flush()
        tensors = {_energies(layer): torch.cat(parts).numpy() for layer, parts in energies.items()}
        for layer, matrices in sums.items():
            for number, matrix in enumerate(matrices):
                complete_gram_(matrix)
                tensors[f"{layer}.{number}"] = matrix.numpy()
        write_shard(self._matrices(index), tensors)

    @contextmanager
    def _summing(
        self, index: int, block: nn.Module
    ) -> Iterator[tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]]:
        """Let the layers' matrices grow by the gradients of their outputs in each backward pass inside the `with`.

        The second of what it gives has the tokens' |g|² of each pass.
        """
        sums: dict[str, list[torch.Tensor]] = {}
        energies: dict[str, list[torch.Tensor]] = {}
        handles = []
        needed = self._layers_needed(index)
        for layer in self._layers:
            module = block.get_submodule(layer)
            energies[layer] = []
            if layer in needed:
                sums[layer] = [torch.zeros(side, side) for side in _sides(module)]

            def add(gradient: torch.Tensor, layer: str = layer) -> None:
                rows = gradient.reshape(-1, gradient.shape[-1]).float()
                energy = rows.square().sum(1)
                energies[layer].append(energy)
                if layer not in sums:
                    return
                rows = rows / (energy + _NOISE * energy.mean() + _TINY).sqrt()[:, None]
                for matrix, part in zip(sums[layer], rows.split(MOST_OUTPUTS, dim=1), strict=True):
                    add_to_gram_(matrix, part)

            def hook(_: nn.Module, __: Any, output: torch.Tensor, add: Callable[[torch.Tensor], None] = add) -> None:
                output.register_hook(add)

            handles.append(module.register_forward_hook(hook))
        try:
            yield sums, energies
        finally:
            for handle in handles:
                handle.remove()

    def _layers_needed(self, index: int) -> list[str]:
        """Return the names within a block of the layers that have matrices there."""
        prefix = self._source.block_name(index)
        return [layer for layer in self._layers if f"{prefix}.{layer}" in self._needed]

    def _gradients(self, index: int) -> ActivationFile:
        """Return the file of the gradients of block `index`'s inputs."""
        path = self._folder / f"fisher-gradients.{index % 2}"
        return ActivationFile(path, self._tokens.shape[1], self._source.config.hidden_size, _GRADIENTS)

    def _matrices(self, index: int) -> Path:
        return self._folder / f"fisher-{index:05d}.safetensors"


def _energies(layer: str) -> str:
    return f"{layer}.energies"


def _sides(layer: nn.Module) -> list[int]:
    """Return the sides of the squares that a layer's matrix is cut into."""
    outputs: int = layer.out_features
    return [min(MOST_OUTPUTS, outputs - first) for first in range(0, outputs, MOST_OUTPUTS)]
