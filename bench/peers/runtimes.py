"""The runtimes that bench/engine.py compares: how each converts a model, loads it and generates with it.

    python bench/peers/runtimes.py convert RUNTIME MODEL FOLDER
    python bench/peers/runtimes.py serve RUNTIME FOLDER THREADS

MODEL is a Hugging Face folder in float, FOLDER what the runtime makes of it. The second command answers requests: a
line of JSON in, a line out. Each command runs in the runtime's own environment, which has nothing else, not even this
package; so all imports are inside functions.

All generate greedily and go on after an end-of-text token. A prompt's time is that up to its first new token.
"""

import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Generate = Callable[[list[int], int], Iterator[int]]
Run = Callable[[dict[str, Any]], dict[str, Any]]

CONTEXT = 1024
GGUF = "source.gguf"  # in MODEL, where it was made from one
READ_BYTES = 512 << 20
DOT_STEPS = 10**6
CEILING_SEC = 0.25
CEILING_REPETITIONS = 5


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Attributes:
        environment: the name of its environment under bench/engine.py's --environments; None: that of fptq.
        versions: returns those of its parts.
        convert: writes FOLDER, which isn't there yet, from MODEL; None: it reads MODEL itself.
        load: returns what answers requests.
        files: that must be under --environments.
        preloaded: shared libraries of the environment that its process starts with.
    """

    environment: str | None
    versions: Callable[[], dict[str, str]]
    convert: Callable[[Path, Path], None] | None
    load: Callable[[Path, int], Run]
    files: tuple[str, ...] = ()
    preloaded: tuple[str, ...] = ()


def answer_with(generate: Generate) -> Run:
    """Return what answers requests with the tokens that `generate` yields, and the time they take."""

    def run(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        tokens, first = [], 0.0
        for token in generate(request["tokens"], request["generate"]):
            tokens.append(int(token))
            first = first or time.perf_counter()
        return {
            "prefill_seconds": first - start,
            "decode_seconds": time.perf_counter() - first,
            "decode_tokens": len(tokens) - 1,
            "tokens": tokens,
        }

    return run


# ---- Ours


def convert_fptq(model: Path, folder: Path) -> None:
    """Quantize with random tokens, which costs accuracy and not speed."""
    options = ["--calibration", "random", "--samples", "16", "--recipe", "fptq-figure4", "--lm-head", "int8", "--quiet"]
    subprocess.run([sys.executable, "-m", "fptq.cli", "quantize", model, "-o", folder, *options], check=True)


def load_fptq(folder: Path, threads: int) -> Run:
    """FPTQ: int4 weights in groups of 128 or 64, int8 head, activations and KV cache."""
    from fptq.runtime.engine import Engine

    engine = Engine.open(folder, threads=threads, context=CONTEXT)

    def generate(tokens: list[int], count: int) -> Iterator[int]:
        return (piece.token for piece in engine.generate(tokens, max_new_tokens=count, stop_ids=()))

    run = answer_with(generate)
    return lambda request: run(request) | {"weight_bytes": engine.weight_bytes}


def load_ceilings(folder: Path, threads: int) -> Run:
    """Return what measures the machine instead of a runtime: the fastest reading of memory, and int8 dot product."""
    import numpy as np

    from fptq.runtime.kernels import Kernels

    kernels = Kernels(threads=threads)
    memory = np.ones(READ_BYTES, np.uint8)

    def rate(work: Callable[[], int]) -> float:
        rates: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < CEILING_SEC or len(rates) < CEILING_REPETITIONS:
            start = time.perf_counter()
            rates.append(work() / (time.perf_counter() - start))
        return max(rates)

    def read() -> int:
        kernels.measure_read(memory)
        return memory.nbytes

    def dot() -> int:
        return kernels.measure_dot(DOT_STEPS)

    return lambda request: {"read_bytes_per_sec": rate(read), "dot_ops_per_sec": rate(dot)}


# ---- llama.cpp


def convert_llamacpp(model: Path, folder: Path) -> None:
    """Quantize the GGUF file that the model comes from, or a new one, to Q4_0; the head becomes Q6_K or Q8_0."""
    folder.mkdir()
    source, new = model / GGUF, folder / "f16.gguf"
    if not source.exists():
        write_gguf(model, new)
    command = [_llamacpp("llama-quantize"), "--allow-requantize", source if source.exists() else new]
    subprocess.run([*command, folder / "q4_0.gguf", "Q4_0"], check=True)
    new.unlink(missing_ok=True)


def load_llamacpp(folder: Path, threads: int) -> Run:
    """llama.cpp: its own llama-bench, in a process for each sample, which loads the model and warms up."""

    def bench(*arguments: object) -> dict[str, Any]:
        command = [_llamacpp("llama-bench"), "-m", folder / "q4_0.gguf", "-t", threads, "-r", 1, "-o", "json"]
        process = subprocess.Popen([str(a) for a in (*command, *arguments)], stdout=subprocess.PIPE, text=True)
        resident = []
        while process.poll() is None:
            resident.append(memory_bytes("VmRSS", process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"llama-bench returned {process.returncode}")
        return json.loads(process.stdout.read())[0] | {"memory_bytes": statistics.median(resident)}

    def run(request: dict[str, Any]) -> dict[str, Any]:
        prompt, count = len(request["tokens"]), request["generate"]
        if "text" in request:  # it has a tokenizer of its own
            arguments = ["-m", folder / "q4_0.gguf", "-t", threads, "-n", count, "-p", request["text"], "--temp", 0]
            switches = ["-no-cnv", "--no-display-prompt", "--ignore-eos", "--no-warmup"]
            command = [str(a) for a in (_llamacpp("llama-completion"), *arguments, *switches)]
            return {"text": subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout}
        prefill = bench("-p", prompt, "-n", 0)
        decode = bench("-p", 0, "-n", count, "-d", prompt)
        assert (prefill["n_prompt"], decode["n_gen"], decode["n_depth"]) == (prompt, count, prompt)
        return {
            "prefill_seconds": prefill["avg_ns"] / 1e9,
            "decode_seconds": decode["avg_ns"] / 1e9,
            "decode_tokens": count,
            "memory_bytes": decode["memory_bytes"],
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }

    return run


def llamacpp_version() -> dict[str, str]:
    """Return what llama-bench says of itself."""
    command = [_llamacpp("llama-bench"), "--version"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return {"llama.cpp": " ".join(found.stdout.split())}


def _llamacpp(program: str) -> Path:
    return Path(os.environ["LLAMACPP"]) / program


def write_gguf(model: Path, path: Path) -> None:
    """Write a Llama's tensors as llama.cpp names and orders them, in float16, without a tokenizer."""
    import gguf
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    head_dim = config["hidden_size"] // heads["q_proj"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    with safe_open(model / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not iterable
            tensor = tensors.get_tensor(name).float()
            if (projection := name.split(".")[-2]) in heads:  # pairs of a rotation: halves become neighbours
                halves = tensor.view(heads[projection], 2, head_dim // 2, -1)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            tensor = tensor if tensor.ndim == 1 else tensor.half()
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- OpenVINO


def convert_openvino(model: Path, folder: Path) -> None:
    """Export with optimum-intel: int4 weights in symmetric groups of 128 or 64, embeddings and head in int8."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    quantization = OVWeightQuantizationConfig(bits=4, sym=True, ratio=1.0, group_size=group_size(model))
    OVModelForCausalLM.from_pretrained(model, export=True, quantization_config=quantization).save_pretrained(folder)
    both = convert_tokenizer(AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    for converted, name in zip(both, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(converted, folder / f"openvino_{name}.xml")


def load_openvino(folder: Path, threads: int) -> Run:
    """OpenVINO GenAI as it is by default: dynamic int8 activations, int8 KV cache; it reports the times itself."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(request: dict[str, Any]) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request["generate"]
        config.ignore_eos, config.do_sample = True, False
        result = pipeline.generate(openvino.Tensor(np.array([request["tokens"]], np.int64)), config)
        first, whole = result.perf_metrics.get_ttft().mean, result.perf_metrics.get_generate_duration().mean
        return {
            "prefill_seconds": first / 1e3,
            "decode_seconds": (whole - first) / 1e3,
            "decode_tokens": len(result.tokens[0]) - 1,
            "tokens": list(result.tokens[0]),
        }

    return run


# ---- onnxruntime


def convert_onnxruntime(model: Path, folder: Path) -> None:
    """Build with onnxruntime-genai: all weights int4 in groups of 128 or 64, head included, at accuracy level 4."""
    options = ["accuracy_level=4", f"block_size={group_size(model)}", "prune_lm_head=true"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", folder, "-p", "int4"]
    command = [*builder, "-e", "cpu", "-c", folder / "cache", "--extra_options", *options]
    subprocess.run(command, check=True)


def load_onnxruntime(folder: Path, threads: int) -> Run:
    """onnxruntime-genai: int8 activations in the weights' groups, float32 KV cache."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def generate(tokens: list[int], count: int) -> Iterator[int]:
        length = len(tokens) + count
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    return answer_with(generate)


# ---- vLLM


def convert_vllm(model: Path, folder: Path) -> None:
    """Write a checkpoint with int8 weights, a scale per channel, and dynamic int8 activations, a scale per token."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if ".layers." in name and tensor.ndim == 2:
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors |= {name: (tensor.float() / scale).round().to(torch.int8), f"{name}_scale": scale.bfloat16()}
        else:
            tensors[name] = tensor.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in model.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))


