"""What a decoder layer of transformers computes: where its parts are, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import DecoderExperts, DecoderLayer, DecoderLinear, DecoderNorm
from lmfuse.hf import norm, swap
from lmfuse.modules import QuantizedExperts
from lmfuse.modules.decoder import described_linear
from lmfuse.modules.experts import PARTS

ANGLES = "embed_positions"  # a buffer of attention: sin and cos by position

# Attributes of modules that no result in eval mode depends on, or that are read at each call.
_FREE = ("training", "gradient_checkpointing", "layer_idx")

# The fields of functional.DecoderLayer in the order of Form.norms.
_NORMS = (
    "attention_input",
    "query_norm",
    "key_norm",
    "attention_output",
    "mlp_input",
    "mlp_output",
)


@dataclass(frozen=True)
class Form:
    """Where the parts of a layer are, and its numbers; see `functional.DecoderLayer`.

    Attributes:
        projections, output, mlp, norms: dotted names from the layer on. norms are, with None for
            those that are not there: before attention, of query, of key, after attention, before
            and after the MLP.
        cache: how the layer's forward calls its cache.
        arguments: how it calls what it is given besides the hidden states.
        table_step: which columns of the tables of RoPE count: every, or every other.
        table_times: how many times as wide as the tables are is what they rotate.
        angles: attention has the tables itself.
        type: what the config calls the layer; a model gives those of one type the same.
        router, experts: names of the parts of a mixture; mlp is then empty, or of an expert that
            all tokens share, shared_gate what says how much it counts.
        alibi: slopes, and what the layer's forward calls what is made of them.
        pair: the layer's forward returns attention weights, which are None, as well.
        sinks: the parameter with a score more for each head.
        negated: masks have four dimensions, and are True where keys are hidden.
        modules: those that the layer had besides linear layers and experts, each with its name, its
            class and its numbers.
    """

    attention: str
    projections: tuple[str, ...]
    output: str
    mlp: tuple[str, ...]
    norms: tuple[str | None, ...]
    cache: str
    arguments: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    activation: str | None
    gated: bool
    scale: float
    softcap: float
    window: int | None
    groups: int = 1
    values_first: bool = False
    rotary_dim: int = 0
    rotary_half: bool = True
    table_step: int = 1
    table_times: int = 1
    angles: bool = False
    parallel: bool = False
    residual_scale: float = 1.0
    type: str | None = None
    router: str | None = None
    experts: str | None = None
    shared_gate: str | None = None
    chosen: int = 0
    normalized: bool = True
    alibi: tuple[str, tuple[float, ...]] | None = None
    sinks: str | None = None
    pair: bool = False
    negated: bool = False
    modules: tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...] = ()

    def holds(self, layer: nn.Module) -> bool:
        """Whether the modules of `layer` are of the classes and have the numbers that they had."""
        now = dict(layer.named_modules())
        for name, kind, numbers in self.modules:
            module = now.get(name)
            if module is None or (name and swap.kind_of(module) != kind):
                return False
            held = vars(module)
            if any(held.get(key, key) != number for key, number in numbers):
                return False
        return True

    def linears(self, layer: nn.Module) -> list[nn.Module]:
        """In the order query, key, value, output, gate, up, down, shared_gate, without those not
        there."""
        names = (*self.projections, self.output, *self.mlp, self.shared_gate)
        return [layer.get_submodule(name) for name in names if name is not None]

    def norm_modules(self, layer: nn.Module) -> list[nn.Module | None]:
        """As `norms`."""
        return [None if name is None else layer.get_submodule(name) for name in self.norms]

    def described(
        self,
        layer: nn.Module,
        described: Callable[[Any], DecoderLinear] = described_linear,
        kind: int = 0,
    ) -> DecoderLayer:
        """`layer` for the op; `described` says what a linear layer is."""
        modules: list[Any] = self.linears(layer)
        linears = [described(m) for m in modules]
        query, key, value = linears[:3] if len(self.projections) == 3 else (linears[0], None, None)
        output, *mlp = linears[len(self.projections) :]
        shared_gate = None if self.shared_gate is None else mlp.pop()
        modules = self.norm_modules(layer)
        norms: list[Any] = [None if m is None else described_norm(m) for m in modules]
        return DecoderLayer(
            self.heads,
            self.kv_heads,
            self.head_dim,
            query,
            key,
            value,
            output,
            mlp[0] if mlp else None,
            mlp[1] if len(mlp) == 3 else None,
            mlp[-1] if mlp else None,
            self.scale,
            self.gated,
            self.activation,
            **dict(zip(_NORMS, norms, strict=True)),
            groups=self.groups,
            values_first=self.values_first,
            rotary_dim=self.rotary_dim,
            rotary_half=self.rotary_half,
            softcap=self.softcap,
            window=-1 if self.window is None else self.window - 1,
            parallel=self.parallel,
            residual_scale=self.residual_scale,
            kind=kind,
            experts=self.mixture(layer, shared_gate),
            alibi=None if self.alibi is None else torch.tensor(self.alibi[1]),
            sinks=None if self.sinks is None else layer.get_parameter(self.sinks).detach().float(),
        )

    def mixture(self, layer: nn.Module, gate: DecoderLinear | None) -> DecoderExperts | None:
        """That of `layer`, whose experts are packed or quantized, with this shared_gate."""
        if self.router is None or self.experts is None:
            return None
        module: Any = layer.get_submodule(self.experts)
        router: Any = layer.get_submodule(self.router)
        bias = getattr(router, "bias", None)
        weight = DecoderLinear(functional.pack_linear(router.weight), bias)
        if isinstance(module, QuantizedExperts):
            given = module.gate_up, module.down, module.inner_features
            how = module.compute, module.block_scales, gate
            return DecoderExperts(
                weight, *given, self.chosen, self.normalized, *how, **module.more()
            )
        given = module.gate_up_proj, module.down_proj, module.gate_up_proj.out_features
        more = module.more()
        return DecoderExperts(
            weight, *given, self.chosen, self.normalized, shared_gate=gate, **more
        )

    def copied(self, layer: nn.Module) -> list[Tensor]:
        """Parameters of `layer` that `described` may copy."""
        found: list[Tensor] = [] if self.sinks is None else [layer.get_parameter(self.sinks)]
        for name in (self.router, self.experts):
            if name is not None:
                parameters = layer.get_submodule(name).named_parameters()
                found += [p for n, p in parameters if n not in PARTS]
        return found


def modules(layer: nn.Module, form: Form) -> Any:
    """As `Form.modules`."""
    others = {id(m) for linear in form.linears(layer) for m in linear.modules()}
    if form.experts is not None:
        others |= {id(m) for m in layer.get_submodule(form.experts).modules()}
    named = [(name, m) for name, m in layer.named_modules() if id(m) not in others]
    return tuple((name, swap.kind_of(m), tuple(sorted(_numbers(m).items()))) for name, m in named)


def _numbers(module: nn.Module) -> dict[str, Any]:
    plain = (int, float, bool, str, type(None))
    held = {key: x for key, x in vars(module).items() if type(x) in plain}
    return {key: x for key, x in held.items() if key not in _FREE and not key.startswith("_")}


def described_norm(module: nn.Module) -> DecoderNorm:
    """A norm that `hf.norm` swapped, for the op."""
    bias: Any = getattr(module, "bias", None)
    if isinstance(module, norm.FusedLayerNorm):
        return DecoderNorm(module.weight, bias, module.eps, True)
    assert isinstance(module, norm.FusedNorm)
    weight: Any = getattr(module, "weight", None)
    eps: float = getattr(module, module.fused_eps)
    return DecoderNorm(weight, bias, eps, module.fused_centered, module.fused_offset)


def looked_up(attn: Any, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin out of the table of an attention module, or None if it has too few rows."""
    try:
        sin, cos = nn.functional.embedding(positions, attn._buffers[ANGLES]).chunk(2, -1)
    except IndexError:
        return None
    return cos, sin
