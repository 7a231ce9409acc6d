"""Other forms of a checkpoint, for engines that can't run it as it is. Codes stay as they are."""

from fptq.export.targets import TARGETS, Target, export

__all__ = ["TARGETS", "Target", "export"]
