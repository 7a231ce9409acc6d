"""Making a checkpoint folder, part by part."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fptq.checkpoint.format import INDEX_FILE, MAX_SHARD_BYTES, RECORD_FILE, seal
from fptq.errors import OutputError
from fptq.shards import merge_shards, read_header, sha256_of_file, write_json, write_shard


class CheckpointWriter:
    """Collects a checkpoint in a working folder, one part per decoder block, and turns them into a finished folder.

    Parts already written survive the process; what one that was interrupted had put together doesn't, and another
    writer in the same folder begins that anew.
    """

    def __init__(self, folder: Path):
        self._parts = folder / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        self.final = folder / "final"
        """What becomes the checkpoint; tokenizer files and the like are put here before `finish`."""
        if self.final.exists():
            shutil.rmtree(self.final)
        self.final.mkdir()

    def part(self, name: str, suffix: str = ".safetensors") -> Path:
        """Return the path of a part's tensors, or of another file that belongs to the part."""
        return self._parts / f"{name}{suffix}"

    def add_part(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        """Store the tensors of one part durably."""
        write_shard(self.part(name), tensors)

    def finish(
        self,
        parts: list[str],
        config: dict[str, Any],
        record: dict[str, Any],
        *,
        replacements: str | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> Path:
        """Merge the parts into shards, add config.json and the record with every file's checksum; return the folder.

        Tensors that the part `replacements` has, too, are taken from there.
        """
        final = self.final
        self._merge(parts, self.part(replacements) if replacements else None, max_shard_bytes)
        write_json(final / "config.json", config)
        files = sorted(path for path in final.rglob("*") if path.is_file())
        record = {
            **record,
            "files": {
                p.relative_to(final).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of_file(p)} for p in files
            },
        }
        write_json(final / RECORD_FILE, seal(record))
        return final

    def _merge(self, parts: list[str], replacements: Path | None, max_shard_bytes: int) -> None:
        final = self.final
        bundles: list[list[Path]] = [[]]
        size = 0
        for part in map(self.part, parts):
            if bundles[-1] and size + part.stat().st_size > max_shard_bytes:
                bundles.append([])
                size = 0
            bundles[-1].append(part)
            size += part.stat().st_size
        count = len(bundles)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for name, bundle in zip(names, bundles, strict=True):
            merge_shards(final / name, bundle, replacements=replacements)
        if count > 1:
            entries = {name: read_header(final / name, OutputError) for name in names}
            write_json(
                final / INDEX_FILE,
                {
                    "metadata": {"total_size": sum(e.stop - e.start for h in entries.values() for e in h.values())},
                    "weight_map": {tensor: name for name, header in entries.items() for tensor in header},
                },
            )
