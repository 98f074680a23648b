"""Whole decoder layers in one call, over packed or quantized weights and caches.

What a step of a layer stores is rounded once to the dtype of the model, as the functions for the
single steps round it; sums and activations in between are fp32. A row has the same bits whether it
is decoded alone, in a batch or as part of a prompt, and whatever the number of threads. Inference
only: no backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check
from lmfuse.functional.decoder_layer import (
    DecoderLayer,
    DecoderLinear,
    DecoderNorm,
    layer_row,
    linear_row,
    norm_row,
    placing,
)
from lmfuse.functional.packed import PackedWeight
from lmfuse.functional.quantized import quantized_format

_decoder = ops.decoder.default
_logits = ops.decoder_logits.default
_open = ops.decoder_open.default
_close = ops.decoder_close.default
_open_ends = ops.decoder_open_ends.default
_close_ends = ops.decoder_close_ends.default
_open_caches = ops.decoder_open_caches.default
_close_caches = ops.decoder_close_caches.default


@dataclass(eq=False)
class DecoderStack:
    """Layers in the form in which the op reads them; made by `decoder_stack`.

    The parameters are looked at once, and again if their memory moves.

    Attributes:
        parameters: the weights, biases and norms of all layers.
        layout: int64, a row for each layer, which names its parameters by their place and has its
            sizes (csrc/ops/decoder_layers.h).
        numbers: float64, its epsilons and scales.
    """

    parameters: list[Tensor]
    layout: Tensor
    numbers: Tensor

    def __post_init__(self) -> None:
        with torch.no_grad():
            given = self.parameters, self.layout, self.numbers
            self._number: int = call(_open, *given, check=_check_stack)
        weakref.finalize(self, _close, self._number).atexit = False

    def __len__(self) -> int:
        return len(self.layout)


def decoder_stack(layers: Sequence[DecoderLayer]) -> DecoderStack:
    """Describes `layers` for `decoder`. What is written into their parameters counts.

    Raises:
        TypeError, ValueError: no layer, a weight that is neither packed nor quantized, an unknown
            activation, or a compute that does not suit the weight.
    """
    if not layers:
        raise ValueError("layers is empty, but must hold at least one layer")
    parameters: list[Tensor] = []
    rows = [layer_row(layer, parameters) for layer in layers]
    return DecoderStack(
        parameters,
        torch.tensor([integers for integers, _ in rows], dtype=torch.int64),
        torch.tensor([numbers for _, numbers in rows], dtype=torch.float64),
    )


class DecoderEnds:
    """What is around the layers: x = scale · embedding[ids], and logits = norm(y) W^T + bias.

    With positions and embedding_norm, x = embedding_norm(scale · embedding[ids] + positions[p]).

    Read once, as a stack.

    Args:
        embedding: [vocabulary, hidden]: a plain matrix, or the weight, packed or quantized, that a
            tied head holds. Its dtype, of a quantized one that of the norm, is that of x.
        norm: over the hidden size, or None.
        head: W, [vocabulary, hidden].
        scale: x is rounded before it is scaled, and after.
        positions: [positions, hidden], contiguous, of the dtype of x; x is rounded before it is
            added, and after.
        embedding_norm: over the hidden size; x is rounded before and after.

    Raises:
        TypeError, ValueError: a weight of the head that is neither packed nor quantized, a plain
            embedding that is not contiguous, or sizes that do not belong together.
    """

    def __init__(
        self,
        embedding: PackedWeight | Tensor,
        norm: DecoderNorm | None,
        head: DecoderLinear,
        scale: float = 1.0,
        positions: Tensor | None = None,
        embedding_norm: DecoderNorm | None = None,
    ) -> None:
        self.embedding, self.norm, self.head, self.scale = embedding, norm, head, scale
        self.vocabulary = _out_features(head.weight)
        parameters: list[Tensor] = []
        place = placing(parameters)
        integers, self.dtype = _embedding_row(embedding, norm, place)
        of_norm, numbers = norm_row(norm, place)
        of_embedding, more = norm_row(embedding_norm, place)
        rows = place(None if positions is None else _matrix("positions", positions))
        layout = [*integers, *of_norm, *linear_row("head", head, place), *of_embedding, rows]
        floats = torch.tensor([[*numbers, scale, *more]], dtype=torch.float64)
        given = parameters, torch.tensor([layout]), floats
        of_all = {
            "embedding": embedding,
            "the weight of norm": None if norm is None else norm.weight,
            "the bias of norm": None if norm is None else norm.bias,
            "the weight of head": head.weight,
            "the bias of head": head.bias,
            "the weight of embedding_norm": embedding_norm and embedding_norm.weight,
            "the bias of embedding_norm": embedding_norm and embedding_norm.bias,
            "positions": positions,
        }
        names = [name for name, x in of_all.items() if x is not None]
        with torch.no_grad():
            self._number: int = call(
                _open_ends, *given, check=lambda *_: _check_parameters(names, parameters)
            )
        weakref.finalize(self, _close_ends, self._number).atexit = False
        _ends[self._number] = self


def _embedding_row(
    embedding: PackedWeight | Tensor,
    norm: DecoderNorm | None,
    place: Callable[[Tensor | None], int],
) -> tuple[list[int], torch.dtype]:
    """The integers of an embedding, and the dtype of what it gives."""
    if isinstance(embedding, PackedWeight):
        return [0, place(embedding.packed), -1], embedding.packed_dtype
    if getattr(embedding, "dtype", None) is torch.uint8:
        weight = None if norm is None else norm.weight
        # 0: its rows are read as values, whatever a product computes in.
        return [0, place(embedding), 0], torch.float32 if weight is None else weight.dtype
    rows = place(_matrix("embedding", embedding))
    return [embedding.shape[1], rows, -1], embedding.dtype


def _matrix(name: str, x: Tensor) -> Tensor:
    """The elements of a contiguous matrix, row by row."""
    _check.held(name, x)
    if x.dim() != 2 or not x.is_contiguous() or not x.numel():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}, but must be a contiguous "
            "matrix"
        )
    return x.detach().view(-1)


# Those that live, for the fake, which is given their numbers.
_ends: weakref.WeakValueDictionary[int, DecoderEnds] = weakref.WeakValueDictionary()


def _out_features(weight: PackedWeight | Tensor) -> int:
    known = weight if isinstance(weight, PackedWeight) else quantized_format(weight)
    return known.out_features


class DecoderCaches:
    """Caches in the form in which the op reads them.

    They are looked at once, and again if their memory moves: a step that hands its caches over as
    tensors takes 0.1 ms longer, for 30 layers.

    Args:
        tensors: for each layer its keys and its values, [kv_heads, slots, head_dim], of the dtype
            of hidden_states; or int8, followed by their scales, float32 [kv_heads, slots].

    Raises:
        TypeError, ValueError: tensors that are nothing of the kind.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        with torch.no_grad():
            self._number: int = call(_open_caches, self.tensors, check=_check_caches)
        weakref.finalize(self, _close_caches, self._number).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:  # a copy is one of other tensors
        return DecoderCaches, (self.tensors,)


