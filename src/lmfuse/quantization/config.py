"""`WeightOnlyConfig`: how weights of linear layers are quantized, and how such layers compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

KINDS = {"int8": 8, "fp8": 8, "int4": 4, "nf4": 4}
SCALES = (None, "plain", "search")
COMPUTE = ("auto", "fp32", "fp16", "bf16", "int8")
SCALE_DTYPES = (None, "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class WeightOnlyConfig:
    """How `lmfuse.quantize` quantizes; transformers takes it as `quantization_config`, too.

    Args:
        bits: 8 or 4.
        group_size: 32, 64, 128, 256, 512 … columns of a row share a scale; -1: the whole row.
        kind: "int8", "int4", "nf4" (sixteen quantiles of the normal distribution; QLoRA,
            arXiv:2305.14314) or "fp8" (e4m3); None: "int8" or "int4", as bits says.
        symmetric: whether zero is in the middle of the codes; else groups have zero points, and
            their whole range is used. int8 and int4 only. None: True for int8, False for int4.
        scales: "plain": from the smallest to the largest weight of a group; "search": those with
            the least squared error, group by group, and zero points that need not be integers;
            about five times slower to quantize. None: "search" for int4, "plain" for others.
        scale_dtype: "float32", "bfloat16" or "float16", to which scales are rounded before codes
            are chosen; None: bfloat16 for groups, float32 for whole rows, where it costs nothing.
        compute: "bf16": inputs are rounded to bfloat16; "int8": they are quantized, row by row, on
            the way in (int8 and int4 weights only); "fp32": they stay as they are; "fp16" is
            computed as "fp32". "auto": "int8" where `lmfuse.quantization.choose_compute` finds on a
            few sample tokens that it can be trusted, and "bf16" elsewhere.
        block_scales: with int8 compute, quantize inputs per row and group of columns (or part of
            256 of a longer one), not per row.
        lm_head: quantize the layer that gives the logits.
        head_bits: 8: that layer, and a quantized embedding, become int8 per channel, whatever the
            others become: they bear less. None: 8 for int4 and nf4.
        embedding: quantize the input embedding; one that is tied to lm_head shares its bytes.
        skip: layers that stay as they are: whole names, their last parts, or parts in between.
        modules_to_not_convert: the same under transformers' name.
        layers: what lmfuse writes into config.json: layer -> what it computes in.

    Raises:
        TypeError, ValueError: a value other than these.
    """

    quant_method: ClassVar[str] = "lmfuse"

    bits: int = 8
    group_size: int = -1
    kind: str | None = None
    symmetric: bool | None = None
    scales: str | None = None
    scale_dtype: str | None = None
    compute: str = "auto"
    block_scales: bool = False
    lm_head: bool = True
    head_bits: int | None = None
    embedding: bool = False
    skip: Sequence[str] = ()
    modules_to_not_convert: Sequence[str] = ()
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, (8, 4))
        kind = f"int{self.bits}" if self.kind is None else self.kind
        _one_of("kind", kind, tuple(KINDS))
        check_group_size(self.group_size)
        _one_of("head_bits", self.head_bits, (None, 8, KINDS[kind]))
        _one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _one_of("scales", self.scales, SCALES)
        _one_of("compute", self.compute, COMPUTE)
        floating = kind in ("nf4", "fp8")
        if self.symmetric is False and floating:
            raise ValueError(f"symmetric must be True or None: {kind} has no zero points")
        if self.compute == "int8" and floating:
            raise ValueError(f'compute "int8" needs int8 or int4 weights, but kind is {kind!r}')
        for name in ("block_scales", "lm_head", "embedding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, but must be True or False")
        symmetric = kind != "int4" if self.symmetric is None else self.symmetric
        skip = (*_names("skip", self.skip), *_names("skip", self.modules_to_not_convert))
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers is {type(self.layers).__name__}, but must be a mapping")
        for name, compute in self.layers.items():
            _one_of(f"layers[{name!r}]", compute, COMPUTE)
        scales = self.scales or ("search" if kind == "int4" else "plain")
        values = {"kind": kind, "bits": KINDS[kind], "symmetric": symmetric, "scales": scales}
        values |= {"head_bits": self.head_bits or 8}
        values |= {"skip": tuple(dict.fromkeys(skip)), "modules_to_not_convert": ()}
        for name, value in {**values, "layers": dict(self.layers)}.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        return f"{self.kind} {group}"

    def of_head(self) -> WeightOnlyConfig:
        """How the layer of the logits and the embedding are quantized."""
        if self.head_bits == self.bits:
            return self
        return dataclasses.replace(
            self,
            bits=8,
            kind="int8",
            group_size=-1,
            symmetric=True,
            scales="plain",
            scale_dtype=None,
        )

    def skips(self, name: str) -> bool:
        """Whether the layer called `name` stays as it is."""
        dotted = f".{name}."
        return any(f".{part.strip('.')}." in dotted for part in self.skip)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["modules_to_not_convert"]
        return {
            "quant_method": self.quant_method,
            **values,
            "skip": list(self.skip),
            "layers": dict(self.layers),
        }

    to_diff_dict = to_dict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WeightOnlyConfig:
        """The config that `to_dict` wrote.

        Raises:
            TypeError, ValueError: a key or a value that no config has.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if key != "quant_method"}
        for key in given:
            if key not in known:
                raise ValueError(
                    f"quantization_config has the key {key!r}, which this version of lmfuse does "
                    f"not know: it knows {', '.join(sorted(known))}"
                )
        return cls(**given)


def check_group_size(group_size: object) -> None:
    """Raises unless it is -1 or a power of two from 32 on."""
    if type(group_size) is not int or (
        group_size != -1 and (group_size < 32 or group_size & (group_size - 1))
    ):
        raise ValueError(
            f"group_size is {group_size!r}, but must be -1 or a power of two from 32 on"
        )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if type(value) not in {type(a) for a in allowed} or value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(str, allowed))}")


def _names(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r}, but must be a list of names")
    for part in value:
        if not isinstance(part, str) or not part.strip("."):
            raise TypeError(f"{name} holds {part!r}, but must hold names of layers")
    return tuple(value)
