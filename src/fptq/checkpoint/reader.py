"""Reading a checkpoint folder, after checking all of it."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fptq.checkpoint.format import (
    CACHE_PARTS,
    FORMAT_VERSION,
    INDEX_FILE,
    INPUT_PARTS,
    INT8_STATIC,
    LINEAR_PARTS,
    RECORD_FILE,
    SIMULATION,
    STATISTICS_FILE,
    KVScales,
    LayerScheme,
    QuantizedLinear,
    matches,
    read_linear,
    read_schemes,
    seal,
)
from fptq.errors import CheckpointError
from fptq.recipe import Activation
from fptq.shards import TensorEntry, json_bytes, read_header, read_tensor, sha256_of_file


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has a checkpoint, sound or not, rather than a float model or nothing."""
    try:
        if (folder / RECORD_FILE).exists():
            return True
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False


class Checkpoint:
    """A quantized checkpoint folder that was checked as a whole: files, headers, schemes, shapes and dtypes.

    Attributes:
        folder: where it is.
        config: config.json.
        record: fptq.json, or {} if the checkpoint was made by other software.
        schemes: the scheme of every quantized linear layer, by full name.
        tensors: where each tensor lies.
    """

    def __init__(self, folder: Path, config: dict[str, Any], record: dict[str, Any]):
        self.folder = folder
        self.config = config
        self.record = record
        self.tensors = self._read_headers()
        try:
            self.schemes = self._read_schemes()
            self._check_linears()
            self._check_cache()
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as cause:
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config is malformed ({cause!r})") from cause

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Return the checkpoint in `folder`.

        Raises:
            CheckpointError: it isn't one, is incomplete, or anything in it contradicts anything else.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder")
        config = _read_json(path / "config.json")
        if "quantization_config" not in config:
            raise CheckpointError(
                f"{path}: config.json has no quantization_config: a float model, not a checkpoint of ours"
            )
        record = _read_json(path / RECORD_FILE) if (path / RECORD_FILE).exists() else {}
        if record and record.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path / RECORD_FILE}: format version {record.get('format_version')!r}, "
                f"this fptq reads {FORMAT_VERSION}; upgrade fptq or quantize again"
            )
        if record and seal(record)["sha256"] != record.get("sha256"):
            raise CheckpointError(
                f"{path / RECORD_FILE}: its content doesn't match its checksum; it was damaged or edited"
            )
        return cls(path, config, record)

    def _read_headers(self) -> dict[str, tuple[Path, TensorEntry]]:
        index = self.folder / INDEX_FILE
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: has no weight_map")
            odd = [
                shard
                for shard in weight_map.values()
                if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard
            ]
            if odd:
                raise CheckpointError(f"{index}: {odd[0]!r} is no file name in this folder")
            shards = sorted(set(weight_map.values()))
        else:
            weight_map, shards = None, ["model.safetensors"]
        tensors: dict[str, tuple[Path, TensorEntry]] = {}
        for shard in shards:
            for name, entry in read_header(self.folder / shard, CheckpointError).items():
                if name in tensors:
                    raise CheckpointError(f"{self.folder}: tensor '{name}' is in two shards")
                tensors[name] = (self.folder / shard, entry)
        if weight_map is not None and weight_map != {n: p.name for n, (p, _) in tensors.items()}:
            odd = sorted(set(weight_map) ^ set(tensors)) or ["(same names, other shards)"]
            raise CheckpointError(f"{index}: doesn't describe the shards; the first difference is tensor '{odd[0]}'")
        return tensors

    def _read_schemes(self) -> dict[str, LayerScheme]:
        names = sorted({n.rpartition(".")[0] for n in self.tensors if self._is_quantized(n)})
        try:
            groups = read_schemes(self.config["quantization_config"])
        except CheckpointError as cause:
            raise CheckpointError(f"{self.folder / 'config.json'}: {cause}") from cause
        schemes = {}
        for name in names:
            matching = [scheme for targets, scheme in groups if any(matches(t, name) for t in targets)]
            if len(matching) != 1:
                raise CheckpointError(
                    f"{self.folder}: {len(matching)} config groups target layer '{name}', needed exactly one"
                )
            schemes[name] = matching[0]
        for targets, _ in groups:
            for target in targets:
                if not any(matches(target, name) for name in names):
                    raise CheckpointError(f"{self.folder}: no layer in the shards for config target '{target}'")
        planned = self.record.get("layers")
        if planned is not None and (not isinstance(planned, dict) or sorted(planned) != names):
            odd = sorted(set(planned) ^ set(names)) or ["(no object of layers)"]
            raise CheckpointError(f"{self.folder}: {RECORD_FILE} and the shards disagree about layer '{odd[0]}'")
        return schemes

    def _is_quantized(self, tensor: str) -> bool:
        """Return whether a tensor of this name and dtype is part of a quantized layer's weight."""
        kind = tensor.rpartition(".")[2]
        codes = kind == "weight" and self.tensors[tensor][1].dtype == np.int8
        return codes or kind in ("weight_packed", "weight_scale")

    def _check_linears(self) -> None:
        for name, scheme in self.schemes.items():
            if scheme.bits == 4:
                self._expect(f"{name}.weight_packed", (None, None), "int32")
                self._expect(f"{name}.weight_shape", (2,), "int64")
            else:
                self._expect(f"{self._codes_owner(name)}.weight", (None, None), "int8")
            rows, columns = self.shape(name)
            size = scheme.group_size or columns
            if min(rows, columns) < 1 or columns % size or (scheme.bits == 4 and columns % 8):
                raise CheckpointError(f"{self.folder}: {name}: shape {rows} x {columns} with groups of {size}")
            if scheme.bits == 4:
                self._expect(f"{name}.weight_packed", (rows, columns // 8), "int32")
            self._expect(f"{name}.weight_scale", (rows, columns // size), None)
            self._check_input(name, scheme, rows, columns)
        for name in self.schemes:
            owner = self._codes_owner(name)
            if (
                owner != name
                and self.read(f"{owner}.weight_scale").tobytes() != self.read(f"{name}.weight_scale").tobytes()
            ):
                raise CheckpointError(f"{self.folder}: {name} has the codes of {owner}, but other scales")
        for tensor in self.tensors:
            owner, _, kind = tensor.rpartition(".")
            if owner in self.schemes:
                sound = kind in (*LINEAR_PARTS[self.schemes[owner].bits], "bias")
            else:
                sound = kind not in LINEAR_PARTS[4]
            if not sound:
                raise CheckpointError(f"{self.folder}: tensor '{tensor}' belongs to no quantized layer")

    def _check_input(self, name: str, scheme: LayerScheme, rows: int, columns: int) -> None:
        """Check that a layer has what its input's scheme and its correction need, and nothing else of that kind."""
        wanted: dict[str, tuple[int, ...]] = {}
        if scheme.activation is Activation.STATIC:
            self._positive(f"{name}.input_scale")
            wanted["input_scale"] = (1,)
        elif scheme.activation is Activation.CLUSTERS:
            wanted["input_scale"] = wanted["input_zero_point"] = (columns,)
        if scheme.low_rank:
            wanted |= {"low_rank_up": (rows, scheme.low_rank), "low_rank_down": (scheme.low_rank, columns)}
        for kind in INPUT_PARTS:
            if kind in wanted:
                self._expect(f"{name}.{kind}", wanted[kind], None)
            elif f"{name}.{kind}" in self.tensors:
                raise CheckpointError(
                    f"{self.folder}: tensor '{name}.{kind}' has no use: the scheme is {scheme.activation.value}"
                )

    def _codes_owner(self, name: str) -> str:
        """Return the layer under whose name the codes of `name` are: a tied int8 head has those of the embedding."""
        if self.schemes[name].bits == 4 or f"{name}.weight" in self.tensors:
            return name
        # a lookup has no input to quantize; where int8 layers of a weight-only recipe are alike, the plan tells
        lookups = [o for o, s in self.schemes.items() if s.bits == 8 and s.activation is Activation.NONE and o != name]
        if len(lookups) > 1:
            planned = self.record.get("layers", {})
            lookups = [o for o in lookups if planned.get(o, {}).get("role") == "embedding"]
        return lookups[0] if len(lookups) == 1 else name

    @property
    def simulated(self) -> bool:
        """Whether a layer's scheme is one of our own, which is simulated in float: no other software reads it."""
        return self.config["quantization_config"].get("quant_method") == SIMULATION

    @property
    def block_layers(self) -> list[str]:
        """The quantized linear layers of the decoder blocks: all but an int8 head and embedding."""
        planned = self.record.get("layers", {})
        return [name for name in self.schemes if planned.get(name, {}).get("role") not in ("head", "embedding")]

    @property
    def weight_bits(self) -> float:
        """Average bits of a weight in the decoder blocks' quantized layers, with scales and corrections."""
        kinds = ("weight_packed", "weight", "weight_scale", "low_rank_up", "low_rank_down")
        parts = [part for name in self.block_layers for kind in kinds if (part := f"{name}.{kind}") in self.tensors]
        stored = sum(self.tensors[part][1].stop - self.tensors[part][1].start for part in parts)
        return 8 * stored / sum(rows * columns for rows, columns in map(self.shape, self.block_layers))

    @property
    def tied_head(self) -> bool:
        """Whether the int8 output head and the input embedding are one matrix."""
        return any(self._codes_owner(name) != name for name in self.schemes)

    def _check_cache(self) -> None:
        scheme = self.config["quantization_config"].get("kv_cache_scheme")
        if scheme is not None and any(scheme.get(key) != value for key, value in INT8_STATIC.items()):
            raise CheckpointError(f"{self.folder}: kv_cache_scheme {scheme} is not int8 symmetric static per-tensor")
        owners = [{n.rpartition(".")[0] for n in self.tensors if n.endswith(kind)} for kind in (".k_scale", ".v_scale")]
        if owners[0] != owners[1] or bool(owners[0]) != (scheme is not None):
            raise CheckpointError(f"{self.folder}: kv_cache_scheme and the k_scale and v_scale tensors don't match")
        for owner in owners[0]:
            self._positive(f"{owner}.k_scale")
            self._positive(f"{owner}.v_scale")

    def _expect(self, tensor: str, shape: tuple[int | None, ...], dtype: str | None) -> None:
        if tensor not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor '{tensor}' is missing")
        entry = self.tensors[tensor][1]
        fits = len(entry.shape) == len(shape) and all(b in (None, a) for a, b in zip(entry.shape, shape, strict=True))
        floating = entry.dtype.name in ("bfloat16", "float16", "float32")
        if not fits or (entry.dtype.name != dtype if dtype else not floating):
            raise CheckpointError(
                f"{self.folder}: tensor '{tensor}' is {entry.dtype.name} {list(entry.shape)}, "
                f"needed {dtype or 'a float type'} {list(shape)}"
            )

    def _positive(self, tensor: str) -> None:
        self._expect(tensor, (1,), None)
        value = float(self.read(tensor)[0])
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(f"{self.folder}: tensor '{tensor}' is {value}, needed a positive number")

    def shape(self, name: str) -> tuple[int, int]:
        """Return out_features and in_features of a quantized layer."""
        if self.schemes[name].bits == 4:
            rows, columns = (int(n) for n in self.read(f"{name}.weight_shape"))
        else:
            rows, columns = self.tensors[f"{self._codes_owner(name)}.weight"][1].shape
        return rows, columns

    def read(self, tensor: str) -> np.ndarray:
        """Return a tensor in its stored dtype."""
        return read_tensor(*self.tensors[tensor])

    def read_linear(self, name: str) -> QuantizedLinear:
        """Return a quantized layer.

        Raises:
            CheckpointError: a weight scale is zero or not finite.
        """
        scheme = self.schemes[name]
        try:
            return read_linear(self.read, name, scheme, codes_of=self._codes_owner(name) if scheme.bits == 8 else name)
        except CheckpointError as cause:
            raise CheckpointError(f"{self.folder}: {cause}") from cause

    def cache_scales(self) -> dict[str, KVScales]:
        """Return the KV cache scales by attention module; empty when the cache stays in float."""
        owners = sorted(name.removesuffix(".k_scale") for name in self.tensors if name.endswith(".k_scale"))
        return {o: KVScales(float(self.read(f"{o}.k_scale")[0]), float(self.read(f"{o}.v_scale")[0])) for o in owners}

    def float_tensors(self) -> list[str]:
        """Return the names of all tensors that are not part of a quantized layer or of the cache."""
        parts = {f"{name}.{part}" for name, scheme in self.schemes.items() for part in LINEAR_PARTS[scheme.bits]}
        return [n for n in self.tensors if n not in parts and n.rpartition(".")[2] not in CACHE_PARTS]

    def statistics(self) -> dict[str, np.ndarray]:
        """Return the arrays of the statistics file; empty if there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.folder / STATISTICS_FILE
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as cause:
            raise CheckpointError(f"{path}: can't be read ({cause}); --verify shows what else is damaged") from cause

    def verify(self) -> Iterator[str]:
        """Compare every file with its recorded checksum; yield each name that was found sound.

        Raises:
            CheckpointError: a file is missing or differs, or the folder has no record of checksums.
        """
        if "files" not in self.record:
            raise CheckpointError(f"{self.folder}: has no {RECORD_FILE} with checksums; nothing to verify against")
        path = self.folder / RECORD_FILE
        if path.read_bytes() != json_bytes(self.record):
            raise CheckpointError(f"{path}: differs from the file that was written; copy it again")
        yield RECORD_FILE
        for name, expected in self.record["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing")
            if path.stat().st_size != expected["bytes"] or sha256_of_file(path) != expected["sha256"]:
                raise CheckpointError(f"{path}: differs from the file that was written (SHA-256); copy it again")
            yield name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise CheckpointError(f"{path}: can't be read ({cause.strerror}); not a finished checkpoint folder") from cause
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: is no valid JSON ({cause}); it was damaged or cut off") from cause
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: needed a JSON object")
    return values
