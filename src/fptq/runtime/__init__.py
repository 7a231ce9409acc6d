"""Running a checkpoint without torch."""
