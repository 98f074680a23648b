"""`quantize(model, config)`: linear layers become `lmfuse.modules.QuantizedLinear`, the experts of
mixtures `QuantizedExperts`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from lmfuse.functional import PackedWeight, expert_rows, pack_quantized
from lmfuse.modules import Linear, QuantizedExperts, QuantizedLinear, experts
from lmfuse.modules.siblings import SiblingLinear, part_siblings
from lmfuse.quantization.codes import quantize_weight
from lmfuse.quantization.compute import choose_compute
from lmfuse.quantization.config import WeightOnlyConfig
from lmfuse.quantization.embedding import QuantizedEmbedding

Model = TypeVar("Model", bound=nn.Module)

_REPORT = "_lmfuse_quantization"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Quantization:
    """What became of each layer: its name -> how it is quantized, or why it stayed as it was."""

    quantized: dict[str, str] = field(default_factory=dict)
    stock: dict[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    """The layers to quantize, those that stay, and which of them hold the embedding's weight; of
    experts their activation."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    stock: dict[str, str] = field(default_factory=dict)
    head: nn.Module | None = None
    embedding: nn.Module | None = None
    acts: dict[str, str] = field(default_factory=dict)

    def config_of(self, name: str, config: WeightOnlyConfig) -> WeightOnlyConfig:
        """How the layer called `name` is quantized."""
        module = self.layers.get(name)
        special = module is not None and module in (self.head, self.embedding)
        return config.of_head() if special else config


def quantize(
    model: Model,
    config: WeightOnlyConfig | None = None,
    inplace: bool = False,
    sample: Any = None,
) -> Model:
    """The same model, with the weights of its linear layers quantized.

    Layer by layer, a `torch.nn.Linear`, or the `lmfuse.modules.Linear` that `optimize` made of it,
    becomes an `lmfuse.modules.QuantizedLinear`; subclasses of other libraries and layers with hooks
    stay as they are. Experts that transformers keeps in two parameters become
    `lmfuse.modules.QuantizedExperts`, if they compute down(act(gate(x)) · up(x)). Besides the model
    and the quantized one there is one layer in float32 slices.
    A progress bar appears on a terminal after 2 s. A model that is quantized already is returned
    with what is left quantized, too. `lmfuse.hf.report` says what each layer became. Models of
    transformers keep the config in `config.quantization_config`: `save_pretrained` writes it, and
    `from_pretrained` reads it.

    Args:
        model: any nn.Module, with its parameters on the CPU.
        config: None for `WeightOnlyConfig()`, int8 per channel.
        inplace: change and return `model` itself, rather than a copy (which shares no parameter
            with it).
        sample: for compute "auto": token ids to try int8 compute on; see `choose_compute`.

    Returns:
        The quantized model.

    Raises:
        TypeError: not an nn.Module or not a WeightOnlyConfig.
        ValueError: a weight that holds NaN or infinity, or nothing to quantize. After any exception
            `model` is as before.
    """
    config = WeightOnlyConfig() if config is None else config
    _check(model, config)
    planned = plan(model, config)
    done = any(isinstance(m, (QuantizedLinear, QuantizedExperts)) for m in model.modules())
    if not planned.layers and not done:
        why = "; ".join(f"{name}: {why}" for name, why in list(planned.stock.items())[:3])
        raise ValueError(f"model has no linear layer to quantize ({why or 'none at all'})")
    made: dict[int, nn.Module] = {}
    shared: dict[int, Tensor] = {}  # weight -> its bytes, for tied layers
    for name, module in tqdm(
        planned.layers.items(), desc="quantizing", unit="layer", delay=2, disable=None
    ):
        of_layer, act = planned.config_of(name, config), planned.acts.get(name)
        made[id(module)] = quantized_layer(name, module, of_layer, shared, act)
    if inplace:
        pairs = [(module, made[id(module)]) for module in planned.layers.values()]
        _exchange(pairs)
        try:
            reasons = _finish(model, config, sample)
        except BaseException:
            _exchange(pairs)
            raise
        for _, old in pairs:
            part_siblings(old)
    else:
        model = copy.deepcopy(model, dict(made))  # a module that was replaced is not copied
        reasons = _finish(model, config, sample)
    describe_all(model, list(planned.layers), planned.stock, reasons)
    return model


