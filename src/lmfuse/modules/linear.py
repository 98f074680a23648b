"""`Linear`: nn.Linear with a packed weight; `Embedding`: one that shares it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import PackedWeight
from lmfuse.functional.packed import PackedTransposed


class Packed(nn.Module):
    """Mixin of modules of which some parameters, `weight` or others, are a `PackedWeight`.

    The parameter has the public shape and dtype, so `parameters()`, `num_parameters()`, `dtype`,
    `to()`, `deepcopy` and `load_state_dict` see what they saw before packing; a state_dict holds
    plain tensors. A plain weight that is assigned is packed; one that cannot be (on another device,
    of another dtype) stays plain, and the module then computes as torch does.
    """

    # What the module was, and is again after `unpack_model`. Names that no module has: class
    # attributes hide parameters.
    packed_stock: type[nn.Module]
    packed_mixin: type[Packed] | None = None
    packed_names: tuple[str, ...] = ("weight",)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, but some of ours are made on the fly.
        kind = type(self)
        return _new, (kind.packed_stock, kind.packed_mixin), self.__dict__

    @classmethod
    def packed(cls, name: str, plain: Tensor, rounded: bool = False) -> nn.Parameter:
        """The parameter `name`, packed; it does not train."""
        return nn.Parameter(functional.pack_linear(plain, rounded), requires_grad=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch, but packs a weight."""
        if name in self.packed_names and param is not None and packable(param):
            param = self.packed(name, param)
        super().register_parameter(name, param)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_names:
            weight = self._parameters[name]
            if not keep_vars and isinstance(weight, PackedWeight):
                destination[prefix + name] = weight.unpack()


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

    @classmethod
    def packed(cls, name: str, plain: Tensor, rounded: bool = False) -> nn.Parameter:
        """The parameter `name`, packed; it does not train."""
        packed = functional.pack_linear(plain, rounded, transposed=True)
        return nn.Parameter(packed, requires_grad=False)

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


_made: dict[tuple[type[Packed], type[nn.Module]], type[Packed]] = {}


def packed_class(stock: type[nn.Module], mixin: type[Packed] | None = None) -> type[Packed]:
    """The class of a packed module that was a `stock`: an nn.Linear, a class that computes as one,
    any sort of nn.Embedding, what `mixin` is for, or, as all the others, a Conv1D."""
    for known in (Linear, Embedding):
        if known.packed_stock is stock:
            return known
    if mixin is None:
        embeds = issubclass(stock, nn.Embedding)
        mixin = Linear if issubclass(stock, nn.Linear) else Packed if embeds else Transposed
    key = (mixin, stock)
    if key not in _made:
        attributes = {
            "__module__": Packed.__module__,
            "packed_stock": stock,
            "packed_mixin": mixin,
        }
        _made[key] = type(f"Packed{stock.__name__}", key, attributes)
    return _made[key]


def _new(stock: type[nn.Module], mixin: type[Packed] | None) -> Packed:
    kind = packed_class(stock, mixin)
    return kind.__new__(kind)


def packable(parameter: Tensor) -> bool:
    """Whether it can be packed, and is not yet."""
    return (
        not isinstance(parameter, PackedWeight)
        and parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and parameter.dim() in (2, 3)
        and parameter.numel() > 0
        and type(parameter) in (nn.Parameter, Tensor)
    )
