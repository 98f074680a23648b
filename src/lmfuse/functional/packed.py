"""`PackedWeight`: the weight of a linear layer, in the layout that the kernels read.

To its owner it is a tensor [out_features, in_features] of the public dtype: a parameter that
counts, moves, copies and loads like any other. Its bytes are there once, packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check

_pack = ops.linear_pack.default
_unpack = ops.linear_unpack.default
_rows = ops.linear_rows.default


class PackedWeight(Tensor):
    """A weight [n, k] whose bytes are packed; made by `pack_linear`.

    `torch.nn.functional.linear` and `embedding` compute with the packed bytes. Any other operation
    works too, at the cost of unpacking (and, if it writes, of packing again) the whole weight: its
    speed is about that of a copy. What would be a view of another tensor is a copy here, so
    `weight[0].mul_(2)` does not change the weight; `weight[0] *= 2`, `weight.mul_(2)` do.

    Attributes:
        packed: the bytes, a tensor of uint8: a header and the panels (csrc/kernels/kernels.h).
        out_features, in_features: n and k.
        public_dtype: what `dtype` says.
        packed_dtype: that of the bytes; the same, or bfloat16 under float32 (`rounded`).
    """

    packed: Tensor
    out_features: int
    in_features: int
    public_dtype: torch.dtype
    packed_dtype: torch.dtype
    _seen: tuple[weakref.ref[Tensor], int, int] | None

    @staticmethod
    def __new__(
        cls, packed: Tensor, n: int, k: int, dtype: torch.dtype, packed_dtype: torch.dtype
    ) -> PackedWeight:
        return Tensor._make_wrapper_subclass(
            cls, cls._shape(packed, n, k), dtype=dtype, device=packed.device, storage_size=0
        )

    def __init__(
        self, packed: Tensor, n: int, k: int, dtype: torch.dtype, packed_dtype: torch.dtype
    ) -> None:
        self.packed = packed
        self.out_features, self.in_features = n, k
        self.public_dtype, self.packed_dtype = dtype, packed_dtype
        self._seen = None

    def unpack(self) -> Tensor:
        """The weight as an ordinary tensor, exactly what was packed.

        While a copy that was handed out before is alive and unchanged, the same one is returned, so
        that two tied parameters of a state_dict share memory as they do in the model.
        """
        if self._seen is not None:
            plain = self._seen[0]()
            if plain is not None and (_version(plain), _version(self.packed)) == self._seen[1:]:
                return plain
        plain = self._plain()
        self._seen = (weakref.ref(plain), _version(plain), _version(self.packed))
        return plain

    @staticmethod
    def _shape(packed: Tensor, n: int, k: int) -> tuple[int, ...]:
        """What its owner sees of it."""
        return n, k

    def _matrix(self, plain: Tensor) -> Tensor:
        """A tensor of the shape that the owner sees, as what is packed."""
        return plain

    def _plain(self) -> Tensor:
        """What is packed, as a tensor of the shape that the owner sees."""
        return _unpacked(self.packed, self)

    def _meta(self) -> tuple[Any, ...]:
        """What a new one is made of besides the bytes."""
        return self.out_features, self.in_features, self.public_dtype, self.packed_dtype

    def _with(self, packed: Tensor) -> PackedWeight:
        return type(self)(packed, *self._meta())

    def _again(self, plain: Tensor) -> PackedWeight:
        """`plain`, of the shape that the owner sees, packed in the same way, and not rounded."""
        return self._of(plain, False, *self._meta()[4:])

    @classmethod
    def _of(cls, plain: Tensor, rounded: bool, *more: Any) -> PackedWeight:
        return pack_linear(plain, rounded)

    @property
    def rounded(self) -> bool:
        """Whether the bytes are bfloat16 under a public float32."""
        return self.packed_dtype is not self.public_dtype

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.out_features}, {self.in_features}, dtype={self.public_dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        if id(self) not in memo:
            new = self._with(self.packed.clone())
            if getattr(self, "_is_param", False):
                new = cast(PackedWeight, torch.nn.Parameter(new, requires_grad=False))
            memo[id(self)] = new
        return cast(PackedWeight, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled as the plain weight: what a file of another version says about packed bytes is
        # nothing to build on.
        plain, is_parameter = self.unpack(), getattr(self, "_is_param", False)
        return _packed_again, (plain, is_parameter, self.rounded, type(self), *self._meta()[4:])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["packed"], self._meta()

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], meta: tuple[Any, ...], size: Any, stride: Any
    ) -> PackedWeight:
        return cls(inner["packed"], *meta)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _FUNCTIONS.get(func)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _OPS.get(func)
        if rule is not None and isinstance(args[0], PackedWeight):
            result = rule(args[0], *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        return _through_plain(func, args, kwargs)


class PackedTransposed(PackedWeight):
    """As `PackedWeight`, but its owner sees [k, n], as in transformers' Conv1D."""

    @staticmethod
    def _shape(packed: Tensor, n: int, k: int) -> tuple[int, ...]:
        return k, n

    @classmethod
    def _of(cls, plain: Tensor, rounded: bool, *more: Any) -> PackedWeight:
        return pack_linear(plain, rounded, transposed=True)

    def _matrix(self, plain: Tensor) -> Tensor:
        return plain.t()

    def _plain(self) -> Tensor:
        return super()._plain().t().contiguous()


