"""fptq serve."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from fptq.cli.common import add_command
from fptq.cli.running import add_engine_options, open_engine
from fptq.errors import FPTQError, MissingDependencyError

KEY_VARIABLE = "FPTQ_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ENGINE_ONLY = (
    "cache_tokens",
    "max_waiting",
    "max_prompt_tokens",
    "max_new_tokens",
    "time_limit",
    "drain",
    "threads",
    "allow_origin",
)


def add_serve(commands: Any) -> None:
    """Add `fptq serve`."""
    details = f"""
        Clients of OpenAI's API find completions, chat completions and models under /v1; / is a page to
        chat, /health and /metrics (Prometheus) are for whoever watches the server. Ctrl-C or SIGTERM
        lets running answers finish; a second Ctrl-C doesn't.

        Requests are decoded together, and each gets the text that it would get alone. What a prompt
        has in common with an earlier one isn't computed again while it is in the KV cache.

        The environment variable {KEY_VARIABLE} is a better place for a key than --api-key, which others
        on the machine can read in the list of processes.

        examples:
          fptq serve SmolLM2-135M-W4A8
          fptq serve SmolLM2-135M-W4A8 --host 0.0.0.0 --api-key SECRET --parallel 32
          fptq serve SmolLM2-135M-W4A8 --backend vllm -- --dtype float32
        """
    command = add_command(commands, "serve", _serve, "serve a checkpoint to OpenAI's clients", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    backends = "engine: our own; vllm: hand folder and options to vLLM, and what stands behind '--' as it is"
    add("--backend", default="engine", choices=["engine", "vllm"], help=backends)
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all")
    add("--port", type=int, default=8000, help="to listen at; 0: a free one")
    add("--model-name", metavar="NAME", help="how clients name the model (default: as the folder)")
    add("--api-key", metavar="KEY", help="clients must send it (default: none, or as the environment has it)")
    origin = "a web page of this origin may ask the server, '*': any; may be repeated"
    add("--allow-origin", action="append", default=[], metavar="URL", help=origin)
    add("--quiet", action="store_true", help="don't write a line for each request")
    add = command.add_argument_group("limits").add_argument
    add("--parallel", type=int, default=16, metavar="N", help="texts that are written at a time")
    waiting = "texts in line; a request for another one gets status 503"
    add("--max-waiting", type=int, default=512, metavar="N", help=waiting)
    add("--max-prompt-tokens", type=int, metavar="N", help="of a prompt (default: what the context has room for)")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: what the context leaves)")
    time_limit = "from a request to the end of its answer, waiting included"
    add("--time-limit", type=float, default=600.0, metavar="SECONDS", help=time_limit)
    drain = "that running answers have once the server is told to stop"
    add("--drain", type=int, default=30, metavar="SECONDS", help=drain)
    cache = "keys and values of so many tokens are kept, of all requests together (default: four contexts)"
    add("--cache-tokens", type=int, metavar="N", help=cache)
    add_engine_options(command)


def _serve(options: argparse.Namespace) -> None:
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    name = options.model_name or Path(options.checkpoint).expanduser().resolve().name
    if options.host not in _LOOPBACK and key is None:
        print(f"fptq: everybody who reaches {options.host} can use this server: it has no --api-key", file=sys.stderr)
    if options.backend == "vllm":
        _run_vllm(options, name, key)
    if options.beyond:
        raise FPTQError(f"'-- {' '.join(options.beyond)}' is for --backend vllm")
    try:
        from fptq.serve.app import Limits
        from fptq.serve.server import serve
    except ModuleNotFoundError as cause:
        raise MissingDependencyError(f"this command needs {cause.name}", "serve") from cause
    sizes = {"sequences": 4} if options.cache_tokens is None else {"cache_tokens": options.cache_tokens}
    for option in ("max_prompt_tokens", "max_new_tokens", "time_limit", "drain"):
        value = getattr(options, option)
        if value is not None and value <= 0:
            raise FPTQError(f"--{option.replace('_', '-')} {value}: needed more than 0")
    with open_engine(options, **sizes) as engine:
        serve(
            engine,
            model=name,
            host=options.host,
            port=options.port,
            parallel=options.parallel,
            line=options.max_waiting,
            limits=Limits(
                prompt_tokens=options.max_prompt_tokens,
                new_tokens=options.max_new_tokens,
                seconds=options.time_limit,
            ),
            key=key,
            origins=options.allow_origin,
            drain_seconds=options.drain,
            log_requests=not options.quiet,
        )


def _run_vllm(options: argparse.Namespace, name: str, key: str | None) -> None:
    """Become vLLM's server."""
    given = [option for option in _ENGINE_ONLY if getattr(options, option) != options.parser.get_default(option)]
    if given:
        raise FPTQError(
            f"--{given[0].replace('_', '-')} is for our engine; vLLM has options of its own, which it takes behind '--'"
        )
    if importlib.util.find_spec("vllm") is None:
        raise FPTQError("--backend vllm needs vLLM in this environment, see docs/vllm.md")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", options.checkpoint]
    command += ["--served-model-name", name, "--host", options.host, "--port", str(options.port)]
    command += ["--max-num-seqs", str(options.parallel)]
    command += [] if options.context is None else ["--max-model-len", str(options.context)]
    command += ["--disable-uvicorn-access-log"] if options.quiet else []
    if key is not None:
        os.environ["VLLM_API_KEY"] = key
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *options.beyond])
