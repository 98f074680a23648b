"""`Linear`: nn.Linear with a packed weight; `Embedding`: one that shares it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import PackedWeight
from lmfuse.functional.packed import PackedTransposed


class Packed(nn.Module):
    """Mixin of modules whose parameter `weight` is a `PackedWeight`.

    The parameter has the public shape and dtype, so `parameters()`, `num_parameters()`, `dtype`,
    `to()`, `deepcopy` and `load_state_dict` see what they saw before packing; a state_dict holds
    plain tensors. A plain weight that is assigned is packed; one that cannot be (on another device,
    of another dtype) stays plain, and the module then computes as torch does.
    """

    # What the module was, and is again after `unpack_model`. A name that no module has: class
    # attributes hide parameters.
    packed_stock: type[nn.Module]

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, but some of ours are made on the fly.
        return _new, (type(self).packed_stock,), self.__dict__

    transposed = False  # the weight is [in_features, out_features]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch, but packs a `weight`."""
        if name == "weight" and param is not None and packable(param):
            param = pack_parameter(param, transposed=self.transposed)
        super().register_parameter(name, param)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and isinstance(self.weight, PackedWeight):
            destination[prefix + "weight"] = self.weight.unpack()


class Linear(Packed, nn.Linear):
    """nn.Linear whose weight is held in packed form only.

    `Linear.from_linear` packs an existing layer, at the speed of a copy. `.weight` is a parameter
    of the public shape and dtype (see `lmfuse.functional.PackedWeight`); reading its values
    unpacks it.

    `from_linear(linear, rounded=True)` computes a float32 layer as bfloat16 does, from half the
    bytes, with float32 inputs and results; the weight then reads, and is saved, as the rounded one.
    """

    packed_stock = nn.Linear

    @classmethod
    def from_linear(cls, linear: nn.Linear, rounded: bool = False) -> Linear:
        """A new layer that shares the bias of `linear`.

        Raises:
            TypeError, ValueError: not an nn.Linear, or a weight that cannot be packed.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is {type(linear).__name__}, but must be a torch.nn.Linear")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight = nn.Parameter(functional.pack_linear(linear.weight, rounded), False)
        new.register_parameter("bias", linear.bias)
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in_features]; see `lmfuse.functional.linear`."""
        weight = self.weight
        if type(weight) is PackedWeight:
            return functional.linear(input, weight, self.bias)
        return super().forward(input)

    def extra_repr(self) -> str:
        packed = ", packed" if isinstance(self.weight, PackedWeight) else ""
        return super().extra_repr() + packed


class Transposed(Packed):
    """transformers' Conv1D, a linear layer with a weight [in_features, out_features], packed."""

    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; see `lmfuse.functional.linear`."""
        weight: Any = self.weight
        if type(weight) is PackedTransposed:
            return functional.linear(x, weight, self.bias)  # type: ignore[arg-type]
        return super().forward(x)  # type: ignore[no-any-return]


class Embedding(Packed, nn.Embedding):
    """nn.Embedding that reads its rows out of the packed weight of the layer it is tied to.

    See `lmfuse.functional.weight_rows` for what that costs.
    """

    packed_stock = nn.Embedding


_made: dict[type[nn.Module], type[Packed]] = {}


def packed_class(stock: type[nn.Module]) -> type[Packed]:
    """The class of a packed module that was a `stock`: an nn.Linear, a class that computes as one,
    any sort of nn.Embedding, or, as all the others, a Conv1D."""
    for known in (Linear, Embedding):
        if known.packed_stock is stock:
            return known
    if stock not in _made:
        embeds = issubclass(stock, nn.Embedding)
        mixin = Linear if issubclass(stock, nn.Linear) else Packed if embeds else Transposed
        attributes = {"__module__": Packed.__module__, "packed_stock": stock}
        _made[stock] = type(f"Packed{stock.__name__}", (mixin, stock), attributes)
    return _made[stock]


def _new(stock: type[nn.Module]) -> Packed:
    kind = packed_class(stock)
    return kind.__new__(kind)


def packable(parameter: Tensor) -> bool:
    """Whether `pack_linear` takes it, and it is not yet packed."""
    return (
        not isinstance(parameter, PackedWeight)
        and parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and parameter.dim() == 2
        and parameter.numel() > 0
        and type(parameter) in (nn.Parameter, Tensor)
    )


def pack_parameter(
    parameter: Tensor, rounded: bool = False, transposed: bool = False
) -> nn.Parameter:
    """The packed weight, as a parameter that does not train."""
    packed = functional.pack_linear(parameter, rounded, transposed)
    return nn.Parameter(packed, requires_grad=False)
