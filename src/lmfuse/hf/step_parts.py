"""What a step of `generate` consists of, besides the layers, and whether one op can be all of it.

Which parts a model has is found out when it is joined, by trying (`find`); whether they are still
what they were, before the first step of each `generate` (`look`).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lmfuse import functional
from lmfuse.functional import PackedWeight
from lmfuse.hf import decoder, spies, swap
from lmfuse.hf.decoder_form import described_norm
from lmfuse.hf.norm import FusedLayerNorm, FusedNorm
from lmfuse.hf.rotary import FusedRotary
from lmfuse.modules.decoder import described_linear
from lmfuse.modules.parts import Parts
from lmfuse.quantization.embedding import QuantizedEmbedding

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
# What models do to the embedding or to the logits, with a number of their own.
_CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "times": operator.mul,
    "over": operator.truediv,
    "capped": lambda x, number: torch.tanh(x / number) * number,
}
# One of _CHANGES, the number, and where a model has this number.
Change: TypeAlias = "tuple[str, float, tuple[str, ...]]"


@dataclass(frozen=True)
class Form:
    """Where the parts of a model are: dotted names from the model on; and what is done between."""

    base: str
    embedding: str
    rotary: str | None  # None: layers look their angles up themselves
    layers: str
    norm: str
    head: str
    embedded: tuple[Change, ...] = ()
    logits: tuple[Change, ...] = ()
    # Kinds of layers by type and window, and for each what angles are made of besides positions.
    kinds: tuple[tuple[str | None, int | None], ...] = ()
    angles: tuple[tuple[str, ...], ...] = ()
    placed: bool = True  # whether anything but attention depends on where a token is
    positions: str | None = None  # an embedding whose rows are added to that of the token,
    first_position: int = 0  # from this one on; it is
    rows_of: type | None = None  # one of these
    embedding_norm: str | None = None  # of what the first layer reads


class StepParts:
    """The modules of a model with a form."""

    def __init__(self, model: nn.Module, form: Form, stack: decoder._Run) -> None:
        self.embedding = model.get_submodule(form.embedding)
        self.rotary = None if form.rotary is None else model.get_submodule(form.rotary)
        self.norm = model.get_submodule(form.norm)
        self.head = model.get_submodule(form.head)
        self.embedded = [(_CHANGES[how], number) for how, number, _ in form.embedded]
        self.logits = [(_CHANGES[how], number) for how, number, _ in form.logits]
        self.angles = form.angles
        self.positions = None if form.positions is None else _rows(model, form)
        name = form.embedding_norm
        self.embedding_norm = None if name is None else model.get_submodule(name)
        self.stack = stack
        self.ends = self._ends([(how, number) for how, number, _ in form.embedded])
        self.tables: tuple[list[Tensor], list[Tensor]] = [], []  # cos and sin for each kind

    def __call__(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any
    ) -> Tensor | None:
        """The logits [batch, 1, vocabulary] of what the forward of the model would give."""
        x = self.embedding(ids)
        for change, number in self.embedded:
            x = change(x, number)
        if self.positions is not None and positions is not None:
            if int(positions.max()) >= len(self.positions):
                return None  # of which the forward of the model says what is wrong
            x = x + nn.functional.embedding(positions, self.positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        angles: dict[tuple[str, ...], Any] = {}
        if self.rotary is not None:
            angles = {more: self.rotary(x, positions, *more) for more in set(self.angles)}
        each = {"attention_mask": mask, "position_ids": positions, self.stack.kinds[0].cache: cache}
        given = [{**each, "position_embeddings": angles.get(more)} for more in self.angles]
        y = self.stack(x, given)
        return None if y is None else self._changed(self.head(self.norm(y)))

    def whole(
        self, ids: Tensor, positions: Sequence[int], hidden: Sequence[int], cache: Any
    ) -> tuple[Tensor, Tensor] | None:
        """The same by one op, and the tokens of the largest logits; None if that cannot be.

        Args:
            positions: of the token of each row.
            hidden: of each row, how many of its first positions are padding.
        """
        if self.ends is None or not self._cover(max(positions)):
            return None
        found = self.stack.logits(ids, self.ends, hidden, cache, self.tables, positions)
        if found is None or not self.logits:
            return found
        logits = self._changed(found[0])
        return logits, functional.argmax(logits)

    def _changed(self, logits: Tensor) -> Tensor:
        for change, number in self.logits:
            logits = change(logits, number)
        return logits

    def _cover(self, last: int) -> bool:
        """Whether there are tables for all positions up to `last`."""
        if self.positions is not None and last >= len(self.positions):
            return False
        if not any(form.rotary_dim for form in self.stack.kinds):
            return True
        if self.tables[0] and last < len(self.tables[0][0]):
            return True
        dtype, rotary, self.tables = self.stack.dtype, self.rotary, ([], [])
        if rotary is None:
            sin, cos = self.stack.angles[0].chunk(2, -1)
            kinds = len(self.angles)
            self.tables = [cos.contiguous()] * kinds, [sin.contiguous()] * kinds
            return last < len(cos)
        if dtype is None or not isinstance(rotary, FusedRotary) or Parts([rotary]).watched():
            return False
        tables: tuple[list[Tensor], list[Tensor]] = [], []
        for more, form in zip(self.angles, self.stack.kinds, strict=True):
            found = rotary.tables(dtype, last, *more)
            width = 0 if found is None else found[0].shape[-1] * form.table_times
            if found is None or width != (form.rotary_dim or width):  # 0: of layers without RoPE
                return False
            for table, kept in zip(found, tables, strict=True):
                kept.append(table[:, :: form.table_step].contiguous())
        self.tables = tables
        return True

    def _ends(self, embedded: list[tuple[str, float]]) -> functional.DecoderEnds | None:
        """What is around the layers for the op; None if it is more, or looked at."""
        norm, head, dtype = self.norm, self.head, self.stack.dtype
        of_norm: Any = getattr(norm, "weight", None)
        if (
            dtype is None
            or Parts([self.embedding, norm, head]).watched()
            or not isinstance(norm, (FusedNorm, FusedLayerNorm))
            or not _added(self.positions, dtype)
            or (of_norm is None and isinstance(self.embedding, QuantizedEmbedding))
            or (of_norm is not None and of_norm.dtype is not dtype)
            or not decoder._runs(head)
            or (type(head.weight) is PackedWeight and not _exact(head.weight, dtype))
        ):
            return None
        table, scale = _table(self.embedding, dtype), _scale(self.embedding, dtype)
        if embedded and scale == 1.0 and embedded[0][0] == "times":
            scale = embedded[0][1]
        elif embedded:
            return None
        if table is None or scale is None:
            return None
        before = None
        if self.embedding_norm is not None:
            ours = isinstance(self.embedding_norm, (FusedNorm, FusedLayerNorm))
            if not ours or Parts([self.embedding_norm]).watched():
                return None
            before = described_norm(self.embedding_norm)
        return functional.DecoderEnds(
            table, described_norm(norm), described_linear(head), scale, self.positions, before
        )


def _rows(model: nn.Module, form: Form) -> Tensor:
    """Those that are added by position."""
    weight: Any = model.get_submodule(form.positions or "").weight
    rows: Tensor = weight.detach()[form.first_position :]
    return rows


def _added(rows: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the op can add these."""
    return rows is None or (rows.dtype is dtype and rows.is_cpu and rows.is_contiguous())