def load_vllm(folder: Path, threads: int) -> Run:
    """Return vLLM's CPU backend, with oneDNN's int8 kernels, bfloat16 elsewhere."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    from vllm import LLM, SamplingParams

    lengths = {"max_model_len": CONTEXT, "max_num_batched_tokens": CONTEXT, "max_num_seqs": 1}
    engine = LLM(str(folder), dtype="bfloat16", enable_prefix_caching=False, **lengths).llm_engine

    def generate(tokens: list[int], count: int) -> Iterator[int]:
        sampling = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
        engine.add_request("request", {"prompt_token_ids": tokens}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                yield output.outputs[0].token_ids[-1]

    return answer_with(generate)


# ---- transformers


def load_transformers(folder: Path, threads: int) -> Run:
    """Transformers in float32, eager."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(tokens: list[int], count: int) -> Iterator[int]:
        cache, ids = None, torch.tensor([tokens])
        for _ in range(count):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield ids.item()

    return answer_with(generate)


def packages(*names: str) -> Callable[[], dict[str, str]]:
    """Return what returns the versions of packages."""
    return lambda: {name: importlib.metadata.version(name) for name in names}


RUNTIMES = {
    "ceilings": Runtime(None, packages("fptq"), None, load_ceilings),
    "fptq": Runtime(None, packages("fptq"), convert_fptq, load_fptq),
    "llama.cpp-q4_0": Runtime(
        None,
        llamacpp_version,
        convert_llamacpp,
        load_llamacpp,
        files=("llamacpp/bin/llama-bench", "llamacpp/bin/llama-quantize", "llamacpp/bin/llama-completion"),
    ),
    "openvino-int4": Runtime("genai", packages("openvino-genai", "openvino"), convert_openvino, load_openvino),
    "onnxruntime-int4": Runtime(
        "genai", packages("onnxruntime-genai", "onnxruntime"), convert_onnxruntime, load_onnxruntime
    ),
    "vllm-w8a8": Runtime(
        "vllm",
        packages("vllm-cpu", "torch"),
        convert_vllm,
        load_vllm,
        preloaded=("vllm/lib/libiomp5.so",),  # as its manual says
    ),
    "transformers-fp32": Runtime(None, packages("transformers", "torch"), None, load_transformers),
}


