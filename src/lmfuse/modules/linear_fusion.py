"""Linear layers with what follows them, with the names and arguments of `ipex.llm.modules`.

Each takes an existing layer and keeps it: over `lmfuse.modules.Linear` and `QuantizedLinear`, one
fused kernel, which rounds once; over a plain nn.Linear (which is then the user's own: its weight
may change, and it may train), the layer and torch's operation after it, each of which rounds. A
hook on the layer is honoured: it sees the result of the layer, and what follows is then not fused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import PackedWeight
from lmfuse.functional.linear import UNFUSED
from lmfuse.functional.packed import alike
from lmfuse.modules import quantized_linear
from lmfuse.modules.linear import Linear, Transposed
from lmfuse.modules.quantized_linear import QuantizedLinear

# Those of packed layers that compute nothing else; siblings share their work already.
_FORWARDS = (Linear.forward, Transposed.forward)


def fusable(linear: Any) -> bool:
    """Whether `linear` is a packed or quantized layer that nobody watches."""
    packed = type(linear).forward in _FORWARDS and isinstance(linear.weight, PackedWeight)
    return (packed or isinstance(linear, QuantizedLinear)) and not (
        linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    )


def fused_linear(linear: Any, x: Tensor, post: str, *operands: Tensor) -> Tensor:
    """post(linear(x), *operands) of `functional.linear`, in one kernel where `linear` is packed."""
    if not fusable(linear):
        return UNFUSED[post](linear(x), *operands)
    if isinstance(linear, QuantizedLinear):
        return linear.run(x, post, *operands)
    return functional.linear(x, linear.weight, linear.bias, post, *operands)


def joinable(a: Any, b: Any) -> bool:
    """Whether two layers over one input can run in one walk over their weights."""
    if not (fusable(a) and fusable(b) and type(a) is type(b)):
        return False
    return a.alike(b) if isinstance(a, QuantizedLinear) else alike(a.weight, b.weight)


def _checked(name: str, linear: object) -> nn.Module:
    if not isinstance(linear, (nn.Linear, QuantizedLinear)):
        raise TypeError(
            f"{name} is {type(linear).__name__}, but must be a torch.nn.Linear or a QuantizedLinear"
        )
    return linear


class _LinearPost(nn.Module):
    post: str

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = _checked("linear", linear)

    def _run(self, x: Tensor, *operands: Tensor) -> Tensor:
        return fused_linear(self.linear, x, self.post, *operands)


class _Unary(_LinearPost):
    def forward(self, x: Tensor) -> Tensor:
        """x: [..., k]; returns [..., n]."""
        return self._run(x)


class _Binary(_LinearPost):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: [..., k], y: [..., n] or what broadcasts; returns [..., n]."""
        return self._run(x, y)


class LinearSilu(_Unary):
    """z / (1 + exp(-z)), z = linear(x)"""

    post = "silu"


class LinearRelu(_Unary):
    """max(z, 0), z = linear(x)"""

    post = "relu"


class LinearGelu(_Unary):
    """z/2 (1 + erf(z/√2)), z = linear(x)"""

    post = "gelu"


class LinearNewGelu(_Unary):
    """z/2 (1 + tanh(√(2/π) (z + 0.044715 z³))), z = linear(x)"""

    post = "gelu_tanh"


class LinearMul(_Binary):
    """z · y, z = linear(x)"""

    post = "mul"


class LinearAdd(_Binary):
    """z + y, z = linear(x)"""

    post = "add"


class LinearSiluMul(_Binary):
    """silu(z) · y, z = linear(x)"""

    post = "silu_mul"


class LinearAddAdd(_LinearPost):
    """z + y + w, from left to right, z = linear(x)"""

    post = "add_add"

    def forward(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """x: [..., k], y and w: [..., n] or what broadcasts; returns [..., n]."""
        return self._run(x, y, w)


class Linear2SiluMul(nn.Module):
    """silu(linear_s(x)) · linear_m(x); the layers are kept as `linear_1` and `linear_2`."""

    def __init__(self, linear_s: nn.Module, linear_m: nn.Module) -> None:
        super().__init__()
        self.linear_1 = _checked("linear_s", linear_s)
        self.linear_2 = _checked("linear_m", linear_m)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., k]; returns [..., n]."""
        return silu_gate_up(x, self.linear_1, self.linear_2)


def silu_gate_up(x: Tensor, gate: Any, up: Any) -> Tensor:
    """silu(gate(x)) · up(x), in one sweep where both are packed alike."""
    if joinable(gate, up):
        quantized = isinstance(gate, QuantizedLinear)
        a, b = (gate, up) if quantized else (gate.weight, up.weight)
        if a.out_features == b.out_features and quantized:
            return quantized_linear.gate_up(x, gate, up)
        if a.out_features == b.out_features:
            return functional.linear_gate_up(x, gate.weight, up.weight, gate.bias, up.bias)
    return UNFUSED["silu_mul"](gate(x), up(x))


class ConcatLinear(nn.Module):
    """(linear(x) for each of some sibling layers), such as query, key and value, in one call.

    The layers stay modules of their own, with their names in the state_dict of whoever owns them,
    and their weights stay where they are: packed panels of several weights can be walked in one go,
    so nothing is concatenated, and nothing cached between calls. Sizes and biases may differ.

    Args:
        linears: at least one; packed ones run as one, any others one after the other.
    """

    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        if not linears:
            raise ValueError("ConcatLinear needs at least one linear")
        self.linears = nn.ModuleList(
            _checked(f"linears[{i}]", linear) for i, linear in enumerate(linears)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [..., k]; returns [..., n_i] of each layer."""
        return concat(x, *self.linears)


def concat(x: Tensor, *linears: Any) -> tuple[Tensor, ...]:
    """linear(x) of each, in one walk over the weights where all are packed alike."""
    if all(joinable(linears[0], linear) for linear in linears):
        if isinstance(linears[0], QuantizedLinear):
            return quantized_linear.concat(x, *linears)
        weights, biases = [m.weight for m in linears], [m.bias for m in linears]
        return functional.linear_concat(x, weights, biases)
    return tuple(linear(x) for linear in linears)


linearSilu = LinearSilu  # noqa: N816  (the spelling of IPEX's guide)
linearRelu = LinearRelu  # noqa: N816
linearGelu = LinearGelu  # noqa: N816
linearNewGelu = LinearNewGelu  # noqa: N816
linearMul = LinearMul  # noqa: N816
linearAdd = LinearAdd  # noqa: N816
linearAddAdd = LinearAddAdd  # noqa: N816
linearSiluMul = LinearSiluMul  # noqa: N816
linear2SiluMul = Linear2SiluMul  # noqa: N816
