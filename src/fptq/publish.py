"""Publishing a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from fptq.errors import MissingDependencyError, OutputError, first_line
from fptq.report.card import model_card
from fptq.report.subject import BENCHMARK_FILE, EVALUATION_FILE, Subject

CARD_FILE = "README.md"
_MEASURED = (EVALUATION_FILE, BENCHMARK_FILE)


def push(
    folder: str | Path,
    place: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Upload a checkpoint with a model card and return its address. What is there already isn't sent again.

    Args:
        folder: the checkpoint. Files that are neither its own nor measurements stay where they are.
        place: the repository's id, "name/model"; it is made if there is none.
        base_model: the Hub id of the float model; by default the model that it was made of, if that was one.
        licence: its licence, as the Hub spells it.
        private: make a repository that others can't see.
        revision: a branch that is there; by default "main".

    Raises:
        CheckpointError: it isn't as it was written.
        MissingDependencyError: huggingface_hub isn't installed.
        OutputError: the Hub doesn't take it.
    """
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("the Hub needs huggingface_hub", "hub") from cause

    subject = Subject.open(folder)
    checkpoint = subject.checkpoint
    files = list(checkpoint.verify())
    card = model_card(subject, place, base_model=base_model or hub_id(subject), licence=licence)
    sent = [*files, *(name for name in _MEASURED if (checkpoint.folder / name).exists())]
    api = HfApi(library_name="fptq")
    try:
        url = api.create_repo(place, private=private or None, exist_ok=True)
        message = f"W4A8 by fptq, recipe {checkpoint.record['recipe']['name']}"
        # the card comes last: what has one is complete
        api.upload_folder(
            repo_id=place,
            folder_path=checkpoint.folder,
            allow_patterns=sent,
            ignore_patterns=[CARD_FILE],
            commit_message=message,
            revision=revision,
        )
        api.upload_file(
            repo_id=place,
            path_or_fileobj=card.encode(),
            path_in_repo=CARD_FILE,
            commit_message="Model card",
            revision=revision,
        )
    # errors of several libraries without a common base class: the Hub's, HTTP's, those of the transfer
    except Exception as cause:
        raise OutputError(
            f"{place}: the Hub doesn't take it ({first_line(cause)}). Check the name, the network, and "
            "`hf auth login`; the same command sends what is missing"
        ) from cause
    return str(url)


def hub_id(subject: Subject) -> str | None:
    """Return the Hub id of the float model, if it was given by one."""
    name = str(subject.checkpoint.record["model"]["name"])
    is_id = name.count("/") == 1 and Path(name).suffix != ".gguf" and not name.startswith((".", "/", "~"))
    return name if is_id else None


def write_card(folder: str | Path, place: str, path: Path, *, base_model: str | None, licence: str | None) -> None:
    """Write the model card that `push` would upload.

    Raises:
        OutputError: `path` is there already, or can't be written.
    """
    if path.exists():
        raise OutputError(f"{path}: is there already; give another file")
    subject = Subject.open(folder)
    card = model_card(subject, place, base_model=base_model or hub_id(subject), licence=licence)
    try:
        path.write_text(card, encoding="utf-8")
    except OSError as cause:
        raise OutputError(f"{path}: can't be written ({cause.strerror})") from cause