def quantized_layer(
    name: str,
    module: nn.Module,
    config: WeightOnlyConfig,
    shared: dict[int, Tensor] | None = None,
    act: str | None = None,
) -> nn.Module:
    """What `module`, an nn.Linear, an nn.Embedding or experts with the activation `act`, becomes.

    Raises:
        ValueError: a weight that holds NaN or infinity; names the layer.
    """
    if act is not None:
        turned = act == experts.CLAMPED
        packed_parts = [
            pack_weight(f"{name}.{part}", getattr(module, part), config, parts, turned)
            for part, parts in experts.PARTS.items()
        ]
        compute = layer_compute(config)
        mixture = quantized_experts(packed_parts, act, config, compute, module)
        return mixture.train(module.training)
    shared = {} if shared is None else shared
    weight: Any = module.weight
    if id(weight) not in shared:
        shared[id(weight)] = pack_weight(f"{name}.weight", weight, config)
    packed = shared[id(weight)]
    if isinstance(module, nn.Embedding):
        made: nn.Module = QuantizedEmbedding(packed, weight.dtype, module.padding_idx)
    else:
        bias: Any = module.bias
        bias = None if bias is None else bias.detach().clone()
        made = QuantizedLinear(packed, bias, layer_compute(config), config.block_scales)
    return made.train(module.training)


def quantized_experts(
    packed: list[Tensor], act: str, config: WeightOnlyConfig, compute: str, like: Any
) -> QuantizedExperts:
    """Experts over the bytes of gate_up and down; what else there is, is that of `like`."""
    how = packed[0], packed[1], act, compute, config.block_scales
    if act != experts.CLAMPED:
        return QuantizedExperts(*how)
    biases = [getattr(like, name).detach().clone() for name in experts.BIASES]
    return QuantizedExperts(*how, (biases[0], biases[1]), float(like.alpha), float(like.limit))