Each: TypeAlias = Tensor | Sequence[Tensor]  # one, or one for each kind of layer


def decoder(
    hidden_states: Tensor,
    stack: DecoderStack,
    caches: DecoderCaches | Sequence[Tensor],
    slots: Each,
    block_tables: Each,
    cu_seqlens: Each,
    cos: Each | None = None,
    sin: Each | None = None,
) -> Tensor:
    """The layers of `stack`, one after the other; see `DecoderLayer` for what each computes.

    Keys and values of the new tokens are written into the caches, and attention reads them there.
    Where layers are of several kinds, say with a window and without, each kind has slots, tables
    and angles of its own: sequences of tensors, in the order of `DecoderLayer.kind`.

    Args:
        hidden_states: [batch, tokens, hidden], of the dtype of the packed weights.
        stack: from `decoder_stack`. Attention has equal sizes in all layers, and so have mixtures;
            layers of a kind have one window.
        caches: `DecoderCaches`, or what they are made of.
        slots: [batch * tokens], int32 or int64: where the new tokens go, row by row.
        block_tables: [batch, at least the longest], int32 or int64: the slots of all keys that a
            row sees, the new ones included, in order.
        cu_seqlens: [batch + 1], int32 or int64: 0, and after each row the sum of the numbers of
            its keys. Query i of a row is at position keys - tokens + i, and sees nothing if that is
            negative (padding on the left).
        cos, sin: [batch or 1, tokens, width], 2 · width >= rotary_dim; None without RoPE.

    Returns:
        As hidden_states.

    Raises:
        TypeError, ValueError: sizes or dtypes that do not belong together, or a gradient is asked
            for; nothing is written.
    """
    if torch.is_grad_enabled():
        if hidden_states.requires_grad:
            raise ValueError(
                "hidden_states requires grad, but decoder has no backward: lmfuse is for "
                "inference. Run the forward under torch.no_grad()"
            )
        with torch.no_grad():
            return decoder(hidden_states, stack, caches, slots, block_tables, cu_seqlens, cos, sin)
    if isinstance(slots, Tensor):
        rows: Any = [slots, block_tables, cu_seqlens]
        angles: Any = [] if cos is None or sin is None else [cos, sin]
    else:
        rows = _joined(slots=slots, block_tables=block_tables, cu_seqlens=cu_seqlens)
        angles = [] if cos is None or sin is None else _joined(cos=cos, sin=sin)
    held = _caches(caches)
    args = (hidden_states, stack._number, held._number, rows, angles)
    result: Tensor = call(_decoder, *args, check=_check_decoder)
    return result


