"""Packing the linear layers of a whole model in place, and unpacking them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
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
    model: nn.Module,
    rounded: bool = False,
    keep: Callable[[Tensor], bool] | None = None,
    alike: Container[type[nn.Module]] = (),
) -> Packing:
    """Makes each nn.Linear of `model` an `lmfuse.modules.Linear`, in place, layer by layer.

    The plain weight of a layer is gone before the next is packed: besides the model, the largest
    layer exists once more. Packing is as fast as the memory; a progress bar appears on a terminal
    after 2 s. A weight that several modules share is packed once and stays shared; where an
    embedding is among them, it reads its rows out of the packed weight. Modules keep their
    identity, names, attributes and hooks: they only change their class. Of subclasses of nn.Linear
    it is not known what they do with their weight: they stay as they are, unless `alike` has them.

    Args:
        model: any module. If packing fails half way, it is as before.
        rounded: compute float32 layers as bfloat16 (`lmfuse.functional.pack_linear`).
        keep: called with each weight that could be packed; True leaves it as it is.
        alike: further classes of linear layers: subclasses of nn.Linear that compute what it does,
            and such as transformers' Conv1D, which do so with the transposed weight.

    Returns:
        What was packed, and why the other linear layers were not.
    """
    done = Packing()
    groups = _shared(model, alike)
    try:
        for owners in tqdm(groups, desc="packing", unit="layer", delay=2, disable=None):
            weight: Any = owners[0][1].weight
            against = _reason_against(owners, alike) or (
                "torch's kernel is faster" if keep is not None and keep(weight) else None
            )
            if against is None:
                kinds = [packed_class(type(module)) for _, module, _ in owners]
                rounds = rounded and weight.dtype is torch.float32
                packed = pack_parameter(weight, rounds, kinds[0].transposed)
                for (_, module, _), kind in zip(owners, kinds, strict=True):
                    module.__class__ = kind
                    module._parameters["weight"] = packed
            for name, module, _ in owners:
                if against is None:
                    done.packed[name] = "packed" if len(owners) == 1 else "packed, tied"
                elif not isinstance(module, nn.Embedding):
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


def _shared(model: nn.Module, alike: Container[type[nn.Module]]) -> list[Owners]:
    """The owners of each weight of a linear layer that is not packed yet, a linear layer first; no
    reference to the weight itself, so that it can be freed."""
    groups: dict[int, Owners] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, PackedWeight):
                groups.setdefault(id(parameter), []).append((name, module, attribute))

    def of_linear(owner: tuple[str, nn.Module, str]) -> bool:
        _, module, attribute = owner
        return attribute == "weight" and (isinstance(module, nn.Linear) or type(module) in alike)

    ordered = (sorted(owners, key=lambda o: not of_linear(o)) for owners in groups.values())
    return [owners for owners in ordered if of_linear(owners[0])]


def _reason_against(owners: Owners, alike: Container[type[nn.Module]]) -> str | None:
    """Why the weight of these modules cannot be packed, or None."""
    weight: Any = owners[0][1].weight
    for name, module, attribute in owners:
        if attribute == "weight" and (type(module) is nn.Linear or type(module) in alike):
            if "forward" in vars(module):
                return f"the forward of {name} is replaced on the instance"
            if not isinstance(module, nn.Linear) and len(owners) > 1:
                return f"its weight is shared with {name}, a {type(module).__name__}"
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
