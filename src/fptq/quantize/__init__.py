"""The quantizing half: from a float model to a checkpoint folder (needs torch and transformers)."""

from fptq.quantize.calibration import CalibrationSpec
from fptq.quantize.pipeline import Options, quantize

__all__ = ["CalibrationSpec", "Options", "quantize"]
