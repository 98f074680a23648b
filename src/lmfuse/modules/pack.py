"""Packing the linear layers of a whole model in place, and unpacking them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from lmfuse.functional import PackedWeight
from lmfuse.modules.experts import MADE, packed_kind
from lmfuse.modules.linear import Packed, packable, packed_class
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
    experts: Mapping[str, str] | None = None,
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
        experts: modules to pack as `lmfuse.modules.experts.Experts`, name -> activation.

    Returns:
        What was packed, and why the other linear layers were not.
    """
    done = Packing()
    jobs = [partial(_pack_linear, owners, alike) for owners in _shared(model, alike)]
    jobs += [partial(_pack_experts, model, name, act) for name, act in (experts or {}).items()]
    try:
        for job in tqdm(jobs, desc="packing", unit="layer", delay=2, disable=None):
            job(done, rounded, keep)
    except BaseException:
        _unpack([model.get_submodule(name) for name in done.packed])
        raise
    return done


def _pack_linear(
    owners: Owners,
    alike: Container[type[nn.Module]],
    done: Packing,
    rounded: bool,
    keep: Callable[[Tensor], bool] | None,
) -> None:
    """Packs the weight that `owners` share, and writes into `done` that, or why not."""
    weight: Any = owners[0][1].weight
    against = _reason_against(owners, alike)
    if against is None and keep is not None and keep(weight):
        against = "torch's kernel is faster"
    if against is not None:
        done.stock.update((n, against) for n, m, _ in owners if not isinstance(m, nn.Embedding))
        return
    kinds = [packed_class(type(module)) for _, module, _ in owners]
    packed = kinds[0].packed("weight", weight, rounded and weight.dtype is torch.float32)
    for (name, module, _), kind in zip(owners, kinds, strict=True):
        module.__class__ = kind
        module._parameters["weight"] = packed
        done.packed[name] = "packed" if len(owners) == 1 else "packed, tied"


def _pack_experts(
    model: nn.Module, name: str, act: str, done: Packing, rounded: bool, keep: object
) -> None:
    """Packs the experts called `name`, one parameter after the other."""
    module: Any = model.get_submodule(name)
    done.packed[name] = f"experts, {act}"
    module.__class__ = packed_class(type(module), packed_kind(act))
    module.experts_act = act
    for parameter in module.packed_names:
        plain = module._parameters[parameter]
        rounds = rounded and plain.dtype is torch.float32
        module._parameters[parameter] = module.packed(parameter, plain, rounds)


def unpack_model(model: nn.Module) -> None:
    """Gives each packed layer of `model` its stock class and its plain weight, bit for bit."""
    _unpack(model.modules())


def _unpack(modules: Iterable[nn.Module]) -> None:
    plain: dict[int, nn.Parameter] = {}
    alive: list[PackedWeight] = []  # so that no two have one id
    for module in modules:
        part_siblings(module)
        if not isinstance(module, Packed):
            continue
        names = module.packed_names
        module.__class__ = type(module).packed_stock  # type: ignore[assignment]
        for name in ("experts_act", MADE):
            vars(module).pop(name, None)
        for name in names:
            weight = module._parameters[name]
            if isinstance(weight, PackedWeight):
                if id(weight) not in plain:
                    plain[id(weight)] = nn.Parameter(weight.unpack(), requires_grad=False)
                    alive.append(weight)
                module._parameters[name] = plain[id(weight)]


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
