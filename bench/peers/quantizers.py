"""The quantizers that bench/quantizer_peers.py compares: one function for each, run in the quantizer's own environment.

    ENVIRONMENT/bin/python bench/peers/quantizers.py NAME JOB.json

The job is a `Job` in JSON. Such an environment has nothing else, not even this package; so all imports are inside
functions. What is left in the job's folder "checkpoint" can be opened by transformers: compressed-tensors where
activations are quantized, too, else that or weights that are float again.
"""

import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = "lm_head"
BATCH = 8  # sequences that run at once, where that doesn't change the result


@dataclass(frozen=True)
class Job:
    """What to quantize.

    Attributes:
        model: a Hugging Face folder in float32.
        tokens: an .npy file of token ids, int64 [samples, length].
        samples: use this many of them, from the first on.
        group_sizes: of each linear layer by its full name.
        folder: to write the result into, in "checkpoint".
        iterations: of the quantizers that optimize.
        threads: of the CPU.
        device: where auto-round tunes, "cpu" or "cuda"; llm-compressor takes an accelerator by itself.
    """

    model: str
    tokens: str
    samples: int
    group_sizes: dict[str, int]
    folder: str
    iterations: int
    threads: int
    device: str = "cpu"

    @property
    def checkpoint(self) -> Path:
        """Where the result goes."""
        return Path(self.folder) / "checkpoint"

    def sequences(self) -> Any:
        """Return the token ids as a tensor [samples, length]."""
        import numpy as np
        import torch

        return torch.from_numpy(np.load(self.tokens)[: self.samples])

    def layers_by_group_size(self) -> dict[int, list[str]]:
        """Return the layers of each group size."""
        layers: dict[int, list[str]] = {}
        for name, size in self.group_sizes.items():
            layers.setdefault(size, []).append(name)
        return layers

    def save_tokenizer(self) -> None:
        """Put the tokenizer beside the result."""
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(self.model).save_pretrained(self.checkpoint)


@dataclass(frozen=True)
class Quantizer:
    """A quantizer with a method.

    Attributes:
        method: what it does; fptq's recipe for the same has this name.
        environment: the name of its folder of bench/quantizer_peers.sh.
        packages: whose versions belong to its result.
        run: quantizes; returns the settings that mattered.
        starts_from: the quantizer whose result is its model; None: the float model.
        calibrated: False if no token is looked at.
        resumes: whether it goes on with what an interrupted run has left in the job's folder.
    """

    method: str
    environment: str
    packages: tuple[str, ...]
    run: Callable[[Job], dict[str, Any]]
    starts_from: str | None = None
    calibrated: bool = True
    resumes: bool = False


# ---- llm-compressor


def int_weights(bits: int, **changes: Any) -> dict[str, Any]:
    """Return compressed-tensors' arguments of symmetric weights: a scale a row, if `changes` don't say otherwise."""
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, **changes}