def decoder_logits(
    input_ids: Tensor,
    ends: DecoderEnds,
    stack: DecoderStack,
    caches: DecoderCaches | Sequence[Tensor],
    tables: Sequence[Tensor],
    columns: Sequence[int],
    cos: Sequence[Tensor] = (),
    sin: Sequence[Tensor] = (),
    positions: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """A whole model: from tokens to logits, `decoder` between the two of `ends`.

    Made for steps of generation: one thread reads the embedding, and all tokens get logits.

    Args:
        input_ids: [batch, tokens] int64.
        ends, stack: of one dtype.
        caches: as in `decoder`.
        tables: [batch, width], int32 or int64, for each kind of layer: the slots of a row's keys,
            in order.
        columns: for each kind 1 + batch numbers: e, then b of each row. The row sees the columns
            [b, e) of its table, and its new tokens go into the last of them.
        cos, sin: for each kind [batch or 1, tokens, width]; with positions [positions, width].
        positions: of the first token of each row, or none: which row of cos and sin, and of the
            positions of `ends`, it takes; its next token takes the next.

    Returns:
        logits [batch, tokens, vocabulary], of the dtype of `ends`, and `argmax` of these.

    Raises:
        TypeError, ValueError: as `decoder`; a token, a column or a position that there is not.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            given = caches, tables, columns, cos, sin, positions
            return decoder_logits(input_ids, ends, stack, *given)
    held = _caches(caches)
    numbers = stack._number, ends._number, held._number
    args = (input_ids, *numbers, [*tables], [*columns], [*cos, *sin], [*positions])
    result: tuple[Tensor, Tensor] = call(_logits, *args, check=_check_logits)
    return result


def _caches(caches: DecoderCaches | Sequence[Tensor]) -> DecoderCaches:
    return caches if isinstance(caches, DecoderCaches) else DecoderCaches(caches)


def _joined(**given: Any) -> list[Tensor]:
    """Those of all kinds, the first argument of each first."""
    count = None
    for name, each in given.items():
        if not isinstance(each, (list, tuple)):
            raise TypeError(
                f"{name} is {type(each).__name__}, but must be a tensor for layers of one kind, or "
                "a list with one for each kind"
            )
        count = len(each) if count is None else count
        if len(each) != count:
            raise ValueError(f"{name} has {len(each)} tensors, but {next(iter(given))} {count}")
    return [x for each in given.values() for x in each]


def _check_stack(parameters: list[Tensor], layout: Tensor, numbers: Tensor) -> None:
    names = [f"parameters[{i}]" for i in range(len(parameters))]
    _check_parameters(names, parameters)
    _check.held("layout", layout, (torch.int64,))
    _check.held("numbers", numbers, (torch.float64,))


def _check_parameters(names: Sequence[str], parameters: list[Tensor]) -> None:
    for name, x in zip(names, parameters, strict=True):
        _check.held(name, x, (*_check.FLOATS, torch.uint8))
        if x.dim() != 1 or not x.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and strides {x.stride()}, but must have one "
                "dimension and be contiguous"
            )


def _check_caches(tensors: list[Tensor]) -> None:
    if not tensors:
        raise ValueError("caches is empty, but must hold at least two tensors")
    first = _check.held("caches[0]", tensors[0])
    each = 4 if first.dtype is torch.int8 else 2
    if len(tensors) % each:
        raise ValueError(
            "caches must be two tensors for each layer, or four with the scales of int8, but "
            f"there are {len(tensors)}"
        )
    if first.dim() != 3:
        raise ValueError(
            f"caches[0] has shape {tuple(first.shape)}, but must be [kv_heads, slots, head_dim]"
        )
    kinds = (*_check.FLOATS, torch.int8) if each == 2 else (torch.int8,)
    heads, _, dim = first.shape
    for i, x in enumerate(tensors):
        name, scales = f"caches[{i}]", i % each > 1
        _check.held(name, x, (torch.float32,) if scales else kinds)
        want = tensors[i - 2].shape[:2] if scales else (heads, *x.shape[1:2], dim)
        if tuple(x.shape) != tuple(want):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but must have {tuple(want)}")
        if not scales and dim > 1 and x.stride(2) != 1:
            raise ValueError(
                f"{name} must have contiguous rows, but the stride of its last dimension is "
                f"{x.stride(2)}"
            )
        if x.dtype is not (torch.float32 if scales else first.dtype):
            raise TypeError(f"{name} is {x.dtype}, but must be {first.dtype}, as caches[0]")


def _check_decoder(
    hidden_states: Tensor, stack: int, caches: int, rows: list[Tensor], angles: list[Tensor]
) -> None:
    _check.tensor("hidden_states", hidden_states)
    if hidden_states.dim() != 3 or not hidden_states.numel():
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}, but must be [batch, tokens, "
            "hidden], and not empty"
        )
    names = [n for n in ("slots", "block_tables", "cu_seqlens") for _ in range(len(rows) // 3)]
    for name, x in zip(names, rows, strict=True):
        _check_rows(name, x, 2 if name == "block_tables" else 1)
    _check_angles(angles, hidden_states.shape[:2], False)


def _check_logits(
    input_ids: Tensor,
    stack: int,
    ends: int,
    caches: int,
    tables: list[Tensor],
    columns: list[int],
    angles: list[Tensor],
    positions: list[int],
) -> None:
    if _check.held("input_ids", input_ids, (torch.int64,)).dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, but must be [batch, tokens], and not "
            "empty"
        )
    for x in tables:
        _check_rows("tables", x, 2)
    for name, numbers in (("columns", columns), ("positions", positions)):
        for number in numbers:
            if type(number) is not int:
                raise TypeError(f"{name} has {type(number).__name__}, but must have int")
    if len(positions) not in (0, len(input_ids)):
        raise ValueError(f"there are {len(positions)} positions for {len(input_ids)} rows")
    _check_angles(angles, input_ids.shape, bool(positions))


def _check_rows(name: str, x: Tensor, dims: int) -> None:
    if _check.held(name, x, (torch.int32, torch.int64)).dim() != dims:
        raise ValueError(f"{name} has {x.dim()} dimensions, but must have {dims}")


def _check_angles(angles: list[Tensor], shape: Sequence[int], by_position: bool) -> None:
    """cos and sin for tokens of this shape, [batch, tokens]."""
    batch, tokens = shape
    kinds = len(angles) // 2
    for i, table in enumerate(angles):
        name = "cos" if i < kinds else "sin"
        _check.tensor(name, _check.held(name, table))
        rows = tuple(table.shape[:-1])
        if by_position and len(rows) != 1:
            raise ValueError(f"{name} has shape {tuple(table.shape)}, but must be [rows, width]")
        if not by_position and rows not in ((1, tokens), (batch, tokens)):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}, but must be [1 or {batch}, {tokens}, "
                "width]"
            )
    for c, s in zip(angles[:kinds], angles[kinds:], strict=True):
        if c.shape != s.shape or c.dtype != s.dtype:
            raise ValueError(
                f"sin has shape {tuple(s.shape)} and {s.dtype}, but must have those of cos, "
                f"{tuple(c.shape)} and {c.dtype}"
            )


@register_fake("decoder")
def _(hidden_states: Tensor, *args: object) -> Tensor:
    _check.tensor("hidden_states", hidden_states)
    return hidden_states.new_empty(hidden_states.shape)


@register_fake("decoder_logits")
def _(input_ids: Tensor, stack: int, ends: int, *args: object) -> tuple[Tensor, Tensor]:
    around = _ends[ends]
    logits = input_ids.new_empty((*input_ids.shape, around.vocabulary), dtype=around.dtype)
    return logits, torch.empty_like(input_ids)
