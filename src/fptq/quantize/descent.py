"""Going back to the codes that GPTQ found, one after the other, while all others stay: coordinate descent.

GPTQ rounds a column knowing what earlier ones came to, and later ones not at all. With the Gram matrices H of the
inputs and G of the outputs' gradients, errors E of a layer's weights cost tr(G E H Eᵀ), and the code in row i and
column j alone would best let its error fall by (G E H)_ij / (G_ii H_jj). QuantEase (arXiv 2309.01885) does so for
G = 1.

A row's columns in turn are the Gauss-Seidel method, rounded as it goes. That is GPTQ's loop, in which the inverse of
H's lower triangle takes the place of the Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fptq import numerics
from fptq.runtime.kernels import Kernels

_ROWS = 32  # that are looked at together, as if their outputs had nothing to do with each other
_COLUMNS = 128  # of which each knows what became of those before it


class Descent:
    """Goes back to the codes of layers that read one input.

    Args:
        gram: XᵀX float32 [k, k], damped.
    """

    def __init__(self, gram: torch.Tensor):
        self._gram = gram
        self._kernels = Kernels(threads=torch.get_num_threads())
        self._triangles = []
        """Inverses of the lower triangles of the squares along the diagonal."""
        for start in range(0, len(gram), _COLUMNS):
            square = gram[start : start + _COLUMNS, start : start + _COLUMNS].tril()
            self._triangles.append(torch.linalg.solve_triangular(square, torch.eye(len(square)), upper=False))

    def improve(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bits: int,
        outputs: Sequence[torch.Tensor],
        rounds: int,
    ) -> torch.Tensor:
        """Return int8 codes [n, k] whose errors cost no more than those of `codes`.

        Args:
            weight: float32 [n, k].
            codes: int8 [n, k], to begin with.
            scales: float32 [n, G], of each group.
            bits: of a code.
            outputs: Gram matrices of the gradients of some outputs that follow each other, all n together, damped.
            rounds: how often every code is looked at.
        """
        parts, start = [], 0
        for output_gram in outputs:
            rows = slice(start, start := start + len(output_gram))
            parts.append(self._improve(weight[rows], codes[rows].clone(), scales[rows], bits, output_gram, rounds))
        return torch.cat(parts)

    def _improve(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bits: int,
        output_gram: torch.Tensor,
        rounds: int,
    ) -> torch.Tensor:
        steps = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
        slopes = (weight - numerics.dequantize_weight(codes, scales)) @ self._gram  # E H
        n = len(weight)
        apart = -(-n // _ROWS)

        def visit(rows: torch.Tensor) -> None:
            own = output_gram[rows[:, None], rows]
            gradient = output_gram[rows] @ slopes
            pull = gradient / torch.diagonal(own)[:, None]
            found, change, change_of_slopes = self._in_turn(codes[rows], steps[rows], bits, pull)
            if float((change * (own @ change_of_slopes - 2 * gradient)).sum()) <= 0:  # the change of the cost
                codes[rows] = found
                slopes[rows] -= change_of_slopes
            elif len(rows) > 1:  # rows that pull the same way have gone too far together
                visit(rows[::2])
                visit(rows[1::2])

        for _ in range(rounds):
            for first in range(apart):
                visit(torch.arange(first, n, apart))
        return codes

    def _in_turn(
        self, codes: torch.Tensor, steps: torch.Tensor, bits: int, pull: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give rows of codes [r, k] what is best for them, each column as those before it leave it to be.

        `pull` is the rows' part of G E H over the diagonal of G, float32 [r, k].

        Returns:
            int8 codes, by how much the weights that they stand for change, and what that is times H.
        """
        found, change, change_of_slopes = torch.empty_like(codes), torch.empty_like(pull), torch.zeros_like(pull)
        for triangle, start in zip(self._triangles, range(0, codes.shape[1], _COLUMNS), strict=True):
            columns = slice(start, start + _COLUMNS)
            own_steps = steps[:, columns]
            values = codes[:, columns] * own_steps
            wanted = values + (pull[:, columns] - change_of_slopes[:, columns]) @ triangle.T
            part, _ = self._kernels.round_in_turn(
                wanted.T.contiguous().numpy(), own_steps.T.contiguous().numpy(), triangle.numpy(), bits
            )
            found[:, columns] = torch.from_numpy(part).T
            change[:, columns] = found[:, columns] * own_steps - values
            moved = start + change[:, columns].any(0).nonzero()[:, 0]  # few are
            change_of_slopes.addmm_(change[:, moved], self._gram[moved])
        return found, change, change_of_slopes
