"""Many clients at a time on `fptq serve`: does a request fail, does memory grow, does each get the text it gets alone?

    python bench/serving.py build/demo/SmolLM2-135M-W4A8 --clients 200 --seconds 120

Every client asks again and again with OpenAI's own package, one of some prompts of 10 to 400 tokens, at once or as a
stream. One in ten streams is read slowly, one in ten left in the middle, one request in ten is wrong and must be
refused. Before, the engine writes all texts alone; every text of the server must be one of these. Prints a table, and
ends with 1 if a well-formed request failed or a text differs.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import openai
import psutil

from fptq.runtime.engine import Engine

NAME = "served"
TEXT = (
    "The river had risen in the night, and by morning the lower fields lay under water. Nobody in the village was "
    "surprised; the old men had read it in the colour of the hills. They carried what they could up to the church, and "
    "waited there for the day, and counted the children, and talked of other years. "
)


def make_prompts(engine: Engine, count: int, seed: int) -> list[str]:
    """Return prompts of many lengths; some begin alike, some don't."""
    rng = random.Random(seed)
    words = TEXT.split() * 5
    assert engine.tokenizer is not None
    return [f"{i}. " * (i % 3) + " ".join(words[: rng.randint(8, 300)]) for i in range(count)]


class Load:
    """What clients do and what becomes of it."""

    def __init__(self, url: str, wanted: dict[str, str], tokens: int, seconds: float):
        self.url = url
        self.wanted = wanted
        self.tokens = tokens
        self.end = time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.mistakes: list[str] = []
        self.first: list[float] = []
        self.whole: list[float] = []
        self.written = 0

    async def client(self, number: int) -> None:
        """Ask until time is over."""
        rng = random.Random(number)
        prompts = list(self.wanted)
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            while time.monotonic() < self.end:
                prompt = rng.choice(prompts)
                kind = rng.choice(["whole"] * 4 + ["stream"] * 3 + ["slow", "left", "wrong"])
                try:
                    await self.ask(client, kind, prompt, rng)
                    self.outcomes[kind] += 1
                except Exception as error:
                    self.mistakes.append(f"{kind}: {error!r}")

    async def ask(self, client: openai.AsyncOpenAI, kind: str, prompt: str, rng: random.Random) -> None:
        """Ask once, and compare."""
        options = {"model": NAME, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0}
        start = time.monotonic()
        if kind == "wrong":
            wrong = rng.choice([{"temperature": -1}, {"model": "other"}, {"max_tokens": 10**6}, {"logprobs": 99}])
            try:
                await client.completions.create(**{**options, **wrong})
            except (openai.BadRequestError, openai.NotFoundError):
                return
            raise AssertionError(f"{wrong} was taken")
        if kind == "whole":
            text = (await client.completions.create(**options)).choices[0].text
        else:
            text = ""
            stream = await client.completions.create(stream=True, **options)
            async for chunk in stream:
                if not text:
                    self.first.append(time.monotonic() - start)
                text += chunk.choices[0].text
                if kind == "left" and len(text) > 40:
                    await stream.close()
                    return
                if kind == "slow":
                    await asyncio.sleep(0.1)
        if kind != "slow":
            self.whole.append(time.monotonic() - start)
        self.written += self.tokens
        if text != self.wanted[prompt]:
            raise AssertionError(f"another text than alone: {text!r} for {self.wanted[prompt]!r}")


async def watch(process: psutil.Process, load: Load, sizes: list[tuple[float, float]]) -> None:
    """Note the server's memory until time is over."""
    start = time.monotonic()
    while time.monotonic() < load.end:
        sizes.append((time.monotonic() - start, process.memory_info().rss / 2**20))
        await asyncio.sleep(1)


async def run(load: Load, clients: int, process: psutil.Process) -> list[tuple[float, float]]:
    sizes: list[tuple[float, float]] = []
    await asyncio.gather(watch(process, load, sizes), *(load.client(i) for i in range(clients)))
    return sizes


def start_server(folder: str, log: Path, options: list[str]) -> tuple[subprocess.Popen, str]:
    """Return a running server and its address."""
    program = "import sys; from fptq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", folder, "--port", "0", "--model-name", NAME, "--quiet", *options]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    while not (found := re.search(rf"{NAME} at (http://\S+)/v1", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return process, found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--cache-tokens", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    with Engine.open(options.checkpoint, threads=options.threads) as engine:
        prompts = make_prompts(engine, options.prompts, 0)
        written = {p: engine.generate(engine.tokenizer.encode(p), max_new_tokens=options.tokens) for p in prompts}
        wanted = {prompt: "".join(piece.text for piece in pieces) for prompt, pieces in written.items()}
    given = ["--parallel", str(options.parallel)]
    for name in ("threads", "cache_tokens"):
        value = getattr(options, name)
        given += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    log = Path("serving.log")
    process, url = start_server(options.checkpoint, log, given)
    try:
        server = psutil.Process(process.pid)
        before = server.memory_info().rss / 2**20
        load = Load(url, wanted, options.tokens, options.seconds)
        start = time.monotonic()
        sizes = asyncio.run(run(load, options.clients, server))
        seconds = time.monotonic() - start
        after, files = server.memory_info().rss / 2**20, server.num_fds()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            text = client.completions.create(model=NAME, prompt=prompts[0], max_tokens=options.tokens, temperature=0)
            assert text.choices[0].text == wanted[prompts[0]]
    finally:
        process.terminate()
        code = process.wait(60)
    said = log.read_text()
    log.unlink()
    half = [size for at, size in sizes if at > options.seconds / 2]
    figures = {
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "answers": sum(load.outcomes.values()),
        "by kind": dict(load.outcomes),
        "failed": len(load.mistakes),
        "answers a second": round(sum(load.outcomes.values()) / seconds, 2),
        "tokens a second": round(load.written / seconds, 1),
        "seconds to the first token, median": round(statistics.median(load.first), 2),
        "seconds to the whole text, median": round(statistics.median(load.whole), 2),
        "and the longest": round(max(load.whole), 2),
        "MiB before": round(before),
        "MiB, most in the first half": round(max(size for at, size in sizes if at <= options.seconds / 2)),
        "MiB, most in the second half": round(max(half)),
        "MiB after": round(after),
        "open files after": files,
        "exit code": code,
    }
    print("\n".join(f"{name:<36} {value}" for name, value in figures.items()))
    for mistake in load.mistakes[:10]:
        print(mistake)
    if "Traceback" in said:
        print(said[-3000:])
    if options.json:
        Path(options.json).write_text(json.dumps({**figures, "memory": sizes}, indent=2) + "\n")
    if load.mistakes or code or "Traceback" in said:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
