"""Mixtures of experts: each token through the few that a router chose, packed or quantized.

    y[t] = Σ_j weights[t, j] · down_e(act(gate_e(x[t])) · up_e(x[t])),   e = index[t, j]

"clamped_swiglu" is another way to join gate and up, that of gpt-oss:

    g σ(slope · g) (u + 1),   g = min(gate, limit),   u = min(max(up, -limit), limit)

The tokens of an expert are computed together, so a weight is read once for all of them, and the
weights of experts that no token chose are not read. The results of experts are rounded to the dtype
of x; their sums, in the order of j, are fp32 and rounded once. A token has the same bits whatever
other tokens there are, and whatever the number of threads.

Source: Shazeer et al., Outrageously Large Neural Networks, 2017; Jiang et al., Mixtral, 2024.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check
from lmfuse.functional.packed import PackedWeight, _pack_bytes, _unpacked
from lmfuse.functional.quantized import _check_bytes, quantized_format
from lmfuse.functional.woq import _how

_experts = ops.experts.default

# act(gate) · up, in the order of Activation in csrc/kernels/kernels.h, whose kPanel is the other.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
_PANEL = 32


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
        shape = cls._of_experts(packed.shape[0] // parts, parts * n, k)
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

    @staticmethod
    def _of_experts(experts: int, rows: int, columns: int) -> tuple[int, int, int]:
        """What the owner sees of so many matrices."""
        return experts, rows, columns

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}{(*self.shape,)}, dtype={self.public_dtype}"

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


class PackedExpertsTransposed(PackedExperts):
    """As `PackedExperts`, but its owner sees [experts, k, parts · n], as in gpt-oss."""

    @staticmethod
    def _of_experts(experts: int, rows: int, columns: int) -> tuple[int, int, int]:
        return experts, columns, rows

    def _matrix(self, plain: Tensor) -> Tensor:
        return expert_matrices(plain, self.parts).flatten(0, 1)

    def _plain(self) -> Tensor:
        plain = torch.empty(self.shape, dtype=self.public_dtype)
        matrices = expert_matrices(plain, self.parts)
        for i, packed in enumerate(self.packed):
            matrices[i // self.parts, i % self.parts] = _unpacked(packed, self)
        return plain

    @classmethod
    def _of(cls, plain: Tensor, rounded: bool, *more: Any) -> PackedExperts:
        return pack_experts(plain, more[0], rounded, transposed=True)


def expert_matrices(weight: Tensor, parts: int = 1) -> Tensor:
    """[experts, k, parts · n], whose columns are of each part in turn, as [experts, parts, n, k]: a
    view of it."""
    return weight.view(*weight.shape[:2], -1, parts).permute(0, 3, 2, 1)


def pack_experts(
    weight: Tensor, parts: int = 1, rounded: bool = False, transposed: bool = False
) -> PackedExperts:
    """The weights of several linear layers alike, packed; `.unpack()` gives them back exactly.

    Args:
        weight: [experts, parts · n, k], float32, bfloat16 or float16, of any strides.
        parts: how many matrices [n, k] of an expert lie one below the other: 2 for gate and up.
        rounded: as in `pack_linear`.
        transposed: weight is [experts, k, parts · n], the columns of the parts in turn.

    Raises:
        TypeError, ValueError: a weight that cannot be packed; see the text of the error.
    """
    _check.tensor("weight", weight)
    _check_parts(weight, parts, transposed)
    if weight.is_meta:
        raise ValueError("weight is on meta, without data: load the model before it is packed")
    if rounded and weight.dtype is not torch.float32:
        raise TypeError(f"rounded is for a float32 weight, but weight is {weight.dtype}")
    plain = (weight.unpack() if isinstance(weight, PackedWeight) else weight).detach()
    if transposed:
        each = expert_matrices(plain, parts)
        n, k = each.shape[2:]
        # One expert's after the other: a copy of all of them would be as large as they are.
        packed = torch.cat([_pack_bytes(matrices, rounded) for matrices in each])
    else:
        matrices = plain.reshape(plain.shape[0] * parts, -1, plain.shape[2])
        n, k = matrices.shape[1:]
        packed = _pack_bytes(matrices, rounded)
    kind = PackedExpertsTransposed if transposed else PackedExperts
    held = torch.bfloat16 if rounded else plain.dtype
    return kind(packed.view(len(plain) * parts, -1), n, k, plain.dtype, held, parts)


def _check_parts(weight: Tensor, parts: int, transposed: bool) -> None:
    if parts < 1:
        raise ValueError(f"parts is {parts}, but must be at least 1")
    if weight.dim() != 3 or not weight.numel() or weight.shape[1 + transposed] % parts:
        shape = f"[experts, k, {parts} n]" if transposed else f"[experts, {parts} n, k]"
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but must be {shape}, and not empty"
        )


def panel_rows(n: int) -> int:
    """The rows that a quantized matrix of n rows takes among others: whole panels."""
    return -(-n // _PANEL) * _PANEL


def expert_rows(weight: Tensor, parts: int = 1, transposed: bool = False) -> Tensor:
    """The matrices of experts one below the other, as `pack_quantized` is to be given them

    Args:
        weight: [experts, parts · n, k].
        parts: how many matrices [n, k] of an expert lie one below the other: 2 for gate and up.
        transposed: as for `pack_experts`.

    Returns:
        [experts · parts · 32 ⌈n / 32⌉, k]: each begins a panel, after rows of zeros.

    Raises:
        TypeError, ValueError: not a dense tensor of that shape.
    """
    _check.held("weight", weight)
    _check_parts(weight, parts, transposed)
    if transposed:
        matrices = expert_matrices(weight, parts).flatten(0, 1)
    else:
        matrices = weight.reshape(weight.shape[0] * parts, -1, weight.shape[2])
    short = panel_rows(matrices.shape[1]) - matrices.shape[1]
    padded = torch.nn.functional.pad(matrices, (0, 0, 0, short)) if short else matrices
    return padded.flatten(0, 1)


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: PackedExperts | Tensor,
    down: PackedExperts | Tensor,
    act: str = "silu",
    *,
    inner_features: int | None = None,
    compute: str = "bf16",
    block_scales: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    slope: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Each token through the experts that were chosen for it; see above.

    Args:
        x: [tokens, k], of the dtype of packed weights (or float32 over rounded ones); any of the
            three dtypes over quantized ones.
        index: [tokens, chosen] integers in [0, experts).
        weights: [tokens, chosen] floats.
        gate_up: [experts, 2 n, k], from `pack_experts` with parts 2; or quantized, from
            `pack_quantized` of their `expert_rows`.
        down: [experts, k, n], from `pack_experts`; or quantized likewise.
        act: "silu", "gelu", "gelu_tanh" or "clamped_swiglu".
        inner_features: n of quantized weights; None: look into their bytes.
        compute, block_scales: of quantized weights; see `woq_linear`.
        gate_up_bias: [experts, 2 n], added to gate and up; down_bias: [experts, k].
        slope, limit: of "clamped_swiglu".

    Returns:
        [tokens, k], in the dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    k = _check.row("x", x)
    dtype = x.dtype
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}, but must be one of {', '.join(ACTIVATIONS)}")
    if getattr(index, "dtype", None) not in (torch.int32, torch.int64):
        _check.integers("index", index, _check.INTEGERS)
        index = index.long()
    packed = isinstance(gate_up, PackedWeight) or isinstance(down, PackedWeight)
    if packed:
        n, k, g, d = _of_packed(gate_up, down)
        like: Any = gate_up
        if torch.is_autocast_enabled("cpu"):
            x = x.to(like.public_dtype)
        if x.dtype is not like.public_dtype and not like.rounded:
            raise TypeError(f"x is {x.dtype}, but must be {like.public_dtype}, as gate_up")
        how = -1
    else:
        n = quantized_format(down).in_features if inner_features is None else inner_features
        g, d, (number, blocks) = gate_up, down, _how(compute, block_scales)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        how = 2 * number + blocks
    if not limit > 0:
        raise ValueError(f"limit is {limit}, but must be positive")
    biases = (None if b is None else b.contiguous() for b in (gate_up_bias, down_bias))
    args = (x, index, weights, g, d, *biases, n, k, how, ACTIVATIONS.index(act), slope, limit)
    return cast(Tensor, call(_experts, *args, check=_check_experts)).to(dtype)


def _of_packed(gate_up: Any, down: Any) -> tuple[int, int, Tensor, Tensor]:
    """n, k and the bytes of both."""
    for name, weight, parts in (("gate_up", gate_up, 2), ("down", down, 1)):
        if not isinstance(weight, PackedExperts) or weight.parts != parts:
            raise TypeError(f"{name} must come from pack_experts with parts {parts}")
    n, k = gate_up.out_features, gate_up.in_features
    if (down.in_features, down.out_features) != (n, k) or down.dtype is not gate_up.dtype:
        raise ValueError(f"down is {down}, which does not fit gate_up, {gate_up}")
    return n, k, gate_up.packed, down.packed


def _check_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    n: int,
    k: int,
    how: int,
    *_: object,
) -> None:
    if _check.row("x", x) != k or x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be [tokens, {k}]")
    if how >= 0:
        _check_bytes("gate_up", gate_up)
        _check_bytes("down", down)
    elif gate_up.shape[0] != 2 * down.shape[0]:
        raise ValueError(
            f"gate_up has {gate_up.shape[0] // 2} experts, but down has {down.shape[0]}"
        )
    for name, bias, width in (("gate_up_bias", gate_up_bias, 2 * n), ("down_bias", down_bias, k)):
        if bias is None:
            continue
        _check.tensor(name, bias)
        if bias.dim() != 2 or bias.shape[1] != width:
            raise ValueError(
                f"{name} has shape {tuple(bias.shape)}, but must be [experts, {width}]"
            )
    _check.integers("index", index)
    _check.tensor("weights", weights)
    if index.dim() != 2 or index.shape != weights.shape or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"index has shape {tuple(index.shape)} and weights {tuple(weights.shape)}, but both "
            f"must be [{x.shape[0]}, chosen]"
        )


@register_fake("experts")
def _(x: Tensor, *args: Any) -> Tensor:
    _check_experts(x, *args)
    return x.new_empty(x.shape)
