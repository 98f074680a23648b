"""What takes the place of a tensor or a number in a call that is right, and what must come of it.

Either an exception that names an argument, or the right answer. A crash ends the process; any error
but TypeError and ValueError fails the test, for it comes from somewhere deep inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Call = tuple[Callable[..., Any], Callable[[], Arguments]]  # a function, and what makes arguments


def _strided(x: Tensor, strides: Callable[[int, int], int]) -> Tensor:
    pairs = zip(x.shape, x.stride(), strict=True)
    return x.as_strided(x.shape, [strides(size, stride) for size, stride in pairs])


def _every_other(x: Tensor) -> Tensor:
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _reversed(x: Tensor) -> Tensor:
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x) if x.dtype in (torch.float32, torch.int64, torch.int32) else x


# The same numbers in other clothes: the same result, or a refusal in words.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf that requires grad": lambda x: (
        x.clone().requires_grad_() if x.is_floating_point() else x
    ),
    "a view that negates": _negated,
    "every other element": _every_other,
    "columns first": _reversed,
    "huge strides where a size is 1": lambda x: _strided(x, lambda n, s: 2**61 if n == 1 else s),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}
HOSTILE: dict[str, Callable[[Tensor], Any]] = SAME | {
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized by torch": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "a conjugate": lambda x: x.to(torch.complex64).conj(),
    "bool": lambda x: x.bool(),
    "double": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "uint16": lambda x: x.to(torch.uint16),
    "NaN": lambda x: torch.full(x.shape, math.nan),
    "no rows": lambda x: x[:0],
    "no second size": lambda x: x[:, :0],
    "no columns": lambda x: x[..., :0],
    "no rows at huge strides": lambda x: _strided(x[:0], lambda *_: 2**58 + 1),
    "one row again and again": lambda x: x[:1].expand(x.shape),
    "one element again and again": lambda x: x.flatten()[0].expand(x.shape),
    "twice as many rows": lambda x: torch.cat((x, x)),
    "a dimension more": lambda x: x[None],
    "a dimension less": lambda x: x[0],
    "no dimension": lambda x: x.flatten()[0],
    "30 dimensions more": lambda x: x.view(*[1] * 30, *x.shape),
    "70 dimensions more": lambda x: x.as_strided((*[1] * 70, *x.shape), (*[1] * 70, *x.stride())),
    "integers far away": lambda x: torch.full(x.shape, 2**62, dtype=torch.int64),
    "the least integers": lambda x: torch.full(x.shape, -(2**63), dtype=torch.int64),
    "the least of int32": lambda x: torch.full(x.shape, -(2**31), dtype=torch.int32),
    "numpy": lambda x: x.numpy(),
    "a list": lambda _: [1.0],
    "a number": lambda _: 3,
    "a tuple": lambda x: (x,),
    "a word": lambda _: "x",
    "None": lambda _: None,
}
NUMBERS = (math.nan, math.inf, -math.inf, 2**70, -(2**70), 2**62, -(2**63), -1, 0, 2.5, None)


def _places(arguments: Arguments) -> Iterator[tuple[str, Tensor, Callable[[Any], Arguments]]]:
    """Each tensor, those in tuples too: its name, itself, and what puts another in its place."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value, lambda x, name=name: {name: x}
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            for i, part in enumerate(value):
                yield f"{name}[{i}]", part, lambda x, name=name, value=value, i=i: {
                    name: (*value[:i], x, *value[i + 1 :])
                }  # fmt: skip


def _made(make: Callable[[], Arguments]) -> Arguments:
    torch.manual_seed(0)
    with torch.no_grad():
        return make()


def _outcome(
    function: Callable[..., Any], arguments: Arguments, also: tuple[str, ...], what: str
) -> Any:
    """What `function` returns; None if it refuses in words that name an argument."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if not any(name in str(error) for name in (*arguments, *also)):
            raise AssertionError(f"{what}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return None


def _tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [x.detach() for x in parts if isinstance(x, Tensor) and not x.is_meta]


def check_tensors(
    call: Call, forms: dict[str, Callable[[Tensor], Any]], also: tuple[str, ...] = ()
) -> None:
    """Each tensor of the call in each of these forms; `also` are other names of its arguments."""
    function, make = call
    with torch.no_grad():
        want = _tensors(function(**_made(make)))
    for place in range(len(list(_places(_made(make))))):
        for hostile, change in forms.items():
            arguments = _made(make)
            name, x, put = list(_places(arguments))[place]
            try:
                changed = put(change(x))
            except (RuntimeError, TypeError, IndexError):  # there is no such tensor
                continue
            found = _outcome(function, arguments | changed, also, f"{name}: {hostile}")
            if found is not None and hostile in SAME:
                for a, b in zip(_tensors(found), want, strict=True):
                    assert type(a) is not Tensor or torch.equal(a, b), f"{name}: {hostile}"


def check_numbers(call: Call) -> None:
    """Each number of the call replaced by odd ones."""
    function, make = call
    for name, value in _made(make).items():
        if type(value) in (int, float):
            for number in NUMBERS:
                arguments = _made(make) | {name: number}
                try:
                    function(**arguments)
                except (TypeError, ValueError):  # Python's own words for None and 2.5
                    pass
                except Exception as error:
                    raise AssertionError(f"{name}: {number}: {error}") from error
