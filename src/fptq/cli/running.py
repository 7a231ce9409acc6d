"""fptq generate, fptq chat, fptq bench, fptq doctor."""

from __future__ import annotations

import argparse
import secrets
import sys
import textwrap
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq.cli.common import add_command, require_torch, write_json
from fptq.errors import FPTQError

if TYPE_CHECKING:
    from fptq.runtime.engine import Engine


def add_engine_options(command: argparse.ArgumentParser) -> None:
    """Add what an engine is opened with."""
    add = command.add_argument_group("engine").add_argument
    add("--threads", type=int, help="that work together (default: one for each CPU)")
    add("--context", type=int, help="tokens that prompt and answer may have (default: the model's own, up to 8192)")


def _add_sampling_options(command: argparse.ArgumentParser, temperature: float) -> None:
    add = command.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=temperature, help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=0, help="choose among so many likeliest tokens; 0: among all")
    add("--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this total probability")
    add("--min-p", type=float, default=0.0, help="choose among tokens with this share of the likeliest's probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that came before are less likely")
    add("--seed", type=int, help="of the choice: the same seed gives the same text (default: another one each time)")


def add_generate(commands: Any) -> None:
    """Add `fptq generate`."""
    details = """
        The text comes as it is written. Greedy, unless --temperature is above 0.

        example:
          fptq generate SmolLM2-135M-W4A8 "Write a haiku about rain." --chat --temperature 0.7 --top-p 0.9
        """
    command = add_command(commands, "generate", _generate, "let a checkpoint write text", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add("--chat", action="store_true", help="ask as a user, in the model's chat template")
    add("--max-new-tokens", type=int, default=128, help="stop after this many tokens")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    runtime = "engine: native, without torch; transformers: for what the engine doesn't run, slower"
    add("--runtime", default="engine", choices=["engine", "transformers"], help=runtime)
    _add_sampling_options(command, 0.0)
    add_engine_options(command)


def add_chat(commands: Any) -> None:
    """Add `fptq chat`."""
    details = """
        Type a message, read the answer. Ctrl-C stops an answer, Ctrl-D (or /exit) leaves.
        /reset begins anew, /system TEXT too, with other instructions; /help lists all commands.
        """
    command = add_command(commands, "chat", _chat, "talk with a checkpoint", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--system", metavar="TEXT", help="instructions that the conversation begins with")
    add("--max-new-tokens", type=int, default=1024, help="end an answer after this many tokens")
    _add_sampling_options(command, 0.7)
    add_engine_options(command)


def add_bench(commands: Any) -> None:
    """Add `fptq bench`."""
    details = """
        Random prompts are read and continued, several times; medians are shown. Beside each figure
        stands its share of the ceiling, measured in the same run: prefill against the peak of int8
        operations, decode against the time that reading all weights takes.

        example:
          fptq bench SmolLM2-135M-W4A8 --prompt 128 512 --batch 1 8
        """
    command = add_command(commands, "bench", _bench, "measure speed, memory, and what would be possible", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--prompt", type=int, nargs="+", default=[512], metavar="N", help="tokens of a prompt; several are allowed")
    add("--generate", type=int, default=128, metavar="N", help="tokens to write after it")
    add("--batch", type=int, nargs="+", default=[1], metavar="N", help="sequences together; several are allowed")
    add("--threads", type=int, help="that work together (default: one for each CPU)")
    add("--repetitions", type=int, default=3, metavar="N", help="of each measurement")
    add("--profile", action="store_true", help="also show what the time is spent on")
    add("--json", metavar="FILE", help="also write the figures to FILE")


def add_doctor(commands: Any) -> None:
    """Add `fptq doctor`."""
    details = """
        The fastest kernel that the CPU can run is chosen by itself. The environment variable
        FPTQ_KERNEL forces another one of the list; 'reference' is numpy and slow.

        With a checkpoint it also compares every file with its checksum, and says what each engine
        would do with it: whether it loads, and whether it computes with int8.
        """
    command = add_command(commands, "doctor", _doctor, "show which kernels run on this machine, and why", details)
    command.add_argument("checkpoint", metavar="DIR", nargs="?", help="a checkpoint folder")


def _generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    write = _generate_with_transformers if options.runtime == "transformers" else _generate_with_engine
    write(options, prompt)
    print()


def _generate_with_engine(options: argparse.Namespace, prompt: str) -> None:
    sampling = _sampling(options)
    with open_engine(options) as engine:
        if engine.tokenizer is None:
            raise FPTQError(f"{options.checkpoint}: has no tokenizer, so it can't read a prompt")
        ids = engine.tokenizer.encode(prompt)
        if options.chat:
            ids = engine.tokenizer.chat([{"role": "user", "content": prompt}])
        pieces = engine.generate(ids, sampling=sampling, max_new_tokens=options.max_new_tokens, stop=options.stop)
        for piece in pieces:
            print(piece.text, end="", flush=True)


def _generate_with_transformers(options: argparse.Namespace, prompt: str) -> None:
    require_torch()
    from fptq.integrations.transformers import generate, load

    engine_only = ("top_k", "min_p", "repetition_penalty", "stop", "threads", "context")
    given = [name for name in engine_only if getattr(options, name) != options.parser.get_default(name)]
    if given:
        raise FPTQError(f"--{given[0].replace('_', '-')} is for the engine; --runtime transformers doesn't take it")
    model, tokenizer = load(options.checkpoint)
    generate(
        model,
        tokenizer,
        prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
        on_text=lambda text: print(text, end="", flush=True),
    )


_CHAT_COMMANDS = {
    "/reset": "begin anew",
    "/system TEXT": "begin anew with these instructions",
    "/help": "show this list",
    "/exit": "leave, as Ctrl-D does",
}


def _chat(options: argparse.Namespace) -> None:
    from fptq.runtime.conversation import Conversation

    sampling = _sampling(options)
    with open_engine(options) as engine:
        talk = Conversation(engine, system=options.system, sampling=sampling)
        if sys.stdin.isatty():
            with suppress(ImportError):  # line editing and history, where Python has them
                import readline  # noqa: F401
        print(f"{engine.folder.name}, context of {engine.context} tokens. /help shows commands, Ctrl-D leaves.")
        while True:
            try:
                text = input("\n> ").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("  (Ctrl-D leaves)", end="")
                continue
            command, _, rest = text.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                talk.reset()
                print("(a new conversation)")
            elif command == "/system":
                talk.close()
                talk = Conversation(engine, system=rest, sampling=sampling)
                print("(a new conversation)")
            elif command.startswith("/") and not rest:
                print("\n".join(f"{name:<14}{what}" for name, what in _CHAT_COMMANDS.items()))
            elif text:
                _answer(talk, text, options.max_new_tokens)
    print()


def _answer(talk: Any, text: str, max_new_tokens: int) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and what can't be asked is said."""
    try:
        answer = talk.ask(text, max_new_tokens=max_new_tokens)
        try:
            for piece in answer:
                print(piece.text, end="", flush=True)
                if piece.finish_reason == "length":
                    print(" (cut off: --max-new-tokens or the context is reached)", end="")
        except KeyboardInterrupt:
            answer.close()
            print(" (stopped)", end="")
        print()
    except FPTQError as error:
        print(f"fptq: {error}; /reset begins anew")


def _bench(options: argparse.Namespace) -> None:
    from fptq.report.tables import benchmark_table
    from fptq.runtime.benchmark import Ceilings, benchmark, resident_bytes

    if min(*options.prompt, options.generate, *options.batch, options.repetitions) < 1:
        raise FPTQError("--prompt, --generate, --batch and --repetitions need at least 1")
    options.context = max(options.prompt) + options.generate
    with open_engine(options, sequences=max(options.batch)) as engine:
        ceilings = Ceilings.measure(engine.kernels)
        engine.take_times()
        measured = [
            benchmark(engine, ceilings, prompt=p, generate=options.generate, batch=b, repetitions=options.repetitions)
            for p in options.prompt
            for b in options.batch
        ]
        memory = {
            "resident_bytes": resident_bytes(),
            "weight_bytes": engine.weight_bytes,
            "cache_bytes": engine.cache.tokens * engine.cache.token_bytes,
        }
        times = engine.take_times()
        print(benchmark_table(measured, ceilings, memory, times if options.profile else None))
        print(f"\nkernel {engine.kernels.target}, {engine.kernels.threads} threads")
        values = {
            "kernel": engine.kernels.target,
            "threads": engine.kernels.threads,
            "ceilings": asdict(ceilings),
            "memory": memory,
            "rows": [row.to_dict() for row in measured],
        }
    if options.json:
        write_json(options.json, values)


def open_engine(options: argparse.Namespace, **sizes: Any) -> Engine:
    """Return the engine that the options describe; `sizes` are further arguments of `Engine.open`."""
    from fptq.runtime.engine import Engine
    from fptq.runtime.kernels import REFERENCE

    engine = Engine.open(
        Path(options.checkpoint).expanduser(), threads=options.threads, context=options.context, **sizes
    )
    if engine.kernels.target == REFERENCE:
        print(f"fptq: the numpy reference runs; {engine.kernels.reason}", file=sys.stderr)
    return engine


def _sampling(options: argparse.Namespace) -> Any:
    from fptq.runtime.sampling import Sampling

    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def _doctor(options: argparse.Namespace) -> None:
    from fptq.checkpoint import Checkpoint
    from fptq.report.engines import engine_verdicts
    from fptq.report.tables import diagnosis_table
    from fptq.runtime.doctor import diagnose, require_sound

    diagnosis = diagnose()
    print(diagnosis_table(diagnosis))
    require_sound(diagnosis)
    if options.checkpoint is None:
        return
    checkpoint = Checkpoint.open(options.checkpoint)
    sound = f"{len(list(checkpoint.verify()))} files are as they were written" if checkpoint.record else "no checksums"
    print(f"\n{checkpoint.folder}: {sound}")
    wrapper = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    for engine, verdict in engine_verdicts(checkpoint):
        print(wrapper.fill(f"{engine}: {verdict}"))
