"""Where a job works and what it may overwrite.

A job owns `OUT.partial` beside its output: `job.json` says which job it is, `journal.json` how far it came. The output
folder itself appears by one rename, complete. Two processes never work in the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fptq.checkpoint import RECORD_FILE, Checkpoint, CheckpointWriter
from fptq.errors import CalibrationError, CheckpointError, FPTQError, ModelError, OutputError, QuantizationError
from fptq.shards import flush_folder, write_json

_BAD_INPUT = (ModelError, CalibrationError, QuantizationError)
_JOB, _DROPPED = "job.json", "dropped.json"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for this process.

    Raises:
        OutputError: another process holds it, or something in it can't be read or written.
    """
    with _holding(FileLock(folder / ".lock"), folder):
        yield


@contextmanager
def _holding(lock: FileLock, folder: Path) -> Iterator[None]:
    """Hold the lock on a folder, and raise as OutputError what the system reports meanwhile."""
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=0):
            yield
    except Timeout as cause:
        raise OutputError(f"{folder}: another fptq process is working in it") from cause
    except OSError as cause:
        place = cause.filename or folder
        raise OutputError(
            f"{place}: {cause.strerror or cause}; when that is mended, give the same command again to go on"
        ) from cause


class Workspace:
    """The output folder of a job and the working folder beside it.

    Args:
        destination: the checkpoint folder to make.
        identity: everything that decides the result, JSON-ready; parts of another identity are never gone on with.
        overwrite: drop a finished checkpoint, or a started job, of another identity.
    """

    def __init__(self, destination: Path, identity: dict[str, Any], *, overwrite: bool):
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".partial")
        self._identity = json.loads(json.dumps(identity))
        self._overwrite = overwrite

    @property
    def digest(self) -> str:
        """The identity's SHA-256: a checkpoint tells its job by it without telling its maker's folders."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace for this process. Everything below needs it.

        Bad input removes this job's working folder, since nothing in it will ever be of use. After anything else it
        stays.

        Raises:
            OutputError: another process holds it, or the disk is full or read-only.
        """
        missing = [parent for parent in self.destination.parents if not parent.exists()]
        lock = FileLock(self.folder.with_name(self.folder.name + ".lock"))
        with _holding(lock, self.folder):
            try:
                yield
                _remove_file(lock)
            except FPTQError as cause:
                if isinstance(cause, _BAD_INPUT) and self._is_begun():
                    self._drop()
                if not self.folder.exists():
                    _remove_file(lock)
                    for parent in missing:
                        with suppress(OSError):
                            parent.rmdir()
                raise

    def is_done(self) -> bool:
        """Return whether the destination holds this very job's checkpoint; clear what a killed process left of it.

        Raises:
            OutputError: it holds something that must not be replaced.
        """
        refuse_foreign(self.destination)
        if not (self.destination / RECORD_FILE).is_file() or self._overwrite:
            return False
        try:
            record = Checkpoint.open(self.destination).record
        except CheckpointError as cause:
            raise OutputError(
                f"{self.destination}: holds a damaged checkpoint ({cause}); --overwrite replaces it"
            ) from cause
        if record.get("job") != self.digest:
            raise OutputError(
                f"{self.destination}: holds a checkpoint of another job (model, recipe, calibration or versions "
                "differ); --overwrite replaces it"
            )
        if self._is_begun() or self._is_litter():
            self._drop()
        return True

    def claim(self) -> CheckpointWriter:
        """Make the working folder, or check that the one there is this job's; return a writer into it."""
        if self.folder.exists() and not self._is_begun():
            started = self._started()
            if started is None and not self._is_litter():
                raise OutputError(f"{self.folder}: holds something that fptq didn't make; move it away")
            if started is not None and not self._overwrite:
                other = [key for key in self._identity if started.get(key) != self._identity[key]]
                raise OutputError(
                    f"{self.folder}: a started job with another {', '.join(other) or 'content'}; "
                    "give that job's command to go on with it, or --overwrite to drop it"
                )
            self._drop()
        if not self.folder.exists():
            self.folder.mkdir()
            write_json(self.folder / _JOB, self._identity)
        return CheckpointWriter(self.folder)

    def publish(self, finished: Path) -> None:
        """Give the finished folder the destination's name, and remove the working folder.

        Raises:
            CheckpointError: what is finished can't be opened.
            OutputError: something that must not be replaced has come to the destination meanwhile.
        """
        Checkpoint.open(finished)
        refuse_foreign(self.destination)
        if (self.destination / RECORD_FILE).is_file() and not self._overwrite:
            raise OutputError(f"{self.destination}: a checkpoint was put there meanwhile; --overwrite replaces it")
        if self.destination.exists():
            replaced = self.folder / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            self.destination.rename(replaced)
        finished.rename(self.destination)
        flush_folder(self.destination.parent)
        self._drop()

    def _drop(self) -> None:
        """Remove the working folder, by one rename first: what a kill leaves of it is no job to go on with."""
        if not self.folder.exists():
            return
        with suppress(FileNotFoundError):
            (self.folder / _JOB).replace(self.folder / _DROPPED)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _DROPPED:
                path.unlink()
        (self.folder / _DROPPED).unlink(missing_ok=True)
        self.folder.rmdir()

    def _started(self) -> dict[str, Any] | None:
        """Return the identity of the job in the working folder, or None if there is none that can be read."""
        try:
            return json.loads((self.folder / _JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _is_begun(self) -> bool:
        """Return whether the working folder is this job's."""
        return self._started() == self._identity

    def _is_litter(self) -> bool:
        """Return whether a working folder is there, but only what a kill left while it was made or removed."""
        if not self.folder.is_dir():
            return False
        names = {path.name for path in self.folder.iterdir()}
        return _DROPPED in names or names <= {f"{_JOB}.tmp"}

    def next_block(self) -> int | None:
        """Return the block that is due, or None if this job's walk hasn't begun."""
        if not self._is_begun():
            return None
        journal = self.folder / "journal.json"
        return int(json.loads(journal.read_text(encoding="utf-8"))["next_block"]) if journal.is_file() else None

    def note(self, next_block: int) -> None:
        """Note that everything before `next_block` is on the disk."""
        write_json(self.folder / "journal.json", {"next_block": next_block})

    def require_space(self, needed_bytes: float, hint: str) -> None:
        """Raise OutputError unless the disk has room for what the job will write; `hint` says how to need less."""
        place = next(path for path in (self.destination, *self.destination.parents) if path.exists())
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(place).free + written
        if free < needed_bytes:
            raise OutputError(
                f"{place}: {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB needed while quantizing ({hint})"
            )


def _remove_file(lock: FileLock) -> None:
    """Remove the file of a lock that is held; on Windows releasing the lock does that, and nothing else can."""
    if os.name != "nt":
        Path(lock.lock_file).unlink(missing_ok=True)


def refuse_foreign(destination: Path) -> None:
    """Raise OutputError unless `destination` is free, empty, or a checkpoint of ours (sound or not)."""
    if destination.is_mount():
        raise OutputError(f"{destination}: is a mount point and can't be replaced by a rename; give a folder inside it")
    if destination.is_dir() and ((destination / RECORD_FILE).is_file() or not any(destination.iterdir())):
        return
    if destination.exists():
        raise OutputError(f"{destination}: holds something that fptq didn't make; give another folder with -o")
