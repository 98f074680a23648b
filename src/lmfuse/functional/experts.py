"""Mixtures of experts over packed weights: each token through the few experts that a router chose.

    y[t] = Σ_j weights[t, j] · down_e(act(gate_e(x[t])) · up_e(x[t])),   e = index[t, j]

The tokens of an expert are computed together, so a weight is read once for all of them, and the
weights of experts that no token chose are not read. Sums over experts are fp32, and rounded once.

Source: Shazeer et al., Outrageously Large Neural Networks, 2017; Jiang et al., Mixtral, 2024.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check
from lmfuse.functional.packed import PackedWeight, _pack_bytes, _unpacked

# act(gate) · up, as the op knows them.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class PackedExperts(PackedWeight):
    """The weights [experts, parts · n, k] of several layers alike, made by `pack_experts`.

    As `PackedWeight`; `packed` is [experts · parts, bytes], `out_features` is n, `in_features` k.
    """

    parts: int

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        n: int,
        k: int,
        dtype: torch.dtype,
        packed_dtype: torch.dtype,
        parts: int = 1,
    ) -> PackedExperts:
        shape = (packed.shape[0] // parts, parts * n, k)
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device, storage_size=0
        )

    def __init__(
        self,
        packed: Tensor,
        n: int,
        k: int,
        dtype: torch.dtype,
        packed_dtype: torch.dtype,
        parts: int = 1,
    ) -> None:
        super().__init__(packed, n, k, dtype, packed_dtype)
        self.parts = parts

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedExperts{(*self.shape,)}, dtype={self.public_dtype}"

    def _matrix(self, plain: Tensor) -> Tensor:
        return plain.reshape(-1, self.out_features, self.in_features)

    def _plain(self) -> Tensor:
        shape = (self.packed.shape[0], self.out_features, self.in_features)
        plain = torch.empty(shape, dtype=self.public_dtype)
        for one, packed in zip(plain, self.packed, strict=True):
            one.copy_(_unpacked(packed, self))
        return plain.view(self.shape)

    def _meta(self) -> tuple[Any, ...]:
        return (*super()._meta(), self.parts)

    @classmethod
    def _of(cls, plain: Tensor, rounded: bool, *more: Any) -> PackedExperts:
        return pack_experts(plain, more[0], rounded)


def pack_experts(weight: Tensor, parts: int = 1, rounded: bool = False) -> PackedExperts:
    """The weights of several linear layers alike, packed; `.unpack()` gives them back exactly.

    Args:
        weight: [experts, parts · n, k], float32, bfloat16 or float16, of any strides.
        parts: how many matrices [n, k] of an expert lie one below the other: 2 for gate and up.
        rounded: as in `pack_linear`.

    Raises:
        TypeError, ValueError: a weight that cannot be packed; see the text of the error.
    """
    _check.tensor("weight", weight)
    if parts < 1:
        raise ValueError(f"parts is {parts}, but must be at least 1")
    if weight.dim() != 3 or not weight.numel() or weight.shape[1] % parts:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but must be [experts, {parts} n, k], and not "
            "empty"
        )
    if weight.is_meta:
        raise ValueError("weight is on meta, without data: load the model before it is packed")
    if rounded and weight.dtype is not torch.float32:
        raise TypeError(f"rounded is for a float32 weight, but weight is {weight.dtype}")
    plain = (weight.unpack() if isinstance(weight, PackedWeight) else weight).detach()
    matrices = plain.reshape(plain.shape[0] * parts, -1, plain.shape[2])
    packed = _pack_bytes(matrices, rounded).view(len(matrices), -1)
    _, n, k = matrices.shape
    kind = torch.bfloat16 if rounded else plain.dtype
    return PackedExperts(packed, n, k, plain.dtype, kind, parts)


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    act: str = "silu",
) -> Tensor:
    """Each token through the experts that were chosen for it; see above.

    Args:
        x: [tokens, k], of the dtype of the weights (or float32 over rounded ones).
        index: [tokens, chosen] integers in [0, experts).
        weights: [tokens, chosen] floats.
        gate_up: [experts, 2 n, k], from `pack_experts` with parts 2.
        down: [experts, k, n], from `pack_experts`.
        act: "silu", "gelu" or "gelu_tanh".

    Returns:
        [tokens, k], in the dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    for name, weight, parts in (("gate_up", gate_up, 2), ("down", down, 1)):
        if not isinstance(weight, PackedExperts) or weight.parts != parts:
            raise TypeError(f"{name} must come from pack_experts with parts {parts}")
    _check.row("x", x)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        x = x.to(gate_up.public_dtype)
    if x.dtype is not gate_up.public_dtype and not gate_up.rounded:
        raise TypeError(f"x is {x.dtype}, but must be {gate_up.public_dtype}, as gate_up")
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}, but must be one of {', '.join(ACTIVATIONS)}")
    sizes = (gate_up.out_features, gate_up.in_features)
    if (down.in_features, down.out_features) != sizes or down.dtype is not gate_up.dtype:
        raise ValueError(f"down is {down}, which does not fit gate_up, {gate_up}")
    args = (x, index, weights, gate_up.packed, down.packed, *sizes, act)
    return cast(Tensor, call(ops.experts.default, *args, check=_check_experts)).to(dtype)


