"""What the vLLM plugin runs, known without vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from fptq.checkpoint import LayerScheme


def refusal(schemes: Sequence[tuple[str, LayerScheme]]) -> str | None:
    """Return why the plugin can't run layers of these schemes, each with a layer's name; None if it can."""
    for name, scheme in schemes:
        if scheme.bits != 4 or scheme.group_size is None or not scheme.standard:
            scales = "by rows" if scheme.group_size is None else f"in groups of {scheme.group_size}"
            form = (
                f"int{scheme.bits} weights {scales}" if scheme.standard else "a scheme that only a simulation computes"
            )
            return f"{name}: the vLLM plugin runs int4 weights in groups, and not {form}"
        if not scheme.activation.runs_in_int8:
            return (
                f"{name}: its inputs are '{scheme.activation.value}', which no int8 kernel runs; vLLM itself loads "
                "weight-only checkpoints: fptq export DIR --to w4a16 -o OUT"
            )
    return None
