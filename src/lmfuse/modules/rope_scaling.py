"""The frequencies of a rotary embedding, and how models stretch them to longer contexts.

Pair i of a rotated width d turns by position · f_i, with f_i = base^(-2i/d) unless a scaling
changes it. All is computed in fp32, in the order in which stock transformers computes it: a table
in higher precision would be further from the one that a model was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEFAULT_BASE = 10000.0

_ALIASES = {"su": "longrope", "mrope": "default"}


@dataclass(frozen=True)
class Rope:
    """All that the angles depend on; equal ropes share one table.

    Attributes:
        kind: which scaling, a key of `SCALINGS`.
        dim: d, the rotated width of a head.
        base: theta.
        max_positions: the longest context that the model is meant for.
        original: the longest context it was first trained with (yarn, longrope, llama3).
        factor: how many times longer the context became.
        attention_factor: what sin and cos are multiplied by.
        low, high: llama3's low_freq_factor and high_freq_factor, yarn's beta_slow and beta_fast.
        truncate: yarn's borders are rounded to whole pairs.
        short_factor, long_factor: longrope's divisors of each frequency.
        proportion: the part of the frequencies that turn at all (proportional).
    """

    kind: str
    dim: int
    base: float
    max_positions: int
    original: int = 0
    factor: float = 1.0
    attention_factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    proportion: float = 1.0

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")

    def inv_freq(self, length: int | Tensor = 0) -> Tensor:
        """[d/2] in fp32: the angle per position, in radians, for a sequence of that length."""
        return SCALINGS[self.kind](self, length)

    @classmethod
    def of(
        cls, dim: int, base: float, max_positions: int, config: Mapping[str, Any] | None
    ) -> Rope:
        """From the `rope_parameters` or `rope_scaling` of a model's config; None: no scaling.

        Raises:
            ValueError: a key is missing or its value cannot be.
        """
        config = config or {}
        if dim < 2 or dim % 2:
            raise ValueError(f"pos_embd_dim is {dim}, but must be even and at least 2")
        if max_positions < 1:
            raise ValueError(f"max_position_embeddings is {max_positions}, but must be at least 1")
        kind = _kind(config)
        base = _base(base, config)
        return cls(kind, dim, base, max_positions, **_READERS[kind](config, dim, max_positions))


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("rope_type") or config.get("type")
    if kind is None:
        if config and all(isinstance(value, Mapping) for value in config.values()):
            raise ValueError(
                f"extra_rope_config holds one entry for each of {', '.join(config)}, but must be "
                "one of these entries"
            )
        kind = "longrope" if "short_factor" in config else "default"
    kind = _ALIASES.get(kind, kind)
    if kind not in SCALINGS:
        raise ValueError(
            f"extra_rope_config has rope_type {kind!r}, but must have one of "
            f"{', '.join((*SCALINGS, *_ALIASES))}"
        )
    return str(kind)


def _base(base: float, config: Mapping[str, Any]) -> float:
    theta = config.get("rope_theta")
    if theta is not None and base not in (DEFAULT_BASE, theta):
        raise ValueError(f"base is {base}, but extra_rope_config has rope_theta {theta}")
    base = base if theta is None else theta
    if not base > 1:
        raise ValueError(f"base is {base}, but must be greater than 1")
    return base


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"extra_rope_config has {key} {value!r}, but must have a positive number")
    return value


def _optional(config: Mapping[str, Any], key: str, default: float) -> float:
    return default if config.get(key) is None else _number(config, key)


def _original(config: Mapping[str, Any]) -> int:
    return int(_number(config, "original_max_position_embeddings"))


def _read_default(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    return {}


def _read_linear(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    return {"factor": _number(config, "factor")}


def _read_dynamic(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    if dim < 4:
        raise ValueError(f"pos_embd_dim is {dim}, but dynamic scaling needs at least 4")
    return {"factor": _number(config, "factor")}


def _read_proportional(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    proportion = _optional(config, "partial_rotary_factor", 1.0)
    if proportion > 1:
        raise ValueError(
            f"extra_rope_config has partial_rotary_factor {proportion}, but must have at most 1"
        )
    return {"factor": _optional(config, "factor", 1.0), "proportion": proportion}


def _read_yarn(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    original = _original(config)
    factor = _optional(config, "factor", max_positions / original)

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, over = config.get("mscale"), config.get("mscale_all_dim")
    attention = growth(scale) / growth(over) if scale and over else growth(1.0)
    return {
        "original": original,
        "factor": factor,
        "attention_factor": _optional(config, "attention_factor", attention),
        "low": float(config.get("beta_slow") or 1),
        "high": float(config.get("beta_fast") or 32),
        "truncate": bool(config.get("truncate", True)),
    }


def _read_longrope(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    original = _original(config)
    factor = _optional(config, "factor", max_positions / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = {}
    for key in ("short_factor", "long_factor"):
        values = config.get(key) or config.get("short_factor") or ()
        if len(values) != dim // 2 or not all(v > 0 for v in values):
            raise ValueError(
                f"extra_rope_config has {len(values)} numbers in {key}, but must have "
                f"{dim // 2}, all positive: one for each pair of pos_embd_dim"
            )
        divisors[key] = tuple(float(v) for v in values)
    return {
        "original": original,
        "factor": factor,
        "attention_factor": _optional(config, "attention_factor", attention),
        **divisors,
    }


def _read_llama3(config: Mapping[str, Any], dim: int, max_positions: int) -> dict[str, Any]:
    low, high = _number(config, "low_freq_factor"), _number(config, "high_freq_factor")
    if high <= low:
        raise ValueError(
            f"extra_rope_config has high_freq_factor {high}, but must have more than "
            f"low_freq_factor, {low}"
        )
    original = _original(config)
    return {"factor": _number(config, "factor"), "original": original, "low": low, "high": high}


def _exponents(rope: Rope) -> Tensor:
    return torch.arange(0, rope.dim, 2, device="cpu").to(torch.float32) / rope.dim


def _default(rope: Rope, length: int | Tensor) -> Tensor:
    return 1.0 / rope.base ** _exponents(rope)


def _linear(rope: Rope, length: int | Tensor) -> Tensor:
    """Positions as if they lay `factor` times closer (kaiokendev, 2023)."""
    return _default(rope, length) / rope.factor


def _dynamic(rope: Rope, length: int | Tensor) -> Tensor:
    """A base that grows with a sequence beyond max_positions (NTK-aware; emozilla, 2023)."""
    if isinstance(length, Tensor):
        length = length.clamp(min=rope.max_positions)
    else:
        length = max(length, rope.max_positions)
    stretch = rope.factor * length / rope.max_positions - (rope.factor - 1)
    base = rope.base * stretch ** (rope.dim / (rope.dim - 2))
    return 1.0 / base ** _exponents(rope)


def _yarn(rope: Rope, length: int | Tensor) -> Tensor:
    """Slow pairs interpolated, fast ones kept, a ramp between (Peng et al., YaRN, 2023)."""

    def pair(turns: float) -> float:  # which pair makes so many turns in the original context
        wavelength = rope.original / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.base))

    first, last = pair(rope.high), pair(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    periods = rope.base ** _exponents(rope)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _longrope(rope: Rope, length: int | Tensor) -> Tensor:
    """Each frequency has its divisor, and another beyond the original context (Ding, 2024)."""
    short = torch.tensor(rope.short_factor, dtype=torch.float32, device="cpu")
    long = torch.tensor(rope.long_factor, dtype=torch.float32, device="cpu")
    if isinstance(length, Tensor):
        divisors = torch.where(length > rope.original, long, short)
    else:
        divisors = long if length > rope.original else short
    return 1.0 / (divisors * rope.base ** _exponents(rope))


def _llama3(rope: Rope, length: int | Tensor) -> Tensor:
    """Long waves interpolated, short ones kept, a blend between (Dubey et al., Llama 3, 2024)."""
    f = _default(rope, length)
    wavelength = 2 * math.pi / f
    blend = (rope.original / wavelength - rope.low) / (rope.high - rope.low)
    blended = (1 - blend) * f / rope.factor + blend * f
    slow = torch.where(wavelength > rope.original / rope.low, f / rope.factor, blended)
    return torch.where(wavelength < rope.original / rope.high, f, slow)


def _proportional(rope: Rope, length: int | Tensor) -> Tensor:
    """Only the fastest pairs turn, at the frequencies of the whole width."""
    turning = int(rope.proportion * rope.dim // 2)
    f = _default(rope, length)
    f[turning:] = 0
    return f / rope.factor


SCALINGS: dict[str, Callable[[Rope, int | Tensor], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}

_READERS: dict[str, Callable[[Mapping[str, Any], int, int], dict[str, Any]]] = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "llama3": _read_llama3,
    "proportional": _read_proportional,
}