def pack_weight(
    name: str,
    weight: Tensor,
    config: WeightOnlyConfig,
    parts: int | None = None,
    transposed: bool = False,
) -> Tensor:
    """The bytes of a weight [n, k], quantized as `config` says, or of experts [experts, parts · n,
    k], or transposed.

    Raises:
        ValueError: a weight that holds NaN or infinity; calls it `name`.
    """
    plain = weight.unpack() if isinstance(weight, PackedWeight) else weight.detach()
    if parts is not None:
        plain = expert_rows(plain, parts, transposed)
    named = config.scale_dtype or ("float32" if config.group_size == -1 else "bfloat16")
    dtype = getattr(torch, named)
    kind = str(config.kind)
    try:
        found = quantize_weight(
            plain, kind, config.group_size, bool(config.symmetric), str(config.scales), dtype
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return pack_quantized(
        kind, found.codes, found.scales, found.zeros, group_size=config.group_size
    )


def layer_compute(config: WeightOnlyConfig) -> str:
    """What a layer computes in until `choose_compute` was asked."""
    return "bf16" if config.compute == "auto" else config.compute


def quantization(model: nn.Module) -> Quantization:
    """What `quantize` made of `model`."""
    found = vars(model).get(_REPORT)
    return found if found is not None else Quantization()


def _check(model: object, config: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a TorchScript module: quantize it before it is traced")
    if not isinstance(config, WeightOnlyConfig):
        raise TypeError(f"config is {type(config).__name__}, but must be a WeightOnlyConfig")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"parameter {name} is on {parameter.device}, but lmfuse quantizes on the CPU"
            )


def plan(model: nn.Module, config: WeightOnlyConfig) -> Plan:
    """Which layers of `model` are to be quantized; the model may be on meta."""
    found = Plan(head=_ask(model, "get_output_embeddings"))
    inputs = _ask(model, "get_input_embeddings")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_head = module is found.head or (found.head is None and name == "lm_head")
            reason = _reason_against(module, name, config)
            if is_head:
                found.head = module
            if reason is None and is_head and not config.lm_head:
                reason = "lm_head is False"
            if reason is None:
                found.layers[name] = module
            else:
                found.stock[name] = reason
        elif module is inputs and config.embedding:
            if type(module) is nn.Embedding and module.max_norm is None and not config.skips(name):
                found.layers[name] = found.embedding = module
            else:
                found.stock[name] = f"it is {type(module).__name__}, skipped or with max_norm"
    _plan_experts(model, config, found)
    stays = not any(module is found.head for module in found.layers.values())
    if found.embedding is not None and stays and _tied(model, found.head, found.embedding):
        name = next(n for n, module in found.layers.items() if module is found.embedding)
        del found.layers[name]
        found.stock[name] = "it is tied to the layer of the logits, which stays as it is"
    return found


def _plan_experts(model: nn.Module, config: WeightOnlyConfig, found: Plan) -> None:
    """Those of stock modules, and those that were packed."""
    with torch.no_grad():
        known, against = experts.find(model)
    for name, module in model.named_modules():
        if isinstance(module, experts.Experts):
            known[name] = module.experts_act
    found.stock.update(against)
    for name, act in known.items():
        module = model.get_submodule(name)
        reason = _reason_against_calls(module, name, config)
        if reason is None:
            found.layers[name], found.acts[name] = module, act
        else:
            found.stock[name] = reason


def _tied(model: nn.Module, head: Any, embedding: Any) -> bool:
    if head is None or head.weight is embedding.weight:
        return head is not None
    keys = getattr(model, "all_tied_weights_keys", None)  # what will be tied, while on meta
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return head.weight.is_meta and isinstance(keys, dict) and bool(names & keys.keys())


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _reason_against(module: nn.Linear, name: str, config: WeightOnlyConfig) -> str | None:
    weight: Any = module.weight
    if type(module) not in (nn.Linear, Linear, SiblingLinear):
        return f"it is {type(module).__name__}, not torch.nn.Linear itself"
    if (reason := _reason_against_calls(module, name, config)) is not None:
        return reason
    plain = isinstance(weight, PackedWeight) or type(weight) in (nn.Parameter, Tensor)
    if (
        not plain
        or weight.device.type not in ("cpu", "meta")
        or weight.dtype not in _FLOATS
        or not weight.numel()
    ):
        return f"its weight is {tuple(weight.shape)}, {weight.dtype}, on {weight.device}"
    return None


def _reason_against_calls(module: nn.Module, name: str, config: WeightOnlyConfig) -> str | None:
    if config.skips(name):
        return "skip names it"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its forward is replaced on the instance, or has hooks"
    return None


def _exchange(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Each module becomes the other of its pair, wherever it is held; a second time undoes it."""
    for a, b in pairs:
        a.__dict__, b.__dict__ = b.__dict__, a.__dict__
        a.__class__, b.__class__ = type(b), type(a)


def _finish(model: nn.Module, config: WeightOnlyConfig, sample: Any) -> dict[str, str]:
    """Chooses what layers compute in, and tells the model's config; returns the reasons."""
    reasons = choose_compute(model, sample) if config.compute == "auto" else {}
    remember(model, config)
    return reasons


def remember(model: nn.Module, config: WeightOnlyConfig) -> None:
    """Writes into the config of a transformers model how it is quantized."""
    theirs: Any = getattr(model, "config", None)
    if not hasattr(theirs, "to_dict"):
        return
    layers = {
        name: getattr(module, "compute", "bf16")
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedExperts, QuantizedEmbedding))
    }
    theirs.quantization_config = {**config.to_dict(), "layers": layers}
    source = vars(model).get("hf_quantizer")
    if source is not None and not source.is_serializable():
        del model.hf_quantizer  # of a GGUF file, which the model no longer is
    head, inputs = _ask(model, "get_output_embeddings"), _ask(model, "get_input_embeddings")
    if getattr(head, "weight", None) is not getattr(inputs, "weight", None):
        for part in {id(c): c for c in (theirs, _text_config(theirs))}.values():
            part.tie_word_embeddings = False
        keys: Any = getattr(model, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            heads = {f"{name}.weight" for name, module in model.named_modules() if module is head}
            left = {target: source for target, source in keys.items() if target not in heads}
            vars(model)["all_tied_weights_keys"] = left


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, TypeError, ValueError):
        return config


def describe_all(
    model: nn.Module, names: list[str], stock: dict[str, str], reasons: dict[str, str]
) -> None:
    """Writes for `quantization` what became of the layers called `names`, and why not of others."""
    done = copy.deepcopy(quantization(model))
    done.stock.update(stock)
    for name in names:
        done.quantized[name] = describe(model.get_submodule(name), reasons.get(name))
        done.stock.pop(name, None)
    vars(model)[_REPORT] = done


def describe(module: Any, reason: str | None = None) -> str:
    """How a layer is quantized, in words."""
    format = module.format
    group = "per channel" if format.group_size == -1 else f"group {format.group_size}"
    text = f"{format.kind} {group}"
    if isinstance(module, (QuantizedLinear, QuantizedExperts)):
        text += f", computes in {reason or module.compute}"
    return text
