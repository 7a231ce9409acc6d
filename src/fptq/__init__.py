"""FPTQ: open large language models at 4-bit weights and 8-bit activations, without training.

Importing this package does no work and needs no torch. The command line is `fptq`; in Python:

    from fptq.quantize import quantize
    quantize("path/to/model", "out", calibration="text.txt")
"""

from fptq.errors import FPTQError
from fptq.presets import PRESETS, get_recipe
from fptq.recipe import Activation, LayerPlan, Recipe, Role

__version__ = "0.1.0"
__all__ = ["PRESETS", "Activation", "FPTQError", "LayerPlan", "Recipe", "Role", "__version__", "get_recipe"]
