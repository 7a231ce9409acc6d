"""Figures with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where one sample doesn't tell."""

    value: float
    standard_error: float | None

    def scaled(self, factor: float) -> Estimate:
        """Return the figure in another unit, as a share in percent."""
        error = self.standard_error
        return Estimate(factor * self.value, None if error is None else factor * error)

    def increase(self) -> Estimate:
        """Return a ratio as what it is above 1."""
        return Estimate(self.value - 1, self.standard_error)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, with the standard error of the sample."""
    average = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(average, None)
    variance = math.fsum((value - average) ** 2 for value in values) / (len(values) - 1)
    return Estimate(average, math.sqrt(variance / len(values)))


def mean_of_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent figures, as of several benchmarks."""
    errors = [estimate.standard_error for estimate in estimates]
    known = [error for error in errors if error is not None]
    error = math.sqrt(math.fsum(e * e for e in known)) / len(estimates) if len(known) == len(errors) else None
    return Estimate(math.fsum(estimate.value for estimate in estimates) / len(estimates), error)


def stratified_mean(strata: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean of all values; its error comes from the deviations within each stratum, as a benchmark's subject.

    With one stratum this is `mean`.
    """
    count = sum(len(values) for values in strata)
    average = math.fsum(value for values in strata for value in values) / count
    if count == len(strata):
        return Estimate(average, None)
    centers = [math.fsum(values) / len(values) for values in strata]
    squares = ((x - center) ** 2 for values, center in zip(strata, centers, strict=True) for x in values)
    return Estimate(average, math.sqrt(math.fsum(squares) / (count - len(strata)) / count))


def exponential_of_mean(values: Sequence[float]) -> Estimate:
    """Return exp(mean), the perplexity if the values are losses; its error is the mean's times it (first order)."""
    estimate = mean(values)
    value = math.exp(estimate.value)
    return Estimate(value, None if estimate.standard_error is None else value * estimate.standard_error)


def perplexity_ratio(losses: Sequence[float], base: Sequence[float]) -> Estimate:
    """Return the ratio of two perplexities; its error is that of the differences of the same windows' losses."""
    return exponential_of_mean([loss - other for loss, other in zip(losses, base, strict=True)])


def share(hits: Sequence[bool]) -> Estimate:
    """Return the share of True, with the binomial standard error."""
    value = sum(hits) / len(hits)
    return Estimate(value, math.sqrt(value * (1 - value) / len(hits)))
