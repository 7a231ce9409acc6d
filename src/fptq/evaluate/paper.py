"""The tables of the FPTQ paper as comparisons that can be run again on any model."""

from __future__ import annotations

from dataclasses import dataclass

from fptq.evaluate.compare import FLOAT, Contender

COMMON_SENSE = ("winogrande", "piqa", "hellaswag", "arc_easy")
"""The tasks of the paper's Common Sense QA columns, whose mean is the last of them."""

MMLU = ("mmlu_humanities", "mmlu_stem", "mmlu_social_sciences", "mmlu_other", "mmlu")
"""The paper's MMLU columns; the last one is the mean of all questions."""


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Attributes:
        title: what it shows.
        rows: what the paper calls each row, and the contender (`Contender.parse`).
        tasks: what is measured.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]

    def contenders(self) -> list[Contender]:
        """Return the rows as contenders."""
        parsed = [(label, Contender.parse(spelled)) for label, spelled in self.rows]
        return [Contender(label, contender.recipe, contender.calibration) for label, contender in parsed]


_FLOAT = ("float", FLOAT)
_LAMBADA = ("lambada_openai",)
_ALL = ("mmlu", *COMMON_SENSE)

PAPER_TABLES: dict[str, PaperTable] = {
    "3": PaperTable(
        "Table 3: comparison with SmoothQuant on LAMBADA",
        # SmoothQuant's W4A8 row has the figures of Table 10's SQ + ptk: int4 per channel, activations per token
        (_FLOAT, ("SmoothQuant W8A8", "smoothquant-w8a8"), ("SmoothQuant W4A8", "smoothquant-w4a8"), ("FPTQ", "fptq")),
        _LAMBADA,
    ),
    "4": PaperTable(
        "Table 4: MMLU and Common Sense QA",
        (
            _FLOAT,
            ("SmoothQuant", "smoothquant-w8a8"),
            ("GPTQ", "gptq-w4a16"),
            ("LLM-QAT", "llm-qat"),
            ("FPTQ", "fptq"),
        ),
        _ALL,
    ),
    "6": PaperTable(
        "Table 6: calibration on text and on random tokens",
        (
            _FLOAT,  # which the paper's table hasn't
            ("text, W8A8", "smoothquant-w8a8"),
            ("random, W8A8", "smoothquant-w8a8@random"),
            ("text, W4A8", "fptq"),
            ("random, W4A8", "fptq@random"),
        ),
        _ALL,
    ),
    "7": PaperTable(
        "Table 7: FPTQ with GPTQ after LAE",
        (_FLOAT, ("FPTQ", "fptq"), ("FPTQ_GPTQ", "fptq-gptq")),
        _ALL,
    ),
    "10": PaperTable(
        "Table 10: component analysis on LAMBADA",
        (
            _FLOAT,
            ("SQ + pts", "smoothquant-w4a8-static"),
            ("SQ + ptk", "smoothquant-w4a8"),
            ("SQ + fg + FC2 ptk", "smoothquant-w4a8-group"),
            ("FPTQ", "fptq"),
        ),
        _LAMBADA,
    ),
}
"""The tables that compare methods, by number."""
