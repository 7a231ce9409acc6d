"""Other forms of a checkpoint, for engines that can't run it as it is. Codes stay as they are."""

from fptq.export.targets import TARGETS, Target, export, gguf_refusal

__all__ = ["TARGETS", "Target", "export", "gguf_refusal"]
