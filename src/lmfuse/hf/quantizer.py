"""transformers' quantizer "lmfuse": `from_pretrained(…, quantization_config=WeightOnlyConfig(…))`,
`save_pretrained`, and `from_pretrained` of what that wrote.

While a model loads, an `Awaiting` stands where a quantized layer will be: each weight is quantized
when it is read, before the next is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmfuse.functional import QuantizedFormat, copy_quantized, quantized_format
from lmfuse.functional.experts import panel_rows
from lmfuse.modules import QuantizedLinear, experts
from lmfuse.quantization import model as quantized
from lmfuse.quantization.compute import choose_compute
from lmfuse.quantization.config import WeightOnlyConfig
from lmfuse.quantization.embedding import QuantizedEmbedding

NAME = WeightOnlyConfig.quant_method
_BYTES = ("gate_up", "down")  # as QuantizedExperts calls them


class Awaiting(nn.Module):
    """The place of a layer whose weight is still to come."""

    def __init__(self, stock: Any, quantized: bool) -> None:
        super().__init__()
        self.is_linear, self.of_file = isinstance(stock, nn.Linear), quantized
        self.shape = tuple(stock.weight.shape)
        self.padding_idx = getattr(stock, "padding_idx", None)
        self.dtype: torch.dtype = stock.weight.dtype
        weight = stock.weight
        if quantized:
            weight = torch.empty(0, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias: Any = getattr(stock, "bias", None)


class AwaitingExperts(nn.Module):
    """The place of experts whose weights are still to come, named as they will come."""

    names: dict[str, int]  # of the weights, and how many matrices of an expert are in each

    def __init__(self, stock: Any, act: str, quantized: bool) -> None:
        super().__init__()
        self.act, self.of_file = act, quantized
        self.shapes = [tuple(getattr(stock, name).shape) for name in experts.PARTS]
        self.names = dict(zip(_BYTES, experts.PARTS.values(), strict=True))
        if not quantized:
            self.names = experts.PARTS
        for name, stock_name in zip(self.names, experts.PARTS, strict=True):
            weight = getattr(stock, stock_name).detach()
            if quantized:
                weight = torch.empty(0, dtype=torch.uint8, device="meta")
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
        self.turned = act == experts.CLAMPED
        if self.turned:
            self.alpha, self.limit = stock.alpha, stock.limit
            for name in experts.BIASES:
                bias = getattr(stock, name).detach()
                setattr(self, name, nn.Parameter(bias, requires_grad=False))


class Pack(ConversionOps):
    """A weight as it is in the file -> its bytes."""

    def __init__(self, config_of: Callable[[str], WeightOnlyConfig]) -> None:
        self.config_of = config_of

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """One tensor in, one out, under its name."""
        done = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            owner, _, attribute = name.rpartition(".")
            awaiting = model.get_submodule(owner)
            how: tuple[Any, ...] = ()
            if isinstance(awaiting, AwaitingExperts):
                how = awaiting.names[attribute], awaiting.turned
            done[name] = quantized.pack_weight(name, weight, self.config_of(owner), *how)
        return done


@register_quantizer(NAME)
class Quantizer(HfQuantizer):
    """See the module."""

    quantization_config: Any
    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises for a device_map that names anything but the CPU."""
        places = kwargs.get("device_map")
        places = places.values() if isinstance(places, dict) else [places]
        for place in places:
            if place not in (None, "cpu", "auto") and torch.device(place).type != "cpu":
                raise ValueError(f"device_map names {place}, but lmfuse computes on the CPU")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is the weight of a layer that is to be quantized."""
        name, _, attribute = param_name.rpartition(".")
        owner = model.get_submodule(name)
        if isinstance(owner, AwaitingExperts):
            return attribute in owner.names
        return attribute == "weight" and isinstance(owner, Awaiting)

    def get_quantize_ops(self) -> Pack:
        """What makes bytes of a weight."""
        return Pack(self._config_of)

    def _config_of(self, name: str) -> WeightOnlyConfig:
        config: WeightOnlyConfig = self.quantization_config
        return config if self.pre_quantized else self._plan.config_of(name, config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: WeightOnlyConfig = self.quantization_config
        if self.pre_quantized:
            acts, _ = experts.find(model)
            stock = {name: _stock(model, name, acts) for name in config.layers}
        else:
            self._plan = quantized.plan(model, config)
            stock, acts = self._plan.layers, self._plan.acts
        for name, module in stock.items():
            waiting: nn.Module
            if name in acts:
                waiting = AwaitingExperts(module, acts[name], self.pre_quantized)
            else:
                waiting = Awaiting(module, self.pre_quantized)
            model.set_submodule(name, waiting)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: WeightOnlyConfig = self.quantization_config
        shared: dict[int, Tensor] = {}
        kinds = (Awaiting, AwaitingExperts)
        names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
        for name in names:
            awaiting = cast(Any, model.get_submodule(name))
            compute = config.layers.get(name, quantized.layer_compute(config))
            compute = "bf16" if compute == "auto" else compute
            arrived = _arrived if isinstance(awaiting, Awaiting) else _experts_arrived
            layer = arrived(name, awaiting, self._config_of(name), compute, shared)
            model.set_submodule(name, layer)
        computes = set(config.layers.values()) if self.pre_quantized else {config.compute}
        reasons = choose_compute(model, None) if "auto" in computes else {}
        quantized.remember(model, config)
        stock = {} if self.pre_quantized else self._plan.stock
        quantized.describe_all(model, names, stock, reasons)
        return model

    def is_serializable(self) -> bool:
        """Yes: bytes are tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: lmfuse is for inference."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def _stock(model: nn.Module, name: str, acts: dict[str, str]) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"quantization_config.layers names {name}, but the model has no such module"
        ) from None
    if not isinstance(module, (nn.Linear, nn.Embedding)) and name not in acts:
        raise ValueError(
            f"quantization_config.layers names {name}, but that is a {type(module).__name__}"
        )
    return module


