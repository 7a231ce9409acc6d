"""vLLM's linear layers on W4A8 checkpoints: parameters as the file has them, packed for our kernels once loaded.

vLLM puts layers that share an input into one (q, k and v; gate and up). Their codes are stacked; their inputs have one
scheme and one scale, since the policy decides by input, so this is exact. The KV cache is vLLM's, in float: none of its
attention kernels for CPUs reads a static int8 cache.

With tensor parallelism a layer whose input is split has the scale of the whole token: the largest magnitude is taken
over all processes, so that the integers are those of a single process.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.platforms import current_platform

from fptq.checkpoint import PRODUCER, LayerScheme
from fptq.checkpoint.format import matches, read_schemes
from fptq.errors import CheckpointError
from fptq.integrations.torch_ops import linear, linear_of_codes, shared_kernels
from fptq.integrations.vllm.support import refusal
from fptq.recipe import Activation

NAME = "fptq"
"""What vLLM calls the method."""

logger = init_logger("vllm.fptq")  # under vLLM's own logger, which is the one that is shown


@register_quantization_config(NAME)
class FPTQConfig(QuantizationConfig):
    """What `quantization_config` says of a checkpoint, and which method each of vLLM's layers gets."""

    def __init__(self, schemes: list[tuple[list[str], LayerScheme]], ignored: list[str], int8_cache: bool):
        super().__init__()
        self.schemes = schemes
        self.ignored = ignored
        self.int8_cache = int8_cache

    def get_name(self) -> str:
        """Return NAME."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that the rest of the model may have; products are computed from int8 and give float32."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return that no GPU is needed."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FPTQConfig:
        """Return the configuration of a checkpoint.

        Raises:
            CheckpointError: it has something that this plugin doesn't run.
        """
        if not current_platform.is_cpu():
            raise CheckpointError(
                "fptq's plugin runs on CPUs only; for a GPU make another form of the checkpoint: fptq export DIR --to "
                "w4a16 -o OUT"
            )
        schemes = read_schemes(config)
        refused = refusal([(targets[0], scheme) for targets, scheme in schemes])
        if refused:
            raise CheckpointError(refused)
        return cls(schemes, config["ignore"], config.get("kv_cache_scheme") is not None)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim checkpoints that fptq made, and no others."""
        return NAME if hf_quant_cfg.get("producer") == PRODUCER and user_quant in (None, NAME) else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a linear layer; None for all that isn't one."""
        if not isinstance(layer, LinearBase):
            return None
        schemes = {self._scheme(name) for name in self._parts(prefix)}
        if len(schemes) > 1:
            raise CheckpointError(f"{prefix}: vLLM fuses layers whose schemes differ: {schemes}")
        scheme = schemes.pop()
        if scheme is None:
            return UnquantizedLinearMethod()
        self._report()
        return W4A8LinearMethod(prefix, scheme)

    def _parts(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of the layers that vLLM fuses into one."""
        parent, _, last = prefix.rpartition(".")
        return [f"{parent}.{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def _scheme(self, name: str) -> LayerScheme | None:
        found = [scheme for targets, scheme in self.schemes if any(matches(target, name) for target in targets)]
        if not found and name not in self.ignored:
            raise CheckpointError(f"{name}: the checkpoint neither quantizes it nor leaves it in float by name")
        return found[0] if found else None

    def _report(self) -> None:
        kernels = shared_kernels()
        logger.info_once(
            "fptq: int4 weights times int8 activations on the kernel '%s' with %d threads",
            kernels.target,
            kernels.threads,
        )
        if self.int8_cache:
            logger.info_once("fptq: the checkpoint's int8 KV cache isn't used: vLLM's cache stays in float on CPUs")

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """Leave the int8 KV cache's scales out."""
        return WeightsMapper(orig_to_new_suffix={".k_scale": None, ".v_scale": None})


@register_weight_loader_v2_supported_method
class W4A8LinearMethod(LinearMethodBase):
    """A linear layer, or several fused ones, of one scheme."""

    def __init__(self, prefix: str, scheme: LayerScheme):
        self.prefix = prefix
        self.scheme = scheme

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer parameters named and shaped as in the file, split as vLLM splits them."""
        n, k, size = sum(output_partition_sizes), input_size_per_partition, self.scheme.group_size
        assert size is not None
        if k % size:
            raise CheckpointError(
                f"{self.prefix}: {k} of {input_size} inputs for each process aren't whole groups of {size}; use "
                "another --tensor-parallel-size"
            )
        load = extra_weight_attrs["weight_loader"]
        words = torch.empty(n, k // 8, dtype=torch.int32)
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                data=words, input_dim=1, output_dim=0, packed_dim=1, packed_factor=8, weight_loader=load
            ),
        )
        scales = torch.empty(n, k // size, dtype=torch.float32)
        layer.register_parameter(
            "weight_scale", GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=load)
        )
        layer.register_parameter(
            "weight_shape", BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=load)
        )
        if self.scheme.activation is Activation.STATIC:
            unset = torch.full((len(output_partition_sizes),), torch.nan)
            layer.register_parameter("input_scale", PerTensorScaleParameter(data=unset, weight_loader=load))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weights for the kernels, and let go of the file's form."""
        words, scales = layer.weight_packed.data.numpy(), layer.weight_scale.data.numpy()
        packed = shared_kernels().pack_words(words, scales.astype(ml_dtypes.bfloat16))
        layer.fptq_input_scale = self._input_scale(layer)
        for name in ("weight_packed", "weight_scale", "weight_shape", "input_scale"):
            if hasattr(layer, name):
                delattr(layer, name)
        layer.register_buffer("fptq_packed", torch.from_numpy(np.ascontiguousarray(packed.data)), persistent=False)
        layer.fptq_out_features = packed.n

    def _input_scale(self, layer: torch.nn.Module) -> float | None:
        """Return the static step size, which all of the fused layers have; None if inputs are quantized per token."""
        if self.scheme.activation is not Activation.STATIC:
            return None
        steps = layer.input_scale.data
        if not bool((steps == steps[0]).all() and steps[0] > 0):
            raise CheckpointError(f"{self.prefix}: the input scales {steps.tolist()} of fused layers aren't one number")
        return float(steps[0])

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output in the dtype of `x`."""
        size, step = self.scheme.group_size, layer.fptq_input_scale
        assert size is not None
        offset = None if bias is None else bias.float()
        if step is None and isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            steps = tensor_parallel_steps(x)
            codes = (x.float() / steps[..., None]).round().clamp(-128, 127).to(torch.int8)
            y = linear_of_codes(codes, steps, layer.fptq_packed, layer.fptq_out_features, size, 4, offset)
        else:
            y = linear(x.float(), layer.fptq_packed, layer.fptq_out_features, size, 4, step, offset)
        return y.to(x.dtype)


@torch.library.custom_op("fptq::tensor_parallel_steps", mutates_args=(), device_types="cpu")
def tensor_parallel_steps(x: torch.Tensor) -> torch.Tensor:
    """Return max|x| / 127 [...] over the rows [..., k] of which every process has a part; 1 for rows of zeros."""
    largest = x.abs().amax(-1).float()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


@tensor_parallel_steps.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)
