"""What quantizing changes: perplexity, divergence, greedy agreement; the error of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmfuse.functional.experts import expert_matrices
from lmfuse.modules import QuantizedExperts, QuantizedLinear
from lmfuse.modules.experts import CLAMPED, PARTS

_LAYER_TOKENS = 128


@dataclass(frozen=True)
class Quality:
    """A model beside its reference, on the same tokens.

    Attributes:
        tokens: how many next tokens were asked for.
        perplexity, reference: exp of the mean of -log p(next token).
        divergence: the mean of KL(reference || model) = Σ p log(p / q), in nats a token.
        agreement: the part of the positions where both have the same most probable next token.
    """

    tokens: int
    perplexity: float
    reference: float
    divergence: float
    agreement: float

    @property
    def change(self) -> float:
        """perplexity / reference - 1"""
        return self.perplexity / self.reference - 1


@dataclass(frozen=True)
class LayerError:
    """|ŵ - w| / |w| of a weight, and the same of the layer's results on tokens of the text."""

    name: str
    weight: float
    output: float


def default_text() -> str:
    """English that every Python has: the help texts of its language reference."""
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def windows(ids: Tensor, tokens: int, length: int = 512) -> Tensor:
    """At least `tokens` token ids, or all there are, as rows of `length`.

    Raises:
        ValueError: fewer ids than one row.
    """
    rows = min(-(-tokens // length), ids.numel() // length)
    if not rows:
        raise ValueError(f"the text has {ids.numel()} tokens, but at least {length} are needed")
    return ids.flatten()[: rows * length].view(rows, length)


@torch.no_grad()
def compare(
    reference: Any, model: Any, rows: Tensor, step: Callable[[], None] = lambda: None
) -> Quality:
    """Both models on each row of `rows` [windows, length]; `step` is called after each."""
    loss = other = divergence = 0.0
    same = count = 0
    for row in rows:
        targets = row[1:]
        p = reference(row[None]).logits[0, :-1].float().log_softmax(-1)
        q = model(row[None]).logits[0, :-1].float().log_softmax(-1)
        loss -= float(p.gather(1, targets[:, None]).double().sum())
        other -= float(q.gather(1, targets[:, None]).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        count += len(targets)
        step()
    perplexity, stock = math.exp(other / count), math.exp(loss / count)
    return Quality(count, perplexity, stock, divergence / count, same / count)


@torch.no_grad()
def layer_errors(reference: Any, model: Any, row: Tensor) -> list[LayerError]:
    """How far each quantized layer of `model` is from that of `reference`, on the same inputs."""
    found: dict[str, LayerError] = {}

    def watch(name: str, layer: Any) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
            found[name] = LayerError(
                name,
                _weight_error(layer, module),
                _relative(layer(*args).float() - result.float(), result.float()),
            )

        return reference.get_submodule(name).register_forward_hook(hook)

    hooks = [
        watch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        or (
            isinstance(module, QuantizedLinear)
            and isinstance(reference.get_submodule(name), nn.Linear)
        )
    ]
    try:
        reference(row[None, :_LAYER_TOKENS])
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _weight_error(layer: QuantizedLinear | QuantizedExperts, stock: Any) -> float:
    """Of all weights of a layer or of experts together."""
    if isinstance(layer, QuantizedLinear):
        return _relative(layer.dequantize() - stock.weight.float(), stock.weight.float())
    error = norm = 0.0
    for values, (name, parts) in zip(layer.dequantize(), PARTS.items(), strict=True):
        weight = getattr(stock, name).float()
        if layer.act == CLAMPED:
            weight = expert_matrices(weight, parts).flatten(1, 2)
        error += float((values - weight).square().sum())
        norm += float(weight.square().sum())
    return math.sqrt(error / max(norm, 1e-60))


def _relative(error: Tensor, to: Tensor) -> float:
    return float(error.norm() / to.norm().clamp(min=1e-30))