def _arrived(
    name: str, awaiting: Awaiting, config: WeightOnlyConfig, compute: str, shared: dict[int, Tensor]
) -> nn.Module:
    """The quantized layer, once the weight is there."""
    weight = awaiting.weight
    if id(weight) not in shared:
        shared[id(weight)] = _bytes(f"{name}.weight", weight, config, awaiting.of_file)
    packed = shared[id(weight)]
    format = _format(f"{name}.weight", packed)
    if (format.out_features, format.in_features) != awaiting.shape:
        raise ValueError(
            f"{name}.weight is quantized ({format.out_features}, {format.in_features}), but the "
            f"model's is {awaiting.shape}"
        )
    if not awaiting.is_linear:
        return QuantizedEmbedding(packed, awaiting.dtype, awaiting.padding_idx).eval()
    return QuantizedLinear(packed, awaiting.bias, compute, config.block_scales).eval()


def _experts_arrived(
    name: str,
    awaiting: AwaitingExperts,
    config: WeightOnlyConfig,
    compute: str,
    shared: dict[int, Tensor],
) -> nn.Module:
    """The quantized experts, once both weights are there."""
    packed = []
    for (part, parts), shape in zip(awaiting.names.items(), awaiting.shapes, strict=True):
        given: Tensor = getattr(awaiting, part)
        weight = _bytes(f"{name}.{part}", given, config, awaiting.of_file, parts, awaiting.turned)
        format = _format(f"{name}.{part}", weight)
        count, rows, columns = (shape[0], *shape[:0:-1]) if awaiting.turned else shape
        wanted = count * parts * panel_rows(rows // parts)
        if (format.out_features, format.in_features) != (wanted, columns):
            raise ValueError(
                f"{name}.{part} is quantized ({format.out_features}, {format.in_features}), but "
                f"the model's is {shape}"
            )
        packed.append(weight)
    return quantized.quantized_experts(packed, awaiting.act, config, compute, awaiting)


def _bytes(
    name: str, weight: Tensor, config: WeightOnlyConfig, of_file: bool, *parts: Any
) -> Tensor:
    """Those of a weight that was quantized while it was read, or before, or is still to be."""
    if not weight.numel():
        raise ValueError(f"the checkpoint has no {name}")
    if weight.is_floating_point():  # it is tied to one that is not quantized
        return quantized.pack_weight(name, weight, config, *parts)
    # A view into a file, aligned to 8 bytes; what was quantized just now lies in large pages.
    if not of_file:
        return weight.detach()
    _format(name, weight)
    return copy_quantized(weight)


def _format(name: str, packed: Tensor) -> QuantizedFormat:
    try:
        return quantized_format(packed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


@register_quantization_config(NAME)
class _Config(QuantizationConfigMixin):
    """What the registry asks for: makes a `WeightOnlyConfig` of what config.json says."""

    quant_method = NAME  # type: ignore[assignment]

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """See `WeightOnlyConfig.from_dict`."""
        config = WeightOnlyConfig.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config
