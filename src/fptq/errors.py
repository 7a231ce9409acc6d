"""The errors that fptq raises for its users.

::

    FPTQError                       a user can do something about it; the command line prints it and exits with 1
    ├── ModelError                  the model to quantize can't be read: missing or damaged file, NaN, pickle weights
    │   └── ArchitectureError       no row for this architecture, or a variant that the row excludes
    ├── CalibrationError            no, too little or broken calibration text
    ├── QuantizationError           the numbers don't work out: group size, NaN activations
    ├── CheckpointError             a quantized folder that is damaged, incomplete or not one of ours
    ├── UnsupportedModelError       a sound checkpoint with something that the native engine doesn't run
    ├── TextError                   a text file or data set can't be read
    ├── EvaluationError             the evaluation data can't be used
    ├── GenerationError             a prompt or a sampling option that can't be
    ├── EngineError                 an engine that is closed or full, or whose numbers became infinite
    │   ├── BusyError               so many texts are in line that another one isn't taken
    │   └── TimeLimitError          a text wasn't finished in time
    ├── TokenizerError              a tokenizer's files are damaged, or a chat template refuses the messages
    ├── KernelError                 a kernel that this CPU can't run, or operands that don't fit it
    ├── ReportError                 measurements that a report can't show
    ├── OutputError                 the output folder can't be used, or the disk is full
    └── MissingDependencyError      an optional package is needed for this

Every message says what is wrong and where, what was found, what is needed, and the remedy.
"""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's error says, or its class if it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class FPTQError(Exception):
    """Base class: a mistake or a circumstance that the user can change."""


class ModelError(FPTQError):
    """The model to quantize can't be read."""


class ArchitectureError(ModelError):
    """The architecture is unknown, or this variant of it isn't supported."""


class CalibrationError(FPTQError):
    """The calibration text is missing, too short or unusable."""


class QuantizationError(FPTQError):
    """A tensor can't be quantized as asked."""


class CheckpointError(FPTQError):
    """A quantized checkpoint is damaged, incomplete or of another kind."""


class UnsupportedModelError(FPTQError):
    """The native engine doesn't run something that a checkpoint needs; it is named.

    Args:
        what: what that is, as "activation 'mish'".
        hint: what would be possible.
    """

    def __init__(self, what: str, hint: str = ""):
        then = f" ({hint})" if hint else ""
        super().__init__(
            f"the engine doesn't run {what}{then}; transformers can: 'fptq generate' and 'fptq evaluate' with "
            "--runtime transformers"
        )


class TextError(FPTQError):
    """A text file or a data set can't be read."""


class EvaluationError(FPTQError):
    """The evaluation data can't be used."""


class GenerationError(FPTQError):
    """The prompt or an option of text generation is out of range."""


class EngineError(FPTQError):
    """An engine is closed, its KV cache is full, or its activations became infinite."""


class BusyError(EngineError):
    """So many texts are being written or in line that another one isn't taken."""


class TimeLimitError(EngineError):
    """A text wasn't finished in time."""


class TokenizerError(FPTQError):
    """A tokenizer's files are damaged, or its chat template refuses the messages."""


class KernelError(FPTQError):
    """A kernel isn't available here, or was given operands of a wrong shape, dtype or range."""


class ReportError(FPTQError):
    """A file of measurements that a report can't show, or a part that it doesn't have."""


class OutputError(FPTQError):
    """The output can't be written where it was asked for."""


class MissingDependencyError(FPTQError):
    """An optional dependency isn't installed.

    Args:
        need: what needs which package.
        extra: of ours, that brings it.
        hint: what else would help.
    """

    def __init__(self, need: str, extra: str, hint: str = ""):
        remedy = f"pip install 'fptq[{extra}]', or '.[{extra}]' in its repository"
        super().__init__(f"{need}: {remedy}{f'; {hint}' if hint else ''}")
