"""The command line as a user meets it: output, files, exit codes, one-line errors."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fptq.cli import main
from fptq.integrations import torch_ops
from fptq.presets import PRESETS, get_recipe
from fptq.runtime import kernels
from fptq.runtime.engine import Engine
from fptq.runtime.kernels import Kernels, choose_target, cpu_name
from tiny import save_tiny
from tokens import save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny(tmp_path_factory.mktemp("chatting"))
    save_tokenizer(model, chat=True)
    folder = tmp_path_factory.mktemp("out") / "q"
    arguments = ["quantize", str(model), "-o", str(folder), "--calibration", "random", "--group-size", "32"]
    assert main([*arguments, "--samples", "4", "--length", "16", "--lm-head", "int8", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "q"
    arguments = ["quantize", str(model), "-o", str(folder), "--calibration", "random", "--group-size", "32"]
    assert main([*arguments, "--samples", "4", "--length", "16", "--quiet"]) == 0
    return folder


def test_quantize_shows_progress_and_the_plan(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(model), "-o", str(tmp_path / "q"), "--calibration", "random", "--group-size", "32"]
    assert main([*arguments, "--samples", "4", "--length", "16", "--recipe", "fptq-wide", "--v1", "200"]) == 0
    shown = capsys.readouterr()
    assert "left" in shown.err
    for words in ("equalized static", "channel maxima", "bits each", "fingerprint", "recipe fptq-wide", "v1 200"):
        assert words in shown.out


def test_keys_are_equalized_or_not_as_wanted(model: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(model), "--calibration", "random", "--length", "16", "--group-size", "32", "--quiet"]
    for recipe, wanted in (("fptq", "--equalize-keys"), ("fptq-best-quick", "--no-equalize-keys")):
        folder = tmp_path / recipe
        assert main([*arguments, "-o", str(folder), "--samples", "4", "--recipe", recipe, wanted]) == 0
        record = json.loads((folder / "fptq.json").read_text())
        assert record["recipe"]["equalize_keys"] == (wanted == "--equalize-keys")
        equalized = [c["key_range_after"] != c["key_range"] for c in record["cache"].values()]
        assert len(equalized) > 0
        assert set(equalized) == {wanted == "--equalize-keys"}


def test_effort_chooses_recipe_and_samples(model: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(model), "--calibration", "random", "--length", "16", "--group-size", "32", "--quiet"]
    made = {}
    for given in ([], ["--effort", "quick"], ["--effort", "normal", "--samples", "8", "--tuning-steps", "3"]):
        folder = tmp_path / "-".join(["q", *given])
        assert main([*arguments, "-o", str(folder), "--recipe", "fptq-best", *given]) == 0
        record = json.loads((folder / "fptq.json").read_text())
        made["-".join(given)] = (
            tuple(record["recipe"][key] for key in ("name", "tuning_steps")),
            record["calibration"]["samples"],
        )
    assert made == {
        "": (("fptq-best", get_recipe("fptq-best").tuning_steps), 128),
        "--effort-quick": (("fptq-best-quick", 0), 32),
        "--effort-normal---samples-8---tuning-steps-3": (("fptq-best", 3), 8),
    }


def test_inspect_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--verify", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "files are as they were written",
        "model.layers.1.mlp.down_proj",
        "SQNR",
        "before equalization",
        "after",
    ):
        assert words in shown
    assert len(json.loads((tmp_path / "plan.json").read_text())["layers"]) == 14
    assert main(["inspect", str(checkpoint), "--summary"]) == 0
    assert "model.layers.0.mlp.gate_proj " not in capsys.readouterr().out


def test_inspect_a_model_decides_the_same_and_writes_nothing(
    model: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(model.iterdir())
    plan = tmp_path / "plan.json"
    arguments = ["inspect", str(model), "--samples", "4", "--length", "16", "--group-size", "32", "--json", str(plan)]
    assert main(arguments) == 0
    assert "channel maxima" in capsys.readouterr().out
    assert sorted(model.iterdir()) == before
    stored = json.loads((checkpoint / "fptq.json").read_text())["layers"]
    for name, layer in json.loads(plan.read_text())["layers"].items():
        assert layer == {key: stored[name][key] for key in layer}


def test_inspect_a_model_advises_on_uneven_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where one channel of the keys is far larger than the others, and not where it is equalized or kept in float."""
    model = save_tiny(tmp_path / "model", "qwen2")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.bias"][3] = 400
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    arguments = ["inspect", str(model), "--samples", "4", "--length", "16", "--group-size", "32", "--summary"]
    for options, advised in (([], True), (["--equalize-keys"], False), (["--kv-cache", "float"], False)):
        assert main([*arguments, *options]) == 0
        assert ("in 1 of 2 blocks some channels of the keys" in capsys.readouterr().out) == advised


