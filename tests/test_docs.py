"""Every command in the user documentation is run, page by page, on stand-ins under the documented names."""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fptq.checkpoint import is_checkpoint
from fptq.cli import build_parser, main
from test_export_gguf import write_metadata
from tiny import save_tiny
from tokens import SPECIAL, WORDS, save_tokenizer

ROOT = Path(__file__).parent.parent
LOGS = ("experiments.md", "decisions.md")  # what was run on a day, not what to run
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in LOGS)

MODELS = ("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma-3-270m-q4_k_m.gguf")
CHECKPOINTS = ("DIR", "OUT", "SmolLM2-W4A8")
TEXTS = (
    *("text.txt", "wiki.txt", "wiki.test.raw", "other_documents.txt", "Salesforce/wikitext:wikitext-2-raw-v1"),
    *("texts/calibration.txt", "texts/evaluation.txt"),
)
DOCUMENTS = ("pile.jsonl", "lambada.jsonl", "first_1300_documents.jsonl")
"""What pages call models, checkpoint folders, texts, and files of documents. A folder is taken for a Hub id's model."""

PARSED = ("push", "serve")  # one needs a network, one doesn't end
FOREIGN = ("make", "pip", "vllm", "llama-quantize", "llama-perplexity", "objdump")
SMALL = {
    "quantize": "--samples 4 --length 16 --quiet",
    "evaluate": "--length 32 --limit 1 --quiet",
    "compare": "--samples 4 --length 16 --quiet",
    "sweep": "--samples 4 --length 16 --quiet",
    "generate": "--max-new-tokens 4",
    "bench": "--prompt 16 --generate 4 --repetitions 1",
    "report": "--overwrite",
}
"""Options put at a command's end, where they win."""

