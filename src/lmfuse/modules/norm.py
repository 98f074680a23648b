"""RMS norm and layer norm as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmfuse import functional


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The parameter itself, so that it stays tied, or one that holds the memory of the tensor."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x², -1) + eps) · (weight + weight_offset)

    Args:
        hidden_size: n, the last dimension of x.
        eps: added to the mean square.
        weight: [n], a parameter or a plain tensor; None for ones.
        weight_offset: 1.0 for Gemma, whose checkpoints store weight - 1.

    Raises:
        ValueError: weight does not have hidden_size elements.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        weight: Tensor | None = None,
        weight_offset: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is None:
            weight = nn.Parameter(torch.ones(hidden_size))
        if weight.shape != (hidden_size,):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, but must have shape ({hidden_size},): "
                "hidden_size"
            )
        self.weight = _parameter(weight)
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; see `lmfuse.functional.rms_norm`."""
        return functional.rms_norm(x, self.weight, self.eps, self.weight_offset)

    @staticmethod
    def apply_function(hidden_states: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """`lmfuse.functional.rms_norm`."""
        return functional.rms_norm(hidden_states, weight, eps)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.weight.shape[0]}, eps={self.eps}{offset}"


class FastLayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias, over the last dimensions

    Args:
        normalized_shape: the last dimensions of x.
        eps: added to the variance (mean squared deviation, not corrected).
        weight, bias: of normalized_shape, parameters or plain tensors; no bias if None.

    Raises:
        ValueError: weight or bias does not have normalized_shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        self.normalized_shape = tuple(normalized_shape)
        for name, vector in (("weight", weight), ("bias", bias)):
            if vector is not None and tuple(vector.shape) != self.normalized_shape:
                raise ValueError(
                    f"{name} has shape {tuple(vector.shape)}, but must have normalized_shape, "
                    f"{self.normalized_shape}"
                )
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., *normalized_shape]; see `lmfuse.functional.fast_layer_norm`."""
        return functional.fast_layer_norm(
            hidden_states, self.normalized_shape, self.weight, self.bias, self.eps
        )

    @staticmethod
    def apply_function(
        hidden_states: Tensor,
        normalized_shape: int | Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """`lmfuse.functional.fast_layer_norm`."""
        return functional.fast_layer_norm(hidden_states, normalized_shape, weight, bias, eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"