@pytest.mark.parametrize("recipe", ["fptq", "rtn-w4a16"])
def test_an_int8_head_has_a_line(model: Path, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--samples", "4", "--length", "16", "--group-size", "32", "--recipe", recipe, "--lm-head", "int8"]
    assert main(["inspect", str(model), *options]) == 0
    planned = capsys.readouterr().out
    arguments = ["quantize", str(model), "-o", str(tmp_path / "q"), "--calibration", "random", *options]
    assert main([*arguments, "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "q"), "--verify"]) == 0
    made = capsys.readouterr().out
    kind = "dynamic" if recipe == "fptq" else "float"
    for shown in (planned, made):
        [line] = [line for line in shown.splitlines() if line.startswith("lm_head")]
        assert line.split() == ["lm_head", "Head", "·", "·", kind, "int8", "·", "·"]
        [line] = [line for line in shown.splitlines() if line.startswith("Head")]
        assert line.split().count("1") == 1
    assert "int8 by rows: lm_head\n" in made


def test_evaluate_and_generate(
    model: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 150}" for i in range(300)))
    figures = tmp_path / "figures.json"
    arguments = ["evaluate", str(checkpoint), "--reference", str(model), "--text", str(text), "--length", "32"]
    assert main([*arguments, "--limit", "4", "--json", str(figures), "--quiet"]) == 0
    assert "4 windows of 32 tokens" in capsys.readouterr().out
    values = json.loads(figures.read_text())
    assert {"reference", "quantized", "kl_divergence", "top1_agreement"} <= set(values)
    assert main(["generate", str(checkpoint), "w1 w2 w3", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["quantize", "/nowhere", "-o", "{tmp}/q"], "no such folder or file"),
        (["quantize", "{model}", "-o", "{model}", "--calibration", "random"], "didn't make"),
        (["quantize", "{model}", "-o", "{tmp}/q", "--calibration", "random", "--samples", "0"], "0 samples"),
        (["quantize", "{model}", "-o", "{tmp}/q", "--length", "9", "--calibration", "{tmp}/none.txt"], "can't be read"),
        (["quantize", "{model}", "-o", "{tmp}/q", "--v0", "200"], "0 <= v0 <= v1"),
        (["quantize", "{model}", "-o", "{tmp}/q", "--effort", "quick"], "recipe fptq has no choice of effort"),
        (["inspect", "{model}", "--verify"], "needs a checkpoint folder"),
        (["evaluate", "{checkpoint}"], "nothing to evaluate on"),
        (["evaluate", "{model}", "--text", "x.txt", "--length", "32"], "x.txt: can't be read"),
        (["evaluate", "{tmp}", "--text", "x"], "no config.json in it"),
        (["generate", "{checkpoint}", "w1", "--max-new-tokens", "0"], "max_new_tokens 0"),
        (["inspect", "{checkpoint}", "--v0", "3"], "already decided; --v0"),
        (["inspect", "{checkpoint}", "--lm-head", "int8"], "already decided; --lm-head"),
        (["inspect", "{model}", "--recipe", "rtn-w4a16", "--v0", "9"], "--v0 changes nothing with recipe rtn-w4a16"),
        (["generate", "{checkpoint}", "w1", "--top-p", "0.5"], "top_p 0.5: needed a temperature"),
        (["generate", "{tmp}", "w1"], "not a finished checkpoint folder"),
        (["generate", "{checkpoint}", "w1", "--threads", "0"], "0 threads"),
        (["generate", "{checkpoint}", "w1", "--context", "100000"], "at most 256"),
        (["generate", "{checkpoint}", "w1", "--chat"], "no chat template"),
        (["generate", "{checkpoint}", "w1 w2 w3", "--context", "4"], "the prompt has 4 tokens, the context 4"),
        (["generate", "{checkpoint}", "w1", "--runtime", "transformers", "--top-k", "5"], "--top-k is for the engine"),
        (["chat", "{checkpoint}"], "no chat template"),
        (["bench", "{checkpoint}", "--prompt", "0"], "need at least 1"),
        (["bench", "{checkpoint}", "--prompt", "500"], "at most 256"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(
    arguments: list[str],
    match: str,
    model: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [a.format(tmp=tmp_path, model=model, checkpoint=checkpoint) for a in arguments]
    assert main(filled) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fptq: error: ")
    assert match in message
    assert not list(tmp_path.glob("q*"))


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "demo"])
    assert stop.value.code == 2
    assert "-o" in capsys.readouterr().err


def test_help_names_every_recipe_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    shown = capsys.readouterr().out
    for words in (*PRESETS, "fptq: 128", "fptq: 512", "fptq: 15", "pile", "example"):
        assert words in shown


def test_interrupt_exits_130(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fptq.quantize.walk.CalibrationWalk.observe", interrupted)
    arguments = ["quantize", str(model), "-o", str(tmp_path / "q"), "--calibration", "random", "--group-size", "32"]
    assert main([*arguments, "--length", "16"]) == 130
    assert not (tmp_path / "q").exists()


def test_a_missing_torch_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from fptq.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "quantize", "demo", "-o", str(tmp_path / "q")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "needs torch: pip install 'fptq[torch]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_doctor_names_cpu_kernel_and_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FPTQ_KERNEL", raising=False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    chosen, reason = choose_target()
    for words in (f"kernel: {chosen}, {reason}", cpu_name(), "equal those of the numpy reference", "torch", "scalar"):
        assert words in shown
    monkeypatch.setenv("FPTQ_KERNEL", "scalar")
    assert main(["doctor"]) == 0
    assert "kernel: scalar, the environment variable FPTQ_KERNEL asks for it" in capsys.readouterr().out
    monkeypatch.setenv("FPTQ_KERNEL", "3dnow")
    assert main(["doctor"]) == 1
    assert "no kernel '3dnow'" in capsys.readouterr().err


def test_doctor_finds_a_kernel_that_computes_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Kernels.matmul
    monkeypatch.setattr(Kernels, "matmul", lambda self, *operands: right(self, *operands) + 1)
    assert main(["doctor"]) == 1
    assert "computes wrong products of 1 rows with int4 weights" in capsys.readouterr().err


def test_without_native_kernels_everything_runs_and_says_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a pure Python installation."""
    prompt = ["generate", str(checkpoint), "w3 w4", "--max-new-tokens", "5"]
    assert main(prompt) == 0
    native = capsys.readouterr()
    assert "reference" not in native.err
    torch_ops._kernels.cache_clear()
    monkeypatch.delenv("FPTQ_KERNEL", raising=False)
    monkeypatch.setattr(kernels, "_native", None)
    monkeypatch.setattr(kernels, "_missing", "No module named 'fptq.runtime._native'", raising=False)
    try:
        assert main(prompt) == 0
        plain = capsys.readouterr()
        assert plain.out == native.out
        assert "the numpy reference runs; slow: this installation has no native kernels" in plain.err
        assert main(["doctor"]) == 0
        assert "kernel: reference, slow" in capsys.readouterr().out
    finally:
        torch_ops._kernels.cache_clear()


def test_generate_options_reach_the_engine(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: str) -> str:
        assert main(["generate", str(checkpoint), "w5 w6 w7", "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out.strip()

    sampled = ("--temperature", "1.5", "--seed", "1")
    plain, free = text(), text(*sampled)
    assert text(*sampled) == free != plain
    assert text("--temperature", "1.5", "--seed", "2") != free
    assert (
        text(*sampled, "--top-k", "1") == text(*sampled, "--top-p", "1e-9") == text(*sampled, "--min-p", "1") == plain
    )
    assert text(*sampled, "--repetition-penalty", "5") != free
    words = free.split()
    assert text(*sampled, "--stop", words[2]).split() == words[: words.index(words[2])]
    assert text("--runtime", "transformers").split() == plain.split()


def test_generate_reads_standard_input(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(checkpoint), "w5 w6", "--max-new-tokens", "4"]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6"))
    assert main(["generate", str(checkpoint), "-", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == wanted


def chat(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "6", *options])


def test_chat_answers_remembers_and_forgets(
    chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(chatting, ["w3 w4", "w5", "/reset", "w3 w4", "/help", "", "/system w9", "w3 w4"], monkeypatch) == 0
    answers = [part.strip() for part in capsys.readouterr().out.split("> ")[1:]]
    first, second, _, again, commands, _, _, instructed, _ = answers
    assert first == again
    assert len({first, second, instructed}) == 3
    assert "/reset" in commands
    assert chat(chatting, ["w3 w4", "/exit", "w5"], monkeypatch) == 0
    assert capsys.readouterr().out.count("> ") == 2


def test_an_interrupt_stops_the_answer_and_not_the_chat(
    chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    forward = Engine.forward

    def interrupted(self: Engine, batch: object, **options: object) -> object:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, batch, **options)

    monkeypatch.setattr(Engine, "forward", interrupted)
    assert chat(chatting, ["w3 w4", "/reset", "w3 w4"], monkeypatch) == 0
    stopped, _, whole = capsys.readouterr().out.split("> ")[1:4]
    assert "(stopped)" in stopped
    assert whole.startswith(stopped.split(" (stopped)")[0])
    assert "(stopped)" not in whole


def test_a_chat_that_outgrows_its_context_goes_on(
    chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["w7"] * 40)
    assert chat(chatting, [long, "w3", "/reset", "w3 w4"], monkeypatch, "--context", "32") == 0
    parts = capsys.readouterr().out.split("> ")[1:]
    assert "the context 32" in parts[0]
    assert "/reset begins anew" in parts[0]
    assert "fptq:" not in parts[1] + parts[3]


def test_bench_shows_figures_and_ceilings(chatting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    arguments = ["--prompt", "16", "32", "--generate", "4", "--batch", "1", "3", "--repetitions", "1", "--profile"]
    assert main(["bench", str(chatting), *arguments, "--threads", "1", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    for words in ("16 + 4 × 1", "32 + 4 × 3", "of peak", "GB/s", "resident", "attention", "1 threads"):
        assert words in shown
    values = json.loads(path.read_text())
    assert len(values["rows"]) == 4
    for row in values["rows"]:
        assert 0 < row["prefill_tokens_per_sec"] < row["prefill_ceiling"]
        assert row["decode_tokens_per_sec"] > 0


def test_threads_wait_briefly_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, spins in (({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.setenv(name, given.get(name, ""))  # so that what was there comes back
            if name not in given:
                monkeypatch.delenv(name)
        assert main(["inspect", "nowhere"]) == 1
        assert os.environ.get("GOMP_SPINCOUNT") == spins
    loads = "import sys, fptq.cli; sys.exit('torch' in sys.modules)"  # too early to tell libgomp
    subprocess.run([sys.executable, "-c", loads], check=True)
