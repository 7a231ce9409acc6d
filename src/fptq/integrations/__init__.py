"""Running checkpoints inside other projects."""
