"""GGUF files for llama.cpp: int4 codes as Q4_0, int8 ones as Q8_0, to the bit.

A Q4_0 block is 32 weights (code - 8)·d with d in float16; the blocks of a group share its scale. llama.cpp multiplies
int4 by int8, with input scales of its own, one for 32 channels of a token. How it describes the model and its
tokenizer comes from a GGUF file of the same model, in whatever quantization: llama.cpp alone knows how to write that.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fptq
from fptq.checkpoint import Checkpoint
from fptq.errors import CheckpointError, ModelError, OutputError
from fptq.export.standard import copy_companions
from fptq.export.targets import GGUF_BLOCK as BLOCK
from fptq.export.targets import GGUF_MODELS, gguf_refusal
from fptq.models.loading import checkpoint_skeleton, load_tokenizer
from fptq.models.sources import GGUFLayout, locate, open_gguf
from fptq.progress import progress_bar
from fptq.shards import write_json

_SAME = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
"""What a GGUF file says of its model, to the same in config.json."""
_DROPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quantization", "quantize.", "split.")
_DIFFERENT_TOKENS = 0.01  # files differ in how they call what is unused


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file that is to be written.

    Attributes:
        name: there.
        kind: gguf's name of its type.
        shape: of its weights.
        bytes: makes its content.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: Callable[[], np.ndarray]


def export_gguf(checkpoint: Checkpoint, output: Path, metadata: str, *, progress: bool = True) -> None:
    """Write `checkpoint` as a GGUF file.

    Tensors are written one at a time; nothing is at `output` before all is.

    Args:
        checkpoint: of an architecture that transformers reads from GGUF files.
        output: the file.
        metadata: a GGUF file of the same model, "demo", or llama.cpp's script convert_hf_to_gguf.py, which makes one.
        progress: show a progress bar.

    Raises:
        CheckpointError: it has something that Q4_0 and Q8_0 can't say.
        ModelError: `metadata` can't be read, or describes another model.
        OutputError: `output` can't be written.
    """
    refusal = gguf_refusal(checkpoint)
    if refusal:
        raise CheckpointError(f"{checkpoint.folder}: {refusal}")
    with tempfile.TemporaryDirectory() as scratch:
        if metadata.endswith(".py"):
            metadata = str(_convert(checkpoint, Path(metadata).expanduser(), Path(scratch)))
        path = locate(metadata)
        if not path.is_file():
            raise ModelError(f"{metadata}: is no GGUF file")
        _write(checkpoint, output, path, open_gguf(path), progress)


def _convert(checkpoint: Checkpoint, script: Path, scratch: Path) -> Path:
    """Return the GGUF file without tensors that llama.cpp's script makes of the configuration and the tokenizer.

    Raises:
        ModelError: it makes none.
    """
    if not script.is_file():
        raise ModelError(f"{script}: no such file; it is convert_hf_to_gguf.py in llama.cpp's source")
    folder, result = scratch / checkpoint.folder.resolve().name, scratch / "metadata.gguf"
    folder.mkdir()
    copy_companions(checkpoint, folder)
    write_json(folder / "config.json", {k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
    command = [sys.executable, str(script), str(folder), "--vocab-only", "--outfile", str(result)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not result.exists():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(f"{script}: doesn't take {checkpoint.folder} ({last})")
    return result


def _write(checkpoint: Checkpoint, output: Path, path: Path, reader: Any, progress: bool) -> None:
    import gguf

    fields = {name: field for name, field in reader.fields.items() if not name.startswith(_DROPPED)}
    architecture = reader.fields["general.architecture"].contents()
    _require_same_model(checkpoint, path, architecture, fields)
    tensors = list(_tensors(checkpoint, GGUFLayout(architecture, checkpoint_skeleton(checkpoint.folder))))
    tensors += _extra_tensors(checkpoint, path, reader)

    unfinished = output.with_name(f"{output.name}.partial")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(unfinished, architecture)
        for name, field in fields.items():
            is_list = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_list else None)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string("general.quantized_by", f"fptq {fptq.__version__}")
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count = math.prod(tensor.shape) // block * size
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(len(tensors), what="tensors", show=progress) as bar:
            for tensor in tensors:
                writer.write_tensor_data(np.ascontiguousarray(tensor.bytes()))
                bar.update()
        writer.close()
        unfinished.rename(output)
    except OSError as cause:
        raise OutputError(f"{cause.filename or output}: can't be written ({cause.strerror})") from cause
    finally:
        unfinished.unlink(missing_ok=True)


def _require_same_model(checkpoint: Checkpoint, path: Path, architecture: str, fields: dict[str, Any]) -> None:
    """Raise ModelError unless a GGUF file describes the checkpoint's model."""
    wanted = GGUF_MODELS[checkpoint.config["model_type"]]
    if architecture != wanted:
        raise ModelError(f"{path}: is of another model: its architecture is {architecture}, needed {wanted}")
    for key, ours in _SAME.items():
        field, value = fields.get(f"{architecture}.{key}"), checkpoint.config.get(ours)
        if field is not None and value is not None and field.contents() != value:
            raise ModelError(
                f"{path}: is of another model: its {key} is {field.contents()}, the checkpoint's {ours} {value}"
            )
    tokens = fields["tokenizer.ggml.tokens"].contents() if "tokenizer.ggml.tokens" in fields else []
    if len(tokens) != checkpoint.config.get("vocab_size"):
        raise ModelError(
            f"{path}: has {len(tokens)} words, the checkpoint {checkpoint.config.get('vocab_size')}; it is of another "
            "model, or has no tokenizer"
        )
    tokenizer = load_tokenizer(checkpoint.folder)
    if tokenizer is not None:
        ours = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
        different = sum(a != b for a, b in zip(tokens, ours, strict=False))
        if different > _DIFFERENT_TOKENS * len(tokens):
            raise ModelError(f"{path}: {different} of its {len(tokens)} words are others than the checkpoint's")