# ---- Commands


def group_size(model: Path) -> int:
    """Return 128, or 64 for a model whose width isn't a multiple."""
    return 128 if json.loads((model / "config.json").read_text())["hidden_size"] % 128 == 0 else 64


def memory_bytes(field: str, process: int | str = "self") -> int:
    """Return a figure of /proc/PROCESS/status in bytes: VmRSS, the memory in use, or VmHWM, the most so far."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class ForeignLoad:
    """How many CPUs other processes, and the hypervisor for other machines, use from now on."""

    def __init__(self) -> None:
        self._start = self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Return wall time, the CPU time of all processes, and that of this one and its children."""
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])

    def cores(self) -> float:
        """Return their mean."""
        wall, busy, own = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        return max(0.0, busy - own) / wall


def convert(name: str, model: str, folder: str) -> None:
    """Write FOLDER whole, or not at all."""
    made = RUNTIMES[name].convert
    assert made is not None
    partial = Path(f"{folder}.partial")
    made(Path(model), partial)
    partial.rename(folder)


def serve(name: str, folder: str, threads: str) -> None:
    """Answer requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print isn't a reply
    runtime = RUNTIMES[name]
    run = runtime.load(Path(folder), int(threads))
    print(json.dumps(runtime.versions()), file=replies)
    for line in sys.stdin:
        load = ForeignLoad()
        reply = run(json.loads(line))
        reply["foreign_cores"] = load.cores()
        memory = {"memory_bytes": memory_bytes("VmRSS"), "peak_memory_bytes": memory_bytes("VmHWM")}
        print(json.dumps(memory | reply), file=replies)


if __name__ == "__main__":
    {"convert": convert, "serve": serve}[sys.argv[1]](*sys.argv[2:])
