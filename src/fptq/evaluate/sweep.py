"""How sensitive a recipe is to its settings: the same recipe with other values, as contenders of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fptq.errors import EvaluationError
from fptq.evaluate.compare import FLOAT, Contender
from fptq.presets import get_recipe
from fptq.recipe import Recipe

SWEPT = ("v0", "v1", "alpha", "group_size", "percentile")
"""The settings that can be swept."""


@dataclass(frozen=True)
class Sweep:
    """A recipe and the values that its settings take.

    Attributes:
        recipe: with its own values of all settings.
        values: setting → values.
        grid: every combination of values; otherwise one setting changes at a time.
    """

    recipe: Recipe
    values: Mapping[str, Sequence[float]]
    grid: bool = False

    def __post_init__(self) -> None:
        if not self.values or not all(self.values.values()):
            raise EvaluationError(f"nothing to sweep: give values for one of {', '.join(SWEPT)}")
        idle = sorted(set(self.values) & set(self.recipe.idle_fields()))
        if idle:
            raise EvaluationError(f"{idle[0]} changes nothing with recipe {self.recipe.name}")

    def settings(self) -> list[dict[str, Any]]:
        """Return each different combination of the swept settings, the recipe's own first.

        A v0 above v1 can't be: `impossible` has those.
        """
        return [s for s in self._all() if s not in self.impossible()]

    def impossible(self) -> list[dict[str, Any]]:
        """Return the combinations that no recipe can have."""
        return [s for s in self._all() if s.get("v0", self.recipe.v0) > s.get("v1", self.recipe.v1)]

    def _all(self) -> list[dict[str, Any]]:
        own = {name: getattr(self.recipe, name) for name in self.values}
        if self.grid:
            wanted = [
                dict(zip(self.values, combination, strict=True)) for combination in product(*self.values.values())
            ]
        else:
            wanted = [{**own, name: value} for name, values in self.values.items() for value in values]
        return [dict(pairs) for pairs in dict.fromkeys(tuple(s.items()) for s in [own, *wanted])]

    def contenders(self) -> list[Contender]:
        """Return the float model, weights alone, and the recipe with each combination."""
        weights_only = get_recipe("rtn-w4a16", group_size=self.recipe.group_size)
        return [
            Contender(FLOAT, None),
            Contender(weights_only.name, weights_only),
            *(Contender(label_of(s), replace(self.recipe, **s)) for s in self.settings()),
        ]


def label_of(settings: Mapping[str, Any]) -> str:
    """Return settings as text, as "v0=15, alpha=1"."""
    return ", ".join(f"{name}={value:.10g}" for name, value in settings.items())
