"""Whole models: FPTQ's engine beside other runtimes, in one run.

    bench/engine_peers.sh                                  # builds the others under build/engine-peers
    python bench/engine.py --json engine.json
    python bench/engine.py --models smollm2-135m --threads 2 --engines fptq,llama.cpp-q4_0 --rounds 5

Every runtime starts from the same float weights: SmolLM2-135M-Instruct (the demo) or a Llama of the 1B shape with
random ones. What each makes of them is kept under --work. bench/peers/runtimes.py says how they convert and run. What
isn't installed or doesn't work is reported as absent, with the reason.

How it is measured:

- Each runtime has a process of its own for a model and a number of threads. They take turns, one sample a round, and
  are stopped (SIGSTOP) while others run. llama.cpp's own benchmark starts anew for each sample.
- A sample is a new random prompt, the same for all, and the tokens that follow it, greedily. Prefill counts the
  prompt's tokens up to the first new one, decode those after it. Who returns another number of tokens ends the run.
- Samples are dropped, and taken again, if others used more than --foreign-cores CPUs meanwhile. Figures are medians of
  the rest; where nothing is left, the table has a dash and the JSON null.
- Ceilings take turns with the runtimes: prefill's is the int8 dot instruction on registers, over two operations for
  each parameter of the blocks' linear layers and, once, of the head. Decode's is reading memory, over the bytes of all
  packed weights of ours. Peers' weights are of other sizes, and ceilings leave attention out.
- Memory is what is resident after a run (VmRSS), interpreter included.
- Before it is timed, each runtime continues a question to the demo model; the texts are printed and recorded.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fptq.runtime.kernels import cpu_name
from kernels import describe_commit, parse_integers
from peers.runtimes import GGUF, RUNTIMES

ENGINES = tuple(name for name in RUNTIMES if name != "ceilings")
INT4_PEERS = ("llama.cpp-q4_0", "openvino-int4", "onnxruntime-int4")
DRIVER = Path(__file__).parent / "peers" / "runtimes.py"
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TOKENS = 24
WARM_TOKENS = 4
MOST_ROUNDS = 4  # times --rounds, if samples are dropped


class AbsentError(Exception):
    """A runtime can't take part; the message says why."""


# ---- Models


def make_demo(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, dequantized from the demo's GGUF, which stays beside it."""
    import torch

    from fptq.models.loading import FloatModel

    model = FloatModel.open("demo")
    model.load_all(torch.float32).save_pretrained(folder)
    model.save_companions(folder)
    (folder / GGUF).symlink_to(model.location)


def make_llama_1b(folder: Path) -> None:
    """Write a Llama with random weights, and a tokenizer of bytes and fillers, without which some don't load it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, dtype=torch.bfloat16)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()]
    words += [f"<{i}>" for i in range(len(words), config.vocab_size)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


MODELS = {"smollm2-135m": make_demo, "llama-1b": make_llama_1b}


class Model:
    """A model's folder: the float model, and what runtimes have made of it.

    Attributes:
        name: a key of MODELS.
        float_folder: the float model.
        vocabulary: how many tokens there are.
        block_parameters: of the blocks' linear layers.
        head_parameters: of the output head.
    """

    def __init__(self, name: str, work: Path):
        self.name, self._folder = name, work / name
        self.float_folder = self._folder / "float"
        if not self.float_folder.exists():
            partial = self._folder / "float.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            MODELS[name](partial)
            partial.rename(self.float_folder)
        config = json.loads((self.float_folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        key = hidden // heads * config["num_key_value_heads"]
        block = 2 * hidden * hidden + 2 * hidden * key + 3 * hidden * config["intermediate_size"]
        self.vocabulary = config["vocab_size"]
        self.block_parameters = config["num_hidden_layers"] * block
        self.head_parameters = hidden * self.vocabulary

    def converted(self, name: str, environments: Path) -> Path:
        """Return the folder that a runtime loads, made if it isn't there yet.

        Raises:
            AbsentError: it can't be made.
        """
        if RUNTIMES[name].convert is None:
            return self.float_folder
        folder = self._folder / name
        if not folder.exists():
            shutil.rmtree(f"{folder}.partial", ignore_errors=True)
            log = self._folder / f"{name}.convert.log"
            command = [*driver("convert", name, environments), self.float_folder, folder]
            given = variables(name, environments, os.cpu_count() or 1)
            print(f"{self.name}: converting for {name}", file=sys.stderr, flush=True)
            with log.open("w") as output:
                done = subprocess.run(command, env=given, stdout=output, stderr=output, check=False)
            if done.returncode:
                raise AbsentError(f"can't convert {self.name}: {last_line(log)}")
        return folder

    def random_prompt(self, length: int, seed: int) -> list[int]:
        """Return token ids."""
        generator = random.Random(seed)
        return [generator.randrange(self.vocabulary) for _ in range(length)]


# ---- Processes


def driver(command: str, name: str, environments: Path) -> list[Any]:
    """Return the beginning of a command for a runtime.

    Raises:
        AbsentError: its environment isn't there.
    """
    runtime = RUNTIMES[name]
    python = environments / runtime.environment / "bin" / "python" if runtime.environment else Path(sys.executable)
    for needed in (python, *(environments / file for file in (*runtime.files, *runtime.preloaded))):
        if not needed.exists():
            raise AbsentError(f"there is no {needed}: see bench/engine_peers.sh")
    return [python, DRIVER, command, name]


def variables(name: str, environments: Path, threads: int) -> dict[str, str]:
    """Return environment variables for a runtime's process."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "LLAMACPP": str(environments / "llamacpp" / "bin"),
        "LD_PRELOAD": ":".join(str(environments / library) for library in RUNTIMES[name].preloaded),
        "OMP_NUM_THREADS": str(threads),
    }


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"


