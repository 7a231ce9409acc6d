"""Other forms of a checkpoint, for engines that can't run it as it is. Codes and scales stay as they are."""

from fptq.export.standard import TARGETS, Target, export

__all__ = ["TARGETS", "Target", "export"]