# One op, so that graphs and traces hold the choice of experts and not what was once chosen.
torch.library.define(
    "lmfuse::experts",
    "(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, int n, int k,"
    " str act) -> Tensor",
)


@torch.library.impl("lmfuse::experts", "CPU")
def _experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    n: int,
    k: int,
    act: str,
) -> Tensor:
    _check_experts(x, index, weights, gate_up, down, n, k)
    tokens = x.shape[0]
    chosen, counts = _counts(index, down.shape[0])
    order = chosen.argsort(stable=True)  # the tokens of an expert, one below the other
    rows = x[order // index.shape[1]] if index.shape[1] else x[:0]
    parts = []
    for expert, part in enumerate(torch.split(rows, counts)):
        if len(part):
            hidden = _gated(part, gate_up[2 * expert], gate_up[2 * expert + 1], n, act)
            parts.append(ops.linear(hidden, down[expert], None, k, 0, None, None))
    out = torch.zeros((tokens, k))
    if parts:
        scaled = torch.cat(parts).float() * weights.flatten()[order].unsqueeze(1)
        out = scaled[order.argsort()].view(tokens, -1, k).sum(1)
    return out.to(x.dtype)


def _check_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    n: int,
    k: int,
    *_: object,
) -> None:
    if _check.row("x", x) != k or x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be [tokens, {k}]")
    if gate_up.shape[0] != 2 * down.shape[0]:
        raise ValueError(
            f"gate_up has {gate_up.shape[0] // 2} experts, but down has {down.shape[0]}"
        )
    _check.integers("index", index, _check.INTEGERS)
    _check.tensor("weights", weights)
    if index.dim() != 2 or index.shape != weights.shape or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"index has shape {tuple(index.shape)} and weights {tuple(weights.shape)}, but both "
            f"must be [{x.shape[0]}, chosen]"
        )


def _counts(index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    chosen = index.flatten()
    if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < experts):
        raise ValueError(
            f"index goes from {int(chosen.min())} to {int(chosen.max())}, but there are {experts} "
            "experts"
        )
    return chosen, chosen.bincount(minlength=experts).tolist()


def _gated(x: Tensor, gate: Tensor, up: Tensor, n: int, act: str) -> Tensor:
    if act == "silu":
        return cast(Tensor, ops.linear_gate_up(x, gate, up, None, None, n))
    a, b = ops.linear_concat(x, [gate, up], [], 0, 2 * n).chunk(2, dim=-1)
    return cast(Tensor, ops.gelu_mul(a, b, act == "gelu_tanh"))


@register_fake("experts")
def _(x: Tensor, *args: Any) -> Tensor:
    _check_experts(x, *args)
    return x.new_empty(x.shape)