def is_matrix(weight: object) -> TypeGuard[PackedWeight]:
    """Whether it is what `pack_linear` returns."""
    return type(weight) in (PackedWeight, PackedTransposed)


def pack_linear(weight: Tensor, rounded: bool = False, transposed: bool = False) -> PackedWeight:
    """The weight of a linear layer, packed; `.unpack()` gives it back exactly.

    The layout depends on the dtype alone: not on the number of threads, nor on the instruction set.

    Args:
        weight: [n, k], float32, bfloat16 or float16, of any strides and alignment.
        rounded: round a float32 weight to bfloat16. It still appears as float32 (with the rounded
            values), and so do inputs and results of its layer, but it computes as bfloat16 does.
        transposed: the weight is [k, n], and stays so to its owner.

    Raises:
        TypeError, ValueError: a weight that cannot be packed; see the text of the error.
    """
    _check.tensor("weight", weight)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but must have two dimensions, neither empty"
        )
    if weight.is_meta:
        raise ValueError("weight is on meta, without data: load the model before it is packed")
    if rounded and weight.dtype is not torch.float32:
        raise TypeError(f"rounded is for a float32 weight, but weight is {weight.dtype}")
    if isinstance(weight, PackedWeight):
        weight = weight.unpack()
    plain = weight.detach()
    n, k = reversed(plain.shape) if transposed else plain.shape
    packed = _pack_bytes(plain.t() if transposed else plain, rounded)
    made = PackedTransposed if transposed else PackedWeight
    return made(packed, n, k, plain.dtype, torch.bfloat16 if rounded else plain.dtype)


def weight_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """weight[rows]: what an embedding tied to a linear layer reads.

    Args:
        weight: [n, k], packed. Each row touches every cache line of its panel in which it has a
            word: 16 times the bytes of the row in bfloat16, some 10 us a token for k = 2048.
        rows: integers in [0, n), of any shape.

    Returns:
        [*rows.shape, k], in the dtype of weight.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    _check_packed("weight", weight)
    _check.integers("rows", rows)
    result = cast(
        Tensor, call(_rows, weight.packed, rows.long(), weight.in_features, weight.packed_dtype)
    )
    return result.to(weight.public_dtype)


def alike(a: PackedWeight, b: PackedWeight) -> bool:
    """Whether the two can be multiplied in one walk: equal in_features and dtypes."""
    return (
        a.in_features == b.in_features
        and a.public_dtype is b.public_dtype
        and a.packed_dtype is b.packed_dtype
    )


def _check_packed(name: str, weight: object) -> None:
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"{name} is {type(weight).__name__}, but must come from pack_linear")


def _pack_bytes(matrix: Tensor, rounded: bool) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, call(_pack, matrix.bfloat16() if rounded else matrix))


def _unpacked(packed: Tensor, like: PackedWeight) -> Tensor:
    n, k, dtype, packed_dtype = like._meta()[:4]
    with torch.no_grad():
        return cast(Tensor, call(_unpack, packed, n, k, packed_dtype)).to(dtype)


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; -1 for an inference tensor, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _packed_again(
    plain: Tensor,
    is_parameter: bool,
    rounded: bool,
    kind: type[PackedWeight] = PackedWeight,
    *more: Any,
) -> PackedWeight:
    weight = kind._of(plain, rounded, *more)
    if is_parameter:
        return cast(PackedWeight, torch.nn.Parameter(weight, requires_grad=False))
    return weight


def _through_plain(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` on unpacked weights; those that it wrote to are packed again."""
    written: list[tuple[PackedWeight, Tensor]] = []
    schema = func._schema.arguments
    writes = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    values = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}

    def plain(weight: PackedWeight) -> Tensor:
        for packed, unpacked in written:
            if packed is weight:
                return unpacked
        return weight.unpack()

    for name in writes:
        if isinstance(values.get(name), PackedWeight):
            written.append((values[name], values[name]._plain()))
    args, kwargs = tree_map_only(PackedWeight, plain, (args, kwargs))
    result = func(*args, **kwargs)
    for weight, unpacked in written:
        if unpacked.shape != weight.shape:
            raise RuntimeError(f"{func} would give a packed weight another shape")
        packed = _pack_bytes(weight._matrix(unpacked), weight.rounded)
        weight.packed.copy_(packed.view_as(weight.packed))
        if not weight.packed.is_inference():
            increment_version(weight.packed)  # what is written below the dispatcher does not count
        if result is unpacked:
            result = weight
    return result