def _table(embedding: Any, dtype: torch.dtype) -> Any:
    """What the op reads rows of in place of `embedding`, or None."""
    if isinstance(embedding, QuantizedEmbedding):
        return embedding.weight if embedding.like.dtype is dtype else None
    weight: Any = getattr(embedding, "weight", None)
    if type(weight) is PackedWeight:
        return weight if _exact(weight, dtype) else None
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype is dtype and weight.is_cpu
    return weight if plain and weight.is_contiguous() else None


def _scale(embedding: Any, dtype: torch.dtype) -> float | None:
    """What `embedding` multiplies rows by; None if it does something else."""
    forward = type(embedding).forward
    if forward is QuantizedEmbedding.forward:
        return 1.0
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return None
    if forward is nn.Embedding.forward:
        return 1.0
    numbers = [b for b in embedding._buffers.values() if b is not None and b.numel() == 1]
    step = max(1, embedding.num_embeddings // 64)
    ids = torch.arange(0, embedding.num_embeddings, step)
    found, rows = embedding.forward(ids), nn.Embedding.forward(embedding, ids)
    scales = (float(number.to(dtype)) for number in numbers)
    return next((scale for scale in scales if torch.equal(rows * scale, found)), None)


def _exact(weight: PackedWeight, dtype: torch.dtype | None) -> bool:
    """Whether `weight` holds what it reads as, in this dtype."""
    return not weight.rounded and weight.dtype is dtype


def look(model: Any) -> StepParts | None:
    """The parts of a model as they are; None if its forward, or that of the base within, is
    replaced or looked at, or one of its numbers is another."""
    form: Form | None = model.fused_step
    if form is None or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    base: Any = model.get_submodule(form.base)
    called = form.embedding, form.rotary, form.layers, form.norm, form.embedding_norm
    inside = [model.get_submodule(name) for name in called if name is not None]
    others = [m for m in base.children() if all(m is not each for each in inside)]
    for module in (model, model.base_model, base, *others):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
    if form.positions and type(model.get_submodule(form.positions)) is not form.rows_of:
        return None
    owner: Any = next(k for k in type(base).__mro__ if "forward" in vars(k))
    forward = owner.forward
    own = forward.__module__ == owner.__module__
    layers: Any = model.get_submodule(form.layers)
    if not own or forward.__qualname__ != f"{owner.__qualname__}.forward":
        return None
    numbers = _numbers(model, base)
    for _, number, names in form.embedded + form.logits:
        if any(numbers.get(name) != number for name in names):
            return None
    most = getattr(base.config, "num_hidden_layers", None)
    if isinstance(most, int) and most < len(layers):
        return None  # of which the forward may leave out some
    run = decoder._run_of(layers, list(layers._modules.values()))
    return None if run is None or form.kinds != _kinds(run.kinds) else StepParts(model, form, run)


def _numbers(model: Any, base: Any) -> dict[str, float]:
    """The numbers of a model and its base, and those of the config, under their names."""
    held = {**vars(base.config), **vars(base), **vars(model)}
    return {name: x for name, x in held.items() if type(x) in (int, float) and x}


def find(model: Any) -> Form | None:
    """Where the parts of `model` are, if a step of it is these and little else."""
    base = getattr(model, "base_model", None)
    if base is None or base is model or swap.overrides(model) or swap.overrides(base):
        return None
    form = _named(model, base)
    if form is None:
        return None
    try:
        with torch.no_grad():
            return _tried(model, form)
    except Exception:  # it is foreign code
        return None


def _named(model: Any, base: nn.Module) -> Form | None:
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    if len(inside := list(base.children())) == 1:  # OPT: a base that holds a decoder alone
        base = inside[0]
    stack = [m for m in base.children() if isinstance(m, decoder.FusedStack)]
    norms = [base._modules[n] for n in _NORMS if base._modules.get(n) is not None]
    rotary = base._modules.get("rotary_emb")
    parts = (
        base,
        model.get_input_embeddings(),
        *(stack if len(stack) == 1 else [None]),
        *(norms if len(norms) == 1 else [None]),
        model.get_output_embeddings(),
    )
    if any(part not in names for part in parts):
        return None
    at, embedding, *rest = (names[part] for part in parts)
    return Form(at, embedding, None if rotary is None else names[rotary], *rest)


def _tried(model: Any, form: Form) -> Form | None:
    """The form with what is done between the embedding, the angles, the layers, the norm and the
    head; None if that is more."""
    stack: Any = model.get_submodule(form.layers)
    layers: list[Any] = list(stack._modules.values())
    told = spies.told(model, stack)
    if not told.unbroken(len(layers)):
        return None
    part = told.copy.get_submodule
    angles = _angles(None if form.rotary is None else part(form.rotary), layers, told)
    numbers = _numbers(model, model.get_submodule(form.base))
    embedded, form = _before(model, form, told, numbers)
    said = part(form.head).forward(part(form.norm).forward(told.made[-1]))
    last = _change(said, told.result.logits, numbers)
    if angles is None or embedded is None or last is None:
        return None
    forms = [layer.fused_form for layer in layers]
    kinds = _kinds([forms[first] for first in decoder._kinds(layers)[1]])
    turns = any(form.rotary_dim for form in forms)
    placed = turns or form.positions is not None
    form = replace(form, kinds=kinds, angles=angles, placed=placed)
    return replace(form, embedded=embedded, logits=last)


def _kinds(forms: list[Any]) -> tuple[tuple[str | None, int | None], ...]:
    """As `Form.kinds`, of the forms of layers of each kind."""
    return tuple((form.type, form.window) for form in forms)


def _angles(rotary: Any, layers: list[Any], told: spies.Told) -> tuple[tuple[str, ...], ...] | None:
    """What the angles of each kind of layer are made of besides positions; None if layers are told
    more than angles."""
    known = {"attention_mask", "position_embeddings", *decoder._KNOWN}
    kinds, firsts = decoder._kinds(layers)
    forms = [layer.fused_form for layer in layers]
    known |= {form.alibi[0] for form in forms if form.alibi is not None}
    own = all(form.angles for form in forms)  # angles, by position
    turns = any(form.rotary_dim for form in forms)
    if rotary is None and not own and turns:
        return None
    ours = rotary is not None and not own
    typed = ours and "layer_type" in inspect.signature(rotary.forward).parameters
    found = tuple((forms[first].type,) if typed else () for first in firsts)
    made = [(spies.POSITIONS,)] * len(found)
    if ours:
        made = [rotary.forward(told.inputs[0], spies.POSITIONS, *more) for more in found]
    for kind, kwargs in zip(kinds, told.kwargs, strict=True):
        if any(kwargs[k] is not None and kwargs[k] is not False for k in kwargs.keys() - known):
            return None
        given: Any = (kwargs.get("position_ids"),) if own else kwargs.get("position_embeddings")
        if turns and not (given and all(map(torch.equal, given, made[kind]))):
            return None
        if not _causal(kwargs.get("attention_mask"), forms[0].negated):
            return None
    return found


def _causal(mask: Tensor | None, negated: bool) -> bool:
    """Whether a mask of the spies' tokens hides nothing but what comes later."""
    count = spies.IDS.shape[1]
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    return mask is None or (negated and torch.equal(mask, later.expand(1, 1, -1, -1)))


def _before(
    model: Any, form: Form, told: spies.Told, numbers: dict[str, float]
) -> tuple[tuple[Change, ...] | None, Form]:
    """What is done to the embedding before the first layer; and the form, with the rows for
    positions and the norm that are part of it."""
    x, given = told.copy.get_submodule(form.embedding).forward(spies.IDS), told.inputs[0]
    for name, table in _inside(model, form, nn.Embedding):
        first = int(getattr(table, "offset", 0))
        size = table.num_embeddings, table.embedding_dim
        enough = size[0] > first + int(spies.POSITIONS.max()) and size[1] == x.shape[-1]
        if name == form.embedding or not enough or table.max_norm is not None:
            continue
        rows = nn.functional.embedding(spies.POSITIONS + first, table.weight)
        if not rows.any():
            return None, form  # which may be others later, and say nothing now
        if torch.equal(x + rows, given):
            of = type(table)
            return (), replace(form, positions=name, first_position=first, rows_of=of)
    for name, norm in _inside(model, form, (FusedNorm, FusedLayerNorm)):
        if name != form.norm and torch.equal(norm.forward(x), given):
            return (), replace(form, embedding_norm=name)
    return _change(x, given, numbers), form


def _inside(model: Any, form: Form, kinds: Any) -> list[tuple[str, Any]]:
    """What the base holds itself of these kinds, by name."""
    base: nn.Module = model.get_submodule(form.base)
    found = [(f"{form.base}.{name}", m) for name, m in base.named_children()]
    return [(name, m) for name, m in found if isinstance(m, kinds)]


def _change(x: Tensor, y: Tensor, numbers: dict[str, float]) -> tuple[Change, ...] | None:
    """What makes y of x, bit for bit; None if it is unknown."""
    if torch.equal(x, y):
        return ()
    for how, function in _CHANGES.items():
        for number in set(numbers.values()):
            if torch.equal(function(x, number), y):
                return ((how, number, tuple(n for n in numbers if numbers[n] == number)),)
    return None
