"""The checkpoint folder: compressed-tensors `pack-quantized` in safetensors shards, and one JSON file of our own.

docs/checkpoint.md gives it byte by byte. `CheckpointWriter` makes a folder, `Checkpoint.open` checks one completely
before anything is taken from it. Neither needs torch or the compressed-tensors package.
"""

from fptq.checkpoint.format import (
    FORMAT_VERSION,
    HISTOGRAM_BINS,
    HISTOGRAM_LOWEST_EXPONENT,
    INDEX_FILE,
    PRODUCER,
    RECORD_FILE,
    STATISTICS_FILE,
    ChannelSteps,
    KVScales,
    LayerScheme,
    QuantizedLinear,
    cache_tensors,
    linear_tensors,
    quantization_config,
    read_linear,
    seal,
)
from fptq.checkpoint.reader import Checkpoint, is_checkpoint
from fptq.checkpoint.writer import CheckpointWriter

__all__ = [
    "FORMAT_VERSION",
    "HISTOGRAM_BINS",
    "HISTOGRAM_LOWEST_EXPONENT",
    "INDEX_FILE",
    "PRODUCER",
    "RECORD_FILE",
    "STATISTICS_FILE",
    "ChannelSteps",
    "Checkpoint",
    "CheckpointWriter",
    "KVScales",
    "LayerScheme",
    "QuantizedLinear",
    "cache_tensors",
    "is_checkpoint",
    "linear_tensors",
    "quantization_config",
    "read_linear",
    "seal",
]