def _tensors(checkpoint: Checkpoint, layout: GGUFLayout) -> Iterator[_Tensor]:
    """Yield all tensors of the checkpoint.

    Raises:
        CheckpointError: one has no place in the file.
    """
    names = {ours: theirs for theirs, ours in layout.names.items()}
    owners = {f"{name}.weight": name for name in checkpoint.schemes}
    kept = [f"{name}.weight" for name in checkpoint.schemes if not _is_tied_head(checkpoint, name)]
    for full in sorted([*kept, *checkpoint.float_tensors()]):
        if full not in names:
            raise CheckpointError(f"{checkpoint.folder}: tensor '{full}' has no place in such a GGUF file")
        name = names[full]
        if full in owners:
            yield _linear(checkpoint, owners[full], name, layout)
        else:
            yield _float(checkpoint, full, name, layout)


def _is_tied_head(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.schemes[name].bits == 8 and f"{name}.weight" not in checkpoint.tensors


def _linear(checkpoint: Checkpoint, layer: str, name: str, layout: GGUFLayout) -> _Tensor:
    scheme, shape = checkpoint.schemes[layer], checkpoint.shape(layer)
    size = scheme.group_size or shape[1]

    def content() -> np.ndarray:
        linear = checkpoint.read_linear(layer)
        order = layout.rows(name, shape[0])
        scales = linear.scales[order].repeat(size // BLOCK, axis=1)
        steps = scales.astype(np.float16)
        if not np.abs(steps - scales).max() <= np.abs(scales).max() / 2048:  # half a unit of float16's last place
            raise CheckpointError(
                f"{checkpoint.folder}: {layer} has weight scales of {scales.min():g} to {scales.max():g}, "
                "which don't fit float16"
            )
        return pack_blocks(linear.codes[order], steps, scheme.bits)

    return _Tensor(name, "Q4_0" if scheme.bits == 4 else "Q8_0", shape, content)


def pack_blocks(codes: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray:
    """Return int8 codes [n, k] with float16 steps [n, k/32] as Q4_0 or Q8_0 blocks, uint8 [n, bytes].

    A block is its step and then the codes; Q4_0 has code + 8 of weights i and i + 16 in the halves of byte i.
    """
    n, k = codes.shape
    blocks = codes.reshape(n, k // BLOCK, BLOCK)
    if bits == 4:
        nibbles = (blocks + 8).astype(np.uint8)
        packed = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    else:
        packed = blocks.view(np.uint8)
    return np.concatenate([steps[..., None].view(np.uint8), packed], axis=-1).reshape(n, -1)


def _float(checkpoint: Checkpoint, full: str, name: str, layout: GGUFLayout) -> _Tensor:
    """Return a tensor that stays in float: vectors in float32, which llama.cpp needs, others as they are stored."""
    entry = checkpoint.tensors[full][1]
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    kind = kinds[entry.dtype.name] if len(entry.shape) > 1 else "F32"

    def content() -> np.ndarray:
        values = checkpoint.read(full)[layout.rows(name, entry.shape[0])]
        if kind != "F32":
            return values
        offset = layout.offset(name, entry.shape[0])
        return values.astype(np.float32) - np.float32(offset)

    return _Tensor(name, kind, entry.shape, content)


def _extra_tensors(checkpoint: Checkpoint, path: Path, reader: Any) -> Iterator[_Tensor]:
    """Yield what the metadata's file has that is computed from the configuration, such as factors of rotary scaling.

    Raises:
        ModelError: the configuration needs some, and the file has no tensors.
    """
    scaling = checkpoint.config.get("rope_scaling") or checkpoint.config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("llama3", "longrope") and not reader.tensors:
        raise ModelError(f"{path}: has no tensors, and rotary scaling '{kind}' needs one; give a whole GGUF file")
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_"):
            shape = tuple(int(n) for n in reversed(tensor.shape))
            yield _Tensor(tensor.name, tensor.tensor_type.name, shape, partial(np.array, tensor.data))
