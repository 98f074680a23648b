"""The decoder op where its layers have mixtures of experts, or MLPs of several sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import F32, assert_same_bits
from lmfuse import functional
from lmfuse.functional import DecoderLayer, decoder_stack
from test_decoder import DIM, HIDDEN, INNER, TOLERANCE, Run, linear, make


def test_mlps_of_several_sizes(isa: str, dtype: torch.dtype) -> None:
    """And mixtures, with a shared expert and without, among them; each with its own bits."""
    options: list[dict[str, Any]] = [
        {"inner": 24},
        {"inner": 90},
        {"experts": 3, "chosen": 3},
        {"inner": 33, "gated": False, "activation": "relu"},
        {"experts": 3, "chosen": 3, "shared": 41},
        {"inner": 90, "fused": True, "activation": "gelu"},
    ]
    layers = [make(dtype, rotary_dim=DIM, **each) for each in options]
    run = Run(layers, torch.randn(2, 9, HIDDEN).to(dtype))
    whole, expected = run.pieces(9), run.expected()
    assert (whole.double() - expected).abs().max() / expected.abs().max() < TOLERANCE[dtype]
    assert_same_bits(run.pieces(1, 4, 4), whole)
    x = run.x
    for layer in layers:
        one = Run([layer], x)
        one.cos, one.sin = run.cos, run.sin
        x = one.pieces(9)
    assert_same_bits(whole, x)


@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_biases(isa: str, dtype: torch.dtype, activation: str) -> None:
    """Of experts and of their router."""
    layers: list[DecoderLayer] = []
    for _ in range(2):
        layer = make(dtype, experts=3, chosen=3, rotary_dim=DIM, activation=activation)
        mixed: Any = layer.experts
        mixed = replace(
            mixed,
            router=replace(mixed.router, bias=torch.randn(3)),
            gate_up_bias=torch.randn(3, 2 * INNER).to(dtype),
            down_bias=torch.randn(3, HIDDEN),
            slope=1.2,
            limit=0.8,
        )
        layers.append(replace(layer, experts=mixed))
    run = Run(layers, torch.randn(2, 9, HIDDEN).to(dtype))
    whole, expected = run.pieces(9), run.expected()
    assert (whole.double() - expected).abs().max() / expected.abs().max() < TOLERANCE[dtype]
    assert_same_bits(run.pieces(1, 4, 4), whole)


def test_mixtures_that_cannot_be() -> None:
    good = make(F32, experts=4)
    mixed: Any = good.experts

    def refused(match: str, error: type[Exception] = ValueError, **changed: Any) -> None:
        with pytest.raises(error, match=match):
            decoder_stack([replace(good, experts=replace(mixed, **changed))])

    refused("chosen, but it must be from 0 to 4|chosen is 5", chosen=5)
    refused("a router, experts and chosen ones", chosen=0)
    refused("gate_up of the experts has no features", inner_features=0)
    refused("gate_up of the experts holds a weight 72 by 40", inner_features=8)
    refused("which are not 6 weights", router=linear(3, HIDDEN, F32))
    refused("down of the experts has 30848 bytes", down=mixed.gate_up)
    refused("have 160 elements, but has 287", down_bias=torch.ones(7, 41))
    refused("the bias of gate_up .* have 576 elements, but has 72", gate_up_bias=torch.ones(72))
    quantized = functional.expert_rows(mixed.down.unpack())
    codes, scales = quantized.sign().to(torch.int8), torch.ones(len(quantized))
    packed = functional.pack_quantized("int8", codes, scales)
    refused("both be packed, or both quantized", TypeError, down=packed)
    with pytest.raises(ValueError, match="gate and down or a router must be given"):
        decoder_stack([replace(good, down=linear(HIDDEN, INNER, F32))])
    refused("no expert that is shared", shared_gate=linear(1, HIDDEN, F32))
    shared: Any = make(F32, experts=4, shared=24)
    gates = replace(shared.experts, shared_gate=linear(2, HIDDEN, F32))
    with pytest.raises(ValueError, match="shared_gate is 2 by 40, but must be 1 by 40"):
        decoder_stack([replace(shared, experts=gates)])
    with pytest.raises(ValueError, match="silu or gelu"):
        decoder_stack([replace(good, activation="relu")])
    with pytest.raises(ValueError, match="activation is 'clamped_swiglu'"):
        decoder_stack([replace(make(F32, experts=4, shared=24), activation="clamped_swiglu")])
    with pytest.raises(ValueError, match="are gated"):
        decoder_stack([replace(good, gated=False)])
    with pytest.raises(ValueError, match="must be given"):
        decoder_stack([replace(good, experts=None)])
    with pytest.raises(ValueError, match="mixtures of one call must have the same sizes"):
        decoder_stack([good, make(F32, experts=5)])
    run = Run([good], torch.randn(1, 3, HIDDEN))
    run.x = run.x.bfloat16()
    with pytest.raises((ValueError, TypeError), match="dtype"):
        run.pieces(3)