class Worker:
    """A runtime's process, which only runs while it answers.

    Attributes:
        versions: of its packages.
    """

    def __init__(self, model: Model, name: str, threads: int, environments: Path):
        folder = model.converted(name, environments)
        self._name, self._log = name, folder.parent / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*driver("serve", name, environments), folder, str(threads)],
                env=variables(name, environments, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            self.versions = self._read()
        except BaseException:  # an interrupt, too: the process is in a session of its own
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            AbsentError: the process has ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AbsentError(f"it ended: {last_line(self._log)} (see {self._log})")
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


# ---- Measuring


@dataclass
class Entry:
    """A runtime that takes part, and its samples."""

    name: str
    worker: Worker
    text: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0

    def median(self, figure: str) -> float | None:
        """Return the median of a figure of the samples."""
        values = [sample[figure] for sample in self.samples if figure in sample]
        return statistics.median(values) if values else None


def warm_up(entry: Entry, model: Model, options: argparse.Namespace) -> None:
    """Run a short sample, and continue the question if the model is one that can answer."""
    entry.worker.ask(tokens=model.random_prompt(options.prompt, 0), generate=WARM_TOKENS)
    if entry.name in ENGINES and MODELS[model.name] is make_demo:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model.float_folder / "tokenizer.json"))
        tokens = tokenizer.encode(QUESTION, add_special_tokens=False).ids
        reply = entry.worker.ask(text=QUESTION, tokens=tokens, generate=ANSWER_TOKENS)
        entry.text = reply["text"] if "text" in reply else tokenizer.decode(reply["tokens"])


def take_sample(entry: Entry, prompt: list[int], options: argparse.Namespace) -> None:
    """Add a sample to an entry, unless others disturbed it."""
    reply = entry.worker.ask(tokens=prompt, generate=options.generate)
    if "tokens" in reply and len(reply.pop("tokens")) != options.generate:
        raise SystemExit(f"{entry.name} didn't return {options.generate} tokens")
    if reply["foreign_cores"] > options.foreign_cores:
        entry.dropped += 1
        return
    if "prefill_seconds" in reply:
        reply["prefill_tokens_per_sec"] = len(prompt) / reply["prefill_seconds"]
        reply["decode_tokens_per_sec"] = reply["decode_tokens"] / reply["decode_seconds"]
    entry.samples.append(reply)