def _to_copy(weight: PackedWeight, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype") or weight.public_dtype
    device = torch.device(kwargs.get("device") or weight.device)
    if dtype is weight.public_dtype and device.type in ("cpu", "meta"):
        return weight._with(weight.packed.to(device, copy=True))
    if dtype in _check.FLOATS and device.type == weight.device.type == "cpu":
        return weight._again(weight._plain().to(dtype))
    return NotImplemented


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Tensor:
    if type(weight) is not PackedWeight or max_norm is not None:
        raise NotImplementedError("max_norm would change the packed weight: lmfuse.restore it")
    return weight_rows(weight, input)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from lmfuse.functional.linear import linear

    if type(weight) is not PackedWeight:
        raise TypeError("input and bias of a linear layer cannot be packed weights")
    return linear(input, weight, bias)


def _set_data(weight: PackedWeight, value: Tensor) -> None:
    """`weight.data = value`, of any shape: foreign code, as of transformers when it resizes
    embeddings, and Module.to with a dtype that cannot be packed."""
    new = value if isinstance(value, PackedWeight) else weight._again(value)
    if new._meta() == weight._meta():
        weight.packed = new.packed
        return
    if getattr(weight, "_is_param", False):
        new = cast(PackedWeight, torch.nn.Parameter(new, requires_grad=False))
    torch.utils.swap_tensors(weight, new)  # type: ignore[no-untyped-call]


def _set_items(weight: Tensor, index: Any, value: Any) -> None:
    index, value = tree_map_only(PackedWeight, PackedWeight.unpack, (index, value))
    if not isinstance(weight, PackedWeight):
        weight[index] = value
        return
    plain = weight._plain()
    plain[index] = value
    weight.copy_(plain)


def _share_memory(weight: PackedWeight) -> PackedWeight:
    weight.packed.share_memory_()  # type: ignore[no-untyped-call]
    return weight


def _on_plain(func: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weight, *args, **kwargs: func(weight.unpack(), *args, **kwargs)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.__setitem__: _set_items,
    Tensor.share_memory_: _share_memory,
}
# What reads memory without an operation of torch's dispatcher in between.
for _read in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
    _FUNCTIONS[_read] = _on_plain(_read)

_aten = torch.ops.aten
_OPS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda weight: weight._with(weight.packed),
    _aten.alias.default: lambda weight: weight._with(weight.packed),
    _aten.clone.default: lambda weight, **_: weight._with(weight.packed.clone()),
    _aten._to_copy.default: _to_copy,
}


def _packed_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    if dtype is torch.bfloat16:
        k = (k + 31) // 32 * 32
    return 64 + (n + 31) // 32 * 32 * k * dtype.itemsize


@register_fake("linear_pack")
def _(weight: Tensor) -> Tensor:
    n, k = weight.shape
    size = _packed_bytes(n, k, weight.dtype)
    return weight.new_empty((size,), dtype=torch.uint8)


@register_fake("linear_unpack")
def _(packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=dtype)


@register_fake("linear_rows")
def _(weight: Tensor, rows: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*rows.shape, in_features), dtype=dtype)