TOKEN_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def grouped_schemes(job: Job, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return llm-compressor's `config_groups` of int4 weights with each layer's own group size."""
    return {
        f"group_{i}": {
            "targets": names,
            "weights": int_weights(4, strategy="group", group_size=size),
            "input_activations": inputs,
        }
        for i, (size, names) in enumerate(job.layers_by_group_size().items())
    }


def channel_schemes(job: Job, bits: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return llm-compressor's `config_groups` of weights with a scale a row."""
    names = list(job.group_sizes)
    return {"group_0": {"targets": names, "weights": int_weights(bits), "input_activations": inputs}}


def run_llmcompressor(
    job: Job, modifiers: list[Any], calibrated: bool = True, batch: int = BATCH, propagate: bool = False
) -> None:
    """Apply `modifiers` to the job's model and save it.

    Args:
        job: says what model, on what tokens.
        modifiers: the recipe.
        calibrated: whether they look at tokens.
        batch: sequences at once.
        propagate: run each block again after it has changed, so that the next one sees the change. Without, it sees
            the same numbers if the change wasn't one of what the block computes.
    """
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    rows = [{"input_ids": row} for row in job.sequences()]
    data = {"dataset": DataLoader(rows, batch_size=batch), "propagate_error": propagate} if calibrated else {}
    oneshot(model=model, recipe=modifiers, **data)
    model.save_pretrained(job.checkpoint)
    job.save_tokenizer()


def llmcompressor_rtn(job: Job) -> dict[str, Any]:
    """Weights rounded to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = QuantizationModifier(config_groups=grouped_schemes(job), ignore=[HEAD])
    run_llmcompressor(job, [modifier], calibrated=False)
    return {}


def llmcompressor_gptq(job: Job, actorder: str | None) -> dict[str, Any]:
    """GPTQ: errors go on to the columns and to the blocks that follow."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    settings = {"block_size": 128, "dampening_frac": 0.01, "actorder": actorder}
    run_llmcompressor(
        job, [GPTQModifier(config_groups=grouped_schemes(job), ignore=[HEAD], **settings)], propagate=True
    )
    return settings


def llmcompressor_awq(job: Job) -> dict[str, Any]:
    """AWQ with its default search, then rounding to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None  # fails where there is no accelerator to pin memory for
    settings = {"duo_scaling": True, "n_grid": 20}
    quantization = QuantizationModifier(config_groups=grouped_schemes(job), ignore=[HEAD])
    run_llmcompressor(job, [AWQModifier(**settings), quantization])
    return settings


def llmcompressor_smooth(job: Job) -> dict[str, Any]:
    """SmoothQuant alone: a float model that others quantize."""
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    settings = {"smoothing_strength": 0.5}
    run_llmcompressor(job, [SmoothQuantModifier(**settings)])
    (job.checkpoint / "recipe.yaml").unlink()  # the next one would read it, and can't
    return settings


def llmcompressor_w8a8(job: Job) -> dict[str, Any]:
    """Weights a scale a row, inputs a scale a token."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = QuantizationModifier(config_groups=channel_schemes(job, 8, TOKEN_INPUTS), ignore=[HEAD])
    run_llmcompressor(job, [modifier], calibrated=False)
    return {}


def llmcompressor_w8a8_static(job: Job, observer: str) -> dict[str, Any]:
    """Weights a scale a row, inputs one scale. A batch of one sequence: the observers of the mean range see that."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    inputs = {**TENSOR_INPUTS, "observer": observer}
    modifier = QuantizationModifier(config_groups=channel_schemes(job, 8, inputs), ignore=[HEAD])
    run_llmcompressor(job, [modifier], batch=1)
    return {"input_observer": observer}


def llmcompressor_w4a8(job: Job) -> dict[str, Any]:
    """int4 weights a scale a row, inputs a scale a token."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = QuantizationModifier(config_groups=channel_schemes(job, 4, TOKEN_INPUTS), ignore=[HEAD])
    run_llmcompressor(job, [modifier], calibrated=False)
    return {}


def llmcompressor_w4a8_groups(job: Job) -> dict[str, Any]:
    """int4 weights in groups, inputs a scale a token."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = QuantizationModifier(config_groups=grouped_schemes(job, TOKEN_INPUTS), ignore=[HEAD])
    run_llmcompressor(job, [modifier], calibrated=False)
    return {}


# ---- GPTQModel


def gptqmodel_gptq(job: Job) -> dict[str, Any]:
    """GPTQModel's GPTQ; its checkpoint is kept in "packed", and unpacked to floats."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # needs two, and takes one by default where there are 2 cores
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import GPTQConfig

    sizes = job.layers_by_group_size()
    usual = max(sizes, key=lambda size: len(sizes[size]))
    dynamic = {rf"+:^{name}$": {"group_size": size} for name, size in job.group_sizes.items() if size != usual}
    settings = {"desc_act": False, "act_group_aware": False, "damp_percent": 0.01, "static_groups": False}
    config = GPTQConfig(
        bits=4,
        group_size=usual,
        sym=True,
        dynamic=dynamic or None,
        offload_to_disk=False,
        pack_impl="original",  # the others are compiled first
        **settings,
    )
    model = GPTQModel.load(job.model, config, device="cpu", dtype=torch.float32)  # a name is taken for bfloat16
    rows = [{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in job.sequences()]
    model.quantize(rows, batch_size=1)
    packed = Path(job.folder) / "packed"
    model.save(str(packed))
    unpack_gptq(job, packed)
    return settings


def unpack_gptq(job: Job, packed: Path) -> None:
    """Write the float model with the weights that a checkpoint in GPTQ's format stands for.

    Words of qweight [k/8, n] hold eight rows' codes, those of qzeros [G, n/8] eight columns' zeros, less one in the
    first version of the format; w = (code - zero) · scale.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors: dict[str, Any] = {}
    for file in sorted(packed.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    first_version = config.get("checkpoint_format", config.get("format", "gptq")) == "gptq"
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for name in job.group_sizes:
        words, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"].float()
        codes = (words[:, None, :] >> shifts[None, :, None]).reshape(-1, words.shape[1]) & 15
        zeros = (tensors[f"{name}.qzeros"][:, :, None] >> shifts).reshape(scales.shape) & 15
        group = tensors[f"{name}.g_idx"].long()
        weight = (codes - (zeros + int(first_version))[group]) * scales[group]
        model.get_submodule(name).weight.data.copy_(weight.T)
    model.save_pretrained(job.checkpoint)
    job.save_tokenizer()


# ---- auto-round


def autoround_w4a16(job: Job) -> dict[str, Any]:
    """auto-round's SignRound, saved with weights that are float again.

    It is tuned as is its default: in bfloat16 where the CPU has instructions for that, else in float32, with the rate
    1 / iterations; with 50 iterations as the package's "light" setting has it. Its "best" is 1,000 iterations and 512
    samples. Blocks that are done are kept in the folder "resume", where an interrupted run goes on; a result that
    is "resumed" has the seconds of the last run alone.
    """
    kept = Path(job.folder) / "resume"
    resumed = kept.exists()
    # streamed: else blocks that are done aren't kept on the disk
    os.environ |= {"AR_RESUME_DIR": str(kept), "AR_WORK_SPACE": str(kept), "AR_DISK_STREAM_MODEL": "1"}
    from auto_round import AutoRound

    sizes = job.layers_by_group_size()
    usual = max(sizes, key=lambda size: len(sizes[size]))
    others = {name: {"group_size": size} for name, size in job.group_sizes.items() if size != usual}
    sequences = job.sequences()
    rate = 5e-3 if job.iterations == 50 else None
    tuner = AutoRound(
        job.model,
        scheme={"bits": 4, "group_size": usual, "sym": True, "data_type": "int"},
        layer_config=others,
        dataset=[row[None] for row in sequences],
        iters=job.iterations,
        lr=rate,
        seqlen=sequences.shape[1],
        nsamples=len(sequences),
        batch_size=BATCH,
        device_map=job.device,
    )
    # saved by itself (format "fake"), auto-round 0.16.1 puts the float weights back
    model, _ = tuner.quantize()
    for name, size in job.group_sizes.items():
        levels = model.get_submodule(name).weight.view(-1, size)[0].unique().numel()
        assert levels <= 16, f"{name}: isn't quantized"
    model.save_pretrained(job.checkpoint)
    job.save_tokenizer()
    shutil.rmtree(kept)
    return {"iters": job.iterations, "lr": rate, "batch_size": BATCH, "resumed": resumed}


LLMCOMPRESSOR = ("llmcompressor", ("llmcompressor", "compressed-tensors", "transformers", "torch"))
GPTQMODEL = ("gptqmodel", ("gptqmodel", "transformers", "torch"))
AUTOROUND = ("autoround", ("auto-round", "transformers", "torch"))
SMOOTHED = "llmcompressor-smoothed"

QUANTIZERS: dict[str, Quantizer] = {
    "llmcompressor-rtn-w4a16": Quantizer("rtn-w4a16", *LLMCOMPRESSOR, llmcompressor_rtn, calibrated=False),
    "llmcompressor-gptq-w4a16": Quantizer("gptq-w4a16", *LLMCOMPRESSOR, lambda job: llmcompressor_gptq(job, "static")),
    SMOOTHED: Quantizer("smoothquant", *LLMCOMPRESSOR, llmcompressor_smooth),
    "llmcompressor-smoothquant-w8a8": Quantizer(
        "smoothquant-w8a8", *LLMCOMPRESSOR, llmcompressor_w8a8, SMOOTHED, calibrated=False
    ),
    "llmcompressor-smoothquant-w8a8-static": Quantizer(
        "smoothquant-w8a8-static",
        *LLMCOMPRESSOR,
        lambda job: llmcompressor_w8a8_static(job, "static_minmax"),
        SMOOTHED,
    ),
    "llmcompressor-smoothquant-w8a8-static-mean": Quantizer(
        "smoothquant-w8a8-static", *LLMCOMPRESSOR, lambda job: llmcompressor_w8a8_static(job, "minmax"), SMOOTHED
    ),
    "llmcompressor-smoothquant-w4a8": Quantizer(
        "smoothquant-w4a8", *LLMCOMPRESSOR, llmcompressor_w4a8, SMOOTHED, calibrated=False
    ),
    "llmcompressor-smoothquant-w4a8-groups": Quantizer(
        "smoothquant-w4a8", *LLMCOMPRESSOR, llmcompressor_w4a8_groups, SMOOTHED, calibrated=False
    ),
    "gptqmodel-gptq-w4a16": Quantizer("gptq-w4a16", *GPTQMODEL, gptqmodel_gptq),
    "llmcompressor-awq-w4a16": Quantizer("awq-w4a16", *LLMCOMPRESSOR, llmcompressor_awq),
    "autoround-w4a16": Quantizer("autoround-w4a16", *AUTOROUND, autoround_w4a16, resumes=True),
    "llmcompressor-gptq-w4a16-in-order": Quantizer(
        "gptq-w4a16", *LLMCOMPRESSOR, lambda job: llmcompressor_gptq(job, None)
    ),
}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions."""
    return {package: importlib.metadata.version(package) for package in packages}


def main() -> None:
    """Run one job, and leave job, settings, versions and time in its folder's result.json."""
    import torch

    name, file = sys.argv[1:]
    values = json.loads(Path(file).read_text())
    quantizer, job = QUANTIZERS[name], Job(**values)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    settings = quantizer.run(job)
    result = {
        "quantizer": name,
        "settings": settings,
        "samples": job.samples if quantizer.calibrated else 0,
        "versions": versions(quantizer.packages),
        "seconds": round(time.perf_counter() - start, 1),
        "threads": job.threads,
        "device": job.device,
    }
    (Path(job.folder) / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