def measure(model: Model, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model with one number of threads."""
    entries: dict[str, Entry] = {}
    absent: dict[str, str] = {}
    try:
        for name in ("ceilings", *options.engines):
            with leaving(name, entries, absent):
                entries[name] = Entry(name, Worker(model, name, threads, options.environments))
                warm_up(entries[name], model, options)
        for number in range(1, MOST_ROUNDS * options.rounds + 1):
            lacking = [entry for entry in entries.values() if len(entry.samples) < options.rounds]
            prompt = model.random_prompt(options.prompt, number)
            for entry in lacking:
                with leaving(entry.name, entries, absent):
                    take_sample(entry, prompt, options)
            if lacking:
                counts = ", ".join(f"{entry.name} {len(entry.samples)}/{entry.dropped}" for entry in lacking)
                line = f"{model.name}, {threads} threads, round {number}; samples/dropped: {counts}"
                print(line, file=sys.stderr, flush=True)
    finally:
        for entry in entries.values():
            entry.worker.close()
    if "ceilings" in absent:
        raise SystemExit(f"the machine's limits can't be measured: {absent['ceilings']}")
    cell = {"model": model.name, "threads": threads}
    limits = find_limits(model, entries.pop("ceilings"), entries.get("fptq"), options.prompt)
    figures = ("prefill_tokens_per_sec", "decode_tokens_per_sec", "memory_bytes", "peak_memory_bytes")
    rows = [
        {"engine": entry.name, **cell}
        | {figure: entry.median(figure) for figure in figures}
        | {"samples": len(entry.samples), "dropped": entry.dropped}
        for entry in entries.values()
    ]
    return {
        "ceilings": cell | limits,
        "rows": rows,
        "texts": [{"engine": entry.name, **cell, "text": entry.text} for entry in entries.values() if entry.text],
        "absent": [{"engine": name, **cell, "reason": reason} for name, reason in absent.items()],
        "versions": {entry.name: entry.worker.versions for entry in entries.values()},
    }


@contextmanager
def leaving(name: str, entries: dict[str, Entry], absent: dict[str, str]) -> Iterator[None]:
    """Move a runtime from those that take part to those that don't, if it turns out so inside."""
    try:
        yield
    except AbsentError as reason:
        absent[name] = str(reason)
        if entry := entries.pop(name, None):
            entry.worker.close()


def find_limits(model: Model, ceilings: Entry, ours: Entry | None, prompt: int) -> dict[str, float | None]:
    """Return the machine's limits, and the most tokens per second that they allow."""
    read, dot = ceilings.median("read_bytes_per_sec"), ceilings.median("dot_ops_per_sec")
    weight_bytes = ours.median("weight_bytes") if ours else None
    operations = 2 * (model.block_parameters + model.head_parameters / prompt)
    return {
        "read_bytes_per_sec": read,
        "dot_ops_per_sec": dot,
        "weight_bytes": weight_bytes,
        "prefill_tokens_per_sec": dot / operations if dot else None,
        "decode_tokens_per_sec": read / weight_bytes if read and weight_bytes else None,
    }


# ---- Tables


def print_table(result: dict[str, Any]) -> None:
    """Print what was measured of one model with one number of threads."""
    limits, rows = result["ceilings"], result["rows"]
    print(f"\n{limits['model']}, threads: {limits['threads']}. Ceilings:", end=" ")
    print(f"memory read {scaled(limits['read_bytes_per_sec'])} GB/s, int8 {scaled(limits['dot_ops_per_sec'])} GOP/s")
    for missing in result["absent"]:
        print(f"Absent: {missing['engine']} ({missing['reason']})")
    for text in result["texts"]:
        print(f"{text['engine']} writes: {text['text']!r}")
    phases = [f"{phase}_tokens_per_sec" for phase in ("prefill", "decode")]
    best = {phase: max((row[phase] or 0 for row in rows if row["engine"] in INT4_PEERS), default=0) for phase in phases}
    print(f"{'':18}", *(f"{title:^28}" for title in ("prefill", "decode")), f"{'memory':>8} {'samples':>8}")
    print(f"{'':18}", *("  tokens/s  ceiling   int4  " for _ in phases), f"{'MiB':>8} {'dropped':>8}")
    for row in rows:
        cells = []
        for phase in phases:
            rate = row[phase]
            share = f"{rate / limits[phase]:.0%}" if rate and limits[phase] else "-"
            ratio = f"{rate / best[phase]:.2f}" if rate and best[phase] else "-"
            cells.append(f"{f'{rate:.1f}' if rate else '-':>10} {share:>8} {ratio:>6}  ")
        memory = f"{row['memory_bytes'] / 2**20:.0f}" if row["memory_bytes"] else "-"
        print(f"{row['engine']:18}", *cells, f"{memory:>8}", f"{row['samples']:>4}/{row['dropped']}")


def scaled(rate: float | None) -> str:
    """Return a rate in 10^9 a second."""
    return f"{rate / 1e9:.0f}" if rate else "-"


# ---- Command line


def select_ceilings(model: str, parts: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return a model's ceilings for each number of threads."""
    found = (part["ceilings"] for part in parts)
    return {limits["threads"]: limits for limits in found if limits["model"] == model}


def parse_names(known: tuple[str, ...]) -> Any:
    """Return what reads a list of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return parse


def main() -> None:
    build = Path(__file__).resolve().parent.parent / "build"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=parse_names(tuple(MODELS)), default=list(MODELS))
    parser.add_argument("--threads", type=parse_integers, default=[1, 2], help="default 1,2")
    parser.add_argument("--engines", type=parse_names(ENGINES), default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default 3)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default 512)")
    parser.add_argument("--generate", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--foreign-cores", type=float, default=0.1, help="that others may use (default 0.1)")
    parser.add_argument("--work", type=Path, default=build / "bench-engine", help="converted models")
    parser.add_argument("--environments", type=Path, default=build / "engine-peers", help="made by engine_peers.sh")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.environments = options.environments.resolve()  # LD_PRELOAD needs it whole
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and end the stopped processes

    parts = []
    for name in options.models:
        model = Model(name, options.work)
        for threads in options.threads:
            parts.append(measure(model, threads, options))
            print_table(parts[-1])
    if options.json:
        lists = {key: [line for part in parts for line in part[key]] for key in ("rows", "texts", "absent")}
        document = {
            "command": sys.argv,
            "commit": describe_commit(),
            "machine": {"cpu": cpu_name(), "cpus": os.cpu_count()},
            "versions": {name: found for part in parts for name, found in part["versions"].items()},
            "ceilings": {name: select_ceilings(name, parts) for name in options.models},
            **lists,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
