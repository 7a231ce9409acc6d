"""A float model that is never in memory whole: a transformers model on the meta device and the source of its tensors.

`FloatModel.open` builds the first and checks it against the second; `load` fills one module.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fptq.errors import ArchitectureError, FPTQError, ModelError, first_line
from fptq.models.architectures import Architecture, InputGroup, get_architecture
from fptq.models.sources import GGUFSource, ReplacedTensors, SafetensorsSource, TensorSource, locate, open_gguf
from fptq.shards import sha256_of_file

# Buffers that old files carry and that today's models compute: rotary frequencies and causal masks.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attention\.(masked_)?bias|attn\.(masked_)?bias)$")
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


_ROTARY_FACTORS = ("scale_linear", "scaling.factor")  # of linear scaling, in files without its type


class FloatModel:
    """An open model in float, on the meta device until parts of it are loaded.

    Attributes:
        name: the Hub id, or the name of the folder or file.
        location: the folder or GGUF file.
        config: the transformers config.
        model: the transformers model, on the meta device.
        architecture: its row in the table of architectures.
        groups: the input groups of a decoder block.
        blocks: the decoder blocks.
        tensors: where the tensors are read from.
        file_names: the name there of each tensor in the model's state dict.
    """

    def __init__(self, name: str, location: Path, config: Any, model: nn.Module, tensors: TensorSource):
        self.name = name
        self.location = location
        self.config = config
        self.model = model
        self.tensors = tensors
        self.architecture: Architecture = get_architecture(config.model_type)
        self.groups: list[InputGroup] = self.architecture.describe(config)
        self.blocks: list[nn.Module] = list(model.get_submodule(self.architecture.blocks))
        self.file_names = self._match_names()

    @classmethod
    def open(cls, model: str) -> FloatModel:
        """Return the model that a user names: a local folder, a GGUF file, a Hub id, or "demo".

        Raises:
            ModelError: it can't be found or read, a tensor is missing or of the wrong shape.
            ArchitectureError: fptq doesn't know its architecture.
        """
        location = locate(model)
        name = location.name if Path(model).expanduser().exists() or model == "demo" else model
        if location.is_dir():
            config = _read_folder_config(location)
            found = cls(name, location, config, build_skeleton(config), SafetensorsSource(location))
            if found._has_another_head():  # as transformers does, too
                config.tie_word_embeddings = False
                found = cls(name, location, config, build_skeleton(config), found.tensors)
            return found
        reader = open_gguf(location)
        config = _read_gguf_config(location, reader)
        skeleton = build_skeleton(config)
        return cls(name, location, config, skeleton, GGUFSource(location, skeleton, reader))

    def with_weights(self, path: Path) -> FloatModel:
        """Return this model with other values for the tensors that the safetensors file `path` has, in float32.

        The tensors there have their names in the model's state dict. The transformers model is shared.

        Raises:
            ModelError: the file can't be read, or has a tensor that doesn't fit the model.
        """
        tensors = ReplacedTensors(self.tensors, path, self.file_names)
        return FloatModel(self.name, self.location, self.config, self.model, tensors)

    def _match_names(self) -> dict[str, str]:
        """Return the file's name of each tensor in the state dict; a tied weight may have the name of either module.

        Raises:
            ModelError: a tensor is missing, has another shape, or has no place in the model.
        """
        shapes = self.tensors.shapes
        tied = tied_names(self.model)
        names, missing, surplus = {}, [], set(shapes)
        for name, parameter in self.model.state_dict().items():
            surplus -= set(self._spellings(name))
            if name in tied[1:]:
                continue
            found = self._find(*(tied if name in tied else [name]))
            if found is None:
                missing.append(name)
                continue
            if shapes[found] != tuple(parameter.shape):
                raise ModelError(
                    f"{self.location}: tensor '{found}' has shape {list(shapes[found])}, the config needs "
                    f"{list(parameter.shape)}; weights and config.json don't belong together"
                )
            names[name] = found
        if missing:
            raise ModelError(
                f"{self.location}: {len(missing)} tensors are missing, the first is '{missing[0]}'; "
                "the download is incomplete or the config belongs to another model"
            )
        surplus = {name for name in surplus if not _COMPUTED.search(name)}
        if surplus:
            raise ModelError(
                f"{self.location}: {len(surplus)} tensors have no place in the model that config.json describes, the "
                f"first is '{min(surplus)}'; leaving them out would change the model"
            )
        return names

    def _spellings(self, name: str) -> list[str]:
        """Return the names that a tensor of the state dict may have in files, which may leave out a prefix."""
        prefix = f"{self.model.base_model_prefix}."
        renamed = [
            theirs + name.removeprefix(ours) for ours, theirs in self.architecture.renamed if name.startswith(ours)
        ]
        return [name, name.removeprefix(prefix), prefix + name, *renamed]

    def _find(self, *names: str) -> str | None:
        """Return what the file calls a tensor that has these names in the state dict; None: it isn't there."""
        spellings = (spelling for name in names for spelling in self._spellings(name))
        return next((spelling for spelling in spellings if spelling in self.tensors.shapes), None)

    def _has_another_head(self) -> bool:
        """Return whether the files have an output head of their own, though the config says that it is tied."""
        shared = tied_names(self.model)
        heads = [head for head in map(self._find, shared[1:]) if head is not None]
        return any(
            not torch.equal(self.tensors.read(head), self.tensors.read(self.file_names[shared[0]])) for head in heads
        )

    def block_name(self, index: int) -> str:
        """Return the full name of a decoder block, as in "model.layers.3"."""
        return f"{self.architecture.blocks}.{index}"

    def names_outside_blocks(self) -> list[str]:
        """Return the names of all tensors outside the decoder blocks: embeddings, last norm, head (if not tied)."""
        return [name for name in self.file_names if not name.startswith(self.architecture.blocks + ".")]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the state dict in its stored dtype.

        Raises:
            ModelError: it has a NaN or an infinity.
        """
        tensor = self.tensors.read(self.file_names[name])
        if tensor.is_floating_point() and not is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{self.location}: tensor '{name}' has {count} values that are NaN or infinite; fetch it again"
            )
        return tensor

    def load(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        """Fill `module`, whose full name is `name`, with its tensors in `dtype`, and its computed buffers."""
        fill_buffers(self.model, module)
        prefix = f"{name}." if name else ""
        wanted = [key for key in module.state_dict() if prefix + key in self.file_names]
        tensors = {key: self.read(prefix + key).to(dtype) for key in wanted}
        module.load_state_dict(tensors, strict=False, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    @contextmanager
    def loaded_block(self, index: int, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Give a decoder block with its weights in memory, and drop them afterwards."""
        block = self.blocks[index]
        self.load(block, self.block_name(index), dtype)
        try:
            yield block
        finally:
            block.to("meta")

    @contextmanager
    def loaded_embeddings(self, dtype: torch.dtype) -> Iterator[None]:
        """Load everything of the base model outside its blocks (embeddings, norms), and drop it afterwards."""
        base = self.model.base_model
        base_name = next((n for n, m in self.model.named_modules() if m is base), "")
        fill_buffers(self.model, base, skip=set(self.blocks))
        loaded = []
        outside = set(self.names_outside_blocks())
        for name, module in base.named_modules():
            full = f"{base_name}.{name}" if base_name and name else base_name or name
            own = {
                key: self.read(f"{full}.{key}").to(dtype)
                for key, _ in module.named_parameters(recurse=False)
                if f"{full}.{key}" in outside
            }
            for key, tensor in own.items():
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
                loaded.append((module, key))
        try:
            yield
        finally:
            for module, key in loaded:
                module._parameters[key] = nn.Parameter(module._parameters[key].to("meta"), requires_grad=False)

    @contextmanager
    def loaded_outside(self, dtype: torch.dtype) -> Iterator[None]:
        """Load all but the decoder blocks, and drop it afterwards."""
        head = self.model.get_output_embeddings()
        with self.loaded_embeddings(dtype):
            self.load(head, head_layers(self.model)[-1], dtype)
            self.model.tie_weights()
            try:
                yield
            finally:
                head.to("meta")
        self.model.tie_weights()

    def load_all(self, dtype: torch.dtype) -> nn.Module:
        """Return the whole model in memory, ready to run in `dtype`."""
        self.load(self.model, "", dtype)
        self.model.tie_weights()
        return self.model.eval()

    @contextmanager
    def loaded(self, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Give the whole model in memory, ready to run in `dtype`, and drop its weights afterwards."""
        try:
            yield self.load_all(dtype)
        finally:
            self.model.to("meta")
            self.model.tie_weights()

    def storage_dtype(self) -> torch.dtype:
        """Return the dtype that unquantized tensors are kept in by default: the source's own."""
        return self.tensors.storage_dtype()

    @cached_property
    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None if the folder has none."""
        return load_tokenizer(self.location)

    def config_dict(self) -> dict[str, Any]:
        """Return what belongs into config.json: the source's own where there is one."""
        if self.location.is_dir():
            values = json.loads((self.location / "config.json").read_text(encoding="utf-8"))
            if _read_folder_config(self.location).tie_word_embeddings != self.config.tie_word_embeddings:
                values["tie_word_embeddings"] = self.config.tie_word_embeddings
            return values
        values = self.config.to_diff_dict()
        values.pop("_name_or_path", None)
        return {"architectures": [type(self.model).__name__], **values}

    def layer_weights(self, block: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights [n, k] of a block's linear layers, by name within the block."""
        return {layer: block.get_submodule(layer).weight for group in self.groups for layer in group.layers}

    def check_length(self, length: int, error: type[FPTQError]) -> None:
        """Raise `error` if `length` tokens don't fit the model's context."""
        context = getattr(self.config, "max_position_embeddings", None)
        if context and length > context:
            raise error(f"{length} tokens are asked for, the model's context has {context} tokens")

    def companion_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each tokenizer and generation file that a model folder has."""
        paths = [self.location / name for name in _COMPANIONS] if self.location.is_dir() else []
        return {path.name: sha256_of_file(path) for path in paths if path.is_file()}

    def save_companions(self, folder: Path) -> None:
        """Put tokenizer and generation files into `folder`: copies of the model folder's, or made from the GGUF.

        Raises:
            ModelError: they are damaged, or can't be made.
            OSError: `folder` can't be written.
        """
        from transformers import GenerationConfig

        if self.location.is_dir():
            for name in _COMPANIONS:
                if (self.location / name).is_file():
                    shutil.copyfile(self.location / name, folder / name)
        try:
            if self.location.is_file() and self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if not (folder / "generation_config.json").exists():
                GenerationConfig.from_model_config(self.config).save_pretrained(folder)
            for path in folder.glob("*.json"):
                json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise
        # tokenizers raise bare Exceptions
        except Exception as cause:
            raise ModelError(
                f"{self.location}: its tokenizer or generation settings are damaged ({first_line(cause)})"
            ) from cause


def _read_folder_config(folder: Path, *, quantized: bool = False) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("quantization_config") and not quantized:
            method = values["quantization_config"].get("quant_method", "unknown")
            raise ModelError(f"{folder}: is already quantized ({method}); give the float model it was made from")
        get_architecture(values.get("model_type", "(none given)"))  # refuse before building what isn't known
        return AutoConfig.from_pretrained(folder)
    except FileNotFoundError as cause:
        raise ModelError(f"{folder}: no config.json in it; needed a Hugging Face model folder") from cause
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        OSError,
        StrictDataclassError,
    ) as cause:
        raise ModelError(f"{path}: can't be read as a model's configuration ({cause})") from cause


def checkpoint_skeleton(folder: Path) -> nn.Module:
    """Return the transformers model that a checkpoint of ours was made of, on the meta device.

    Raises:
        ModelError: its configuration can't be read, or its architecture isn't in the table.
    """
    config = _read_folder_config(folder, quantized=True)
    del config.quantization_config
    return build_skeleton(config)


def _read_gguf_config(path: Path, reader: Any) -> Any:
    """Return the transformers config of a GGUF file; refuse what transformers' reading of it would lose in silence."""
    from transformers import AutoConfig

    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    architecture = fields.get("general.architecture")
    if architecture is None:
        raise ModelError(f"{path}: doesn't say which architecture it is of; needed a GGUF file of a model")
    if fields.get("split.count", 1) > 1:
        raise ModelError(
            f"{path}: is one part of a split GGUF file; join them with llama.cpp's llama-gguf-split --merge"
        )
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "none" and {fields.get(f"{architecture}.rope.{key}", 1.0) for key in _ROTARY_FACTORS} != {1.0}:
        scaling = "linear"
    # Gemma 2 27B scales its queries by another number than its smaller sisters; GGUF has no field for it
    if scaling != "none" or (architecture == "gemma2" and fields.get("gemma2.block_count") == 46):
        raise ModelError(
            f"{path}: its rotary scaling ({scaling}) or query scaling gets lost when transformers reads a GGUF; "
            "use the model's safetensors version"
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, LookupError, OSError) as cause:
        raise ArchitectureError(f"{path}: transformers can't read this GGUF's configuration ({cause})") from cause
    get_architecture(config.model_type)
    turn = reader.fields.get("tokenizer.ggml.eot_token_id")
    if turn is not None and config.eos_token_id not in (None, turn.contents()):
        config.eos_token_id = [config.eos_token_id, turn.contents()]  # an answer ends with either
    return config


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute the float model."""
    import transformers

    return {"transformers": transformers.__version__}


def build_skeleton(config: Any) -> nn.Module:
    """Return the transformers model of a config on the meta device: names and shapes without memory.

    Raises:
        ModelError: transformers can't build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # a config that contradicts itself ends in whatever error the model's code runs into
    except Exception as cause:
        raise ModelError(
            f"transformers can't build a {config.model_type} model of this configuration ({cause!r})"
        ) from cause
    return model.eval()


def load_tokenizer(location: Path) -> Any | None:
    """Return the tokenizer of a model folder or GGUF file, or None if there is none.

    Raises:
        ModelError: it is damaged.
    """
    from transformers import AutoTokenizer

    folder, options = (location.parent, {"gguf_file": location.name}) if location.is_file() else (location, {})
    if not options and not any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    # the Rust tokenizers raise bare Exceptions
    except Exception as cause:
        raise ModelError(f"{location}: its tokenizer can't be read ({cause}); fetch it again") from cause


def is_finite(values: torch.Tensor) -> bool:
    """Return whether there is no NaN and no infinity; as a rule the sum tells, which is many times as fast to have."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(torch.isfinite(values).all())


def tied_names(model: nn.Module) -> list[str]:
    """Return the names of the tensor that embedding and head share, the embedding's first; none if they aren't tied."""
    layers = head_layers(model)
    return [f"{name}.weight" for name in layers] if len(layers) > 1 else []


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the modules that have the output head's weight, first the one under whose name files keep it.

    That is the head alone, or the input embedding and the head.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return []
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in (embedding, head) if module is head or module.weight is head.weight]


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a KV cache to a model: `cache`, or `past_key_values` before 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def fill_buffers(model: nn.Module, module: nn.Module, skip: set[nn.Module] | None = None) -> None:
    """Give the non-persistent buffers inside `module` (rotary frequencies, embedding scales) their values.

    Such buffers stand in no file. transformers computes them in `_init_weights`, which leaves meta parameters alone.
    """
    skipped = {inner for outer in skip or () for inner in outer.modules()}
    for inner in module.modules():
        names = [name for name, buffer in inner._buffers.items() if buffer is not None and buffer.is_meta]
        if not names or inner in skipped:
            continue
        for name in names:
            inner._buffers[name] = torch.empty_like(inner._buffers[name], device="cpu")
        with torch.no_grad():
            model._init_weights(inner)