CODE = re.compile(r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
SPOKEN = re.compile(r"`(fptq [a-z]+ [^`]*)`")
COMMANDS: dict[str, argparse.ArgumentParser] = next(
    dict(action.choices) for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
)


@dataclass(frozen=True)
class Command:
    """A command as a page has it; elided if it leaves a part out with "…"."""

    environment: dict[str, str]
    program: str
    arguments: list[str]
    elided: bool

    def __str__(self) -> str:
        return shlex.join([self.program, *self.arguments])


def commands_of(page: Path) -> Iterator[Command]:
    """Yield the commands of a page's shell blocks: code without another language, one line of which is a command."""
    for language, fenced, indented in CODE.findall(page.read_text(encoding="utf-8") + "\n"):
        lines = re.sub(r"\\\n\s*", "", fenced or indented).splitlines()
        if not language and any(is_command(line) for line in lines):
            for line in lines:
                yield from split(shlex.split(line, comments=True))


def is_command(line: str) -> bool:
    program = re.sub(r"^\s*([A-Z_]+=\S+\s+)*", "", line).split(" ")[0]
    return program in ("fptq", *FOREIGN) or program.startswith(("python", ".venv/", "bench/", "scripts/"))


def split(words: list[str]) -> Iterator[Command]:
    """Yield the commands between "&&"."""
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        here, words = words[:end], words[end + 1 :]
        environment = {}
        while "=" in here[0]:
            name, _, environment[name] = here.pop(0).partition("=")
        given = [word for word in here[1:] if word != "…"]
        yield Command(environment, here[0].removeprefix(".venv/bin/"), given, elided="…" in here)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, its checkpoint, and small texts, under all names that pages use."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("stand_ins")
    model = save_tiny(made / "model", vocab_size=len(SPECIAL + WORDS), spread=0.5)
    save_tokenizer(model, chat=True)
    arguments = ["quantize", str(model), "-o", str(made / "q"), "--calibration", "random", *SMALL["quantize"].split()]
    assert main(arguments) == 0
    for name in MODELS:
        shutil.copytree(model, folder / name)
    for name in CHECKPOINTS:
        shutil.copytree(made / "q", folder / name)
    for name in TEXTS:
        write(folder / name, "\n\n".join(" ".join(WORDS[i:]) for i in range(20)))
    for name in DOCUMENTS:
        write(folder / name, "".join(json.dumps({"text": " ".join(WORDS[i : i + 20])}) + "\n" for i in range(100)))
    write_metadata(folder / "metadata.gguf", made / "q", "llama")
    write_benchmarks(folder / "benchmarks")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_benchmarks(folder: Path) -> None:
    """Write benchmark data in the very rows that the documentation shows."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, row in re.findall(r"^\| `(\w+/\w+\.jsonl)` \| `(.*)` \|$", page, re.MULTILINE):
        write(folder / name, (row.replace(", …", "") + "\n") * 2)
    for definition in (folder_of("lm_eval") / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"):
        for split_name, rows in (("test", 1), ("dev", 5)):
            name = f"{definition.stem.removeprefix('mmlu_')}_{split_name}.csv"
            write(folder / "mmlu" / split_name / name, "w1 w2,w3,w4,w5,w6,A\n" * rows)


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path("not installed")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(
    page: Path, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sandbox = shutil.copytree(stand_ins, tmp_path / "sandbox")
    monkeypatch.chdir(sandbox)
    for command in commands_of(page):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(""))
            for name, value in command.environment.items():
                patch.setenv(name, value)
            if command.program != "fptq":
                check_foreign(command)
            elif command.elided or (command.arguments[0] in PARSED and "--card-only" not in command.arguments):
                check_usage(command)
            else:
                code = exit_code(small(command.arguments))
                assert code == 0, f"{command}\n{capsys.readouterr().err}"


def exit_code(arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def small(arguments: list[str]) -> list[str]:
    """Return the arguments for a stand-in's size, with data from files where they would come from the Hub."""
    name, *given = ["MODEL" if argument == "demo" else argument for argument in arguments]
    given += SMALL.get(name, "").split()
    if name == "inspect" and not is_checkpoint(Path(given[0])):
        given += ["--samples", "4", "--length", "16"]
    if name in ("quantize", "compare", "sweep") and "random" not in given:
        given += ["--calibration", "pile.jsonl"]
    if name in ("compare", "sweep") and "--text" in given:
        given += ["--window", "32", "--windows", "1"]
    if "--tasks" in given or "--table" in given:
        pytest.importorskip("lm_eval")
        given += ["--data-dir", "benchmarks", "--limit", "1"]
    if "--metadata" in given:
        given += ["--metadata", "metadata.gguf"]
    if name in ("quantize", "export"):
        output = Path(given[given.index("-o") + 1])
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
    if name == "report":
        pytest.importorskip("altair")
    if name == "sweep":
        pytest.importorskip("matplotlib")
    return [name, *given]


def check_usage(command: Command) -> None:
    """Check that a command parses, or where a part of it is left out, that its options exist."""
    ours = list(itertools.takewhile(lambda word: word != "--", command.arguments))  # then come another program's
    if not command.elided:
        build_parser().parse_args(ours)
    known = COMMANDS[ours[0]]._option_string_actions
    unknown = [word for word in ours if word.startswith("-") and word.partition("=")[0] not in known]
    assert not unknown, command


def check_foreign(command: Command) -> None:
    """Check that scripts, tests and modules of ours exist, with the options given; all else is a known program."""
    program, *rest = [command.program, *command.arguments]
    for word in (program, *rest):
        if word.startswith(("bench/", "scripts/", "tests/")):
            assert (ROOT / word).exists(), command
    if program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), command
    elif program == "python":
        script = (ROOT / rest[0]).read_text(encoding="utf-8")
        unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in script]
        assert not unknown, command
    else:
        assert program.startswith(("bench/", "scripts/")) or program in FOREIGN, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_name_options_that_exist(page: Path) -> None:
    for text in SPOKEN.findall(page.read_text(encoding="utf-8")):
        check_usage(Command({}, "fptq", [word for word in text.split()[1:] if word != "…"], elided=True))


def test_the_pages_have_commands() -> None:
    names = [command.arguments[0] for page in PAGES for command in commands_of(page) if command.program == "fptq"]
    assert len(names) >= 70
    assert COMMANDS.keys() <= {*names}
