"""Packing the linear layers of a whole model in place, and unpacking them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from lmfuse.functional import PackedWeight
from lmfuse.modules.linear import Packed, pack_parameter, packable, packed_class
from lmfuse.modules.siblings import part_siblings

Owners = list[tuple[str, nn.Module, str]]  # name, module, and the attribute with the weight


@dataclass
class Packing:
    """What `pack_model` did: module name -> what it became, or why it stayed as it was."""

    packed: dict[str, str] = field(default_factory=dict)
    stock: dict[str, str] = field(default_factory=dict)


def pack_model(
    model: nn.Module, rounded: bool = False, keep: Callable[[Tensor], bool] | None = None
) -> Packing:
    """Makes each nn.Linear of `model` an `lmfuse.modules.Linear`, in place, layer by layer.

    The plain weight of a layer is gone before the next is packed: besides the model, the largest
    layer exists once more. Packing is as fast as the memory; a progress bar appears on a terminal
    after 2 s. A weight that several modules share is packed once and stays shared; where an
    embedding is among them, it reads its rows out of the packed weight. Modules keep their
    identity, names, attributes and hooks: they only change their class. Only nn.Linear itself is
    packed: what a subclass would do with its weight is not known.

    Args:
        model: any module. If packing fails half way, it is as before.
        rounded: compute float32 layers as bfloat16 (`lmfuse.functional.pack_linear`).
        keep: called with each weight that could be packed; True leaves it as it is.

    Returns:
        What was packed, and why the other linear layers were not.
    """
    done = Packing()
    groups = _shared(model)
    try:
        for owners in tqdm(groups, desc="packing", unit="layer", delay=2, disable=None):
            weight: Any = owners[0][1].weight
            against = _reason_against(owners) or (
                "torch's kernel is faster" if keep is not None and keep(weight) else None
            )
            if against is None:
                packed = pack_parameter(weight, rounded and weight.dtype is torch.float32)
                for _, module, _ in owners:
                    module.__class__ = packed_class(type(module))
                    module._parameters["weight"] = packed
            for name, module, _ in owners:
                if against is None:
                    done.packed[name] = "packed" if len(owners) == 1 else "packed, tied"
                elif isinstance(module, nn.Linear):
                    done.stock[name] = against
            del weight
    except BaseException:
        _unpack([model.get_submodule(name) for name in done.packed])
        raise
    return done


def unpack_model(model: nn.Module) -> None:
    """Gives each packed layer of `model` its stock class and its plain weight, bit for bit."""
    _unpack(model.modules())


def _unpack(modules: Iterable[nn.Module]) -> None:
    plain: dict[int, nn.Parameter] = {}
    alive: list[PackedWeight] = []  # so that no two have one id
    for module in modules:
        if not isinstance(module, Packed):
            continue
        part_siblings(module)
        weight = module.weight
        module.__class__ = type(module).packed_stock  # type: ignore[assignment]
        if isinstance(weight, PackedWeight):
            if id(weight) not in plain:
                plain[id(weight)] = nn.Parameter(weight.unpack(), requires_grad=False)
                alive.append(weight)
            module._parameters["weight"] = plain[id(weight)]


def _shared(model: nn.Module) -> list[Owners]:
    """The owners of each weight of a linear layer that is not packed yet, a linear layer first; no
    reference to the weight itself, so that it can be freed."""
    groups: dict[int, Owners] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, PackedWeight):
                groups.setdefault(id(parameter), []).append((name, module, attribute))
    ordered = (sorted(owners, key=lambda o: not _of_linear(o)) for owners in groups.values())
    return [owners for owners in ordered if _of_linear(owners[0])]


def _of_linear(owner: tuple[str, nn.Module, str]) -> bool:
    return isinstance(owner[1], nn.Linear) and owner[2] == "weight"


def _reason_against(owners: Owners) -> str | None:
    """Why the weight of these modules cannot be packed, or None."""
    weight: Any = owners[0][1].weight
    for name, module, attribute in owners:
        if type(module) is nn.Linear and attribute == "weight":
            if "forward" in vars(module):
                return f"the forward of {name} is replaced on the instance"
        elif not (isinstance(module, nn.Embedding) and module.max_norm is None):
            kind = type(module).__name__
            if len(owners) == 1:
                return f"{name} is {kind}, not torch.nn.Linear itself"
            return f"its weight is shared with {name}, a {kind}"
    if not packable(weight):
        return f"its weight is {tuple(weight.shape)}, {weight.dtype}, on {weight.device}"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has hooks"
    return None
