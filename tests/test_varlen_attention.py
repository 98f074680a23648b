"""Attention over packed sequences: unequal lengths, masks, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from attending import (
    BF16,
    F32,
    assert_close,
    exact,
    qkv,
    varlen,
    varlen_arguments,
)
from lmfuse.functional import (
    varlen_attention,
)


def test_varlen(isa):
    """Unequal lengths, an empty sequence, the scale, ALiBi, windows and softcap."""
    cu_q, cu_k = torch.tensor([0, 5, 5, 6, 80]).int(), torch.tensor([0, 9, 12, 300, 390])
    for dtype in (F32, BF16):
        q, k, v = (x[0] for x in qkv(1, 80, 390, 4, 2, 64, 32, dtype=dtype))
        slopes = torch.rand(4)
        for causal, rest in (
            (False, {}),
            (True, {}),
            (True, {"window_size_left": 6, "softcap": 3.0}),
            (False, {"window_size_left": 0, "window_size_right": 2}),
        ):
            out = torch.empty(80, 4, 32, dtype=dtype)
            got = varlen(q, k, v, out, cu_q, cu_k, 0.4, causal, slopes, **rest)
            assert got is out
            for b in range(4):
                rows = slice(cu_q[b], cu_q[b + 1])
                keys = slice(cu_k[b], cu_k[b + 1])
                window = rest.get("window_size_left", -1), rest.get("window_size_right", -1)
                want = exact(
                    q[None, rows], k[None, keys], v[None, keys], scale=0.4, causal=causal,
                    alibi=slopes, window=window, softcap=rest.get("softcap", 0.0),
                )  # fmt: skip
                assert_close(out[None, rows], want, v)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"pdropout": 0.1}, ValueError, "pdropout"),
        ({"return_softmax": True}, ValueError, "return_softmax"),
        ({"gen_": torch.Generator()}, ValueError, "gen_"),
        ({"seqlen_q": torch.tensor([0, 4, 2])}, ValueError, "seqlen_q must not fall"),
        ({"seqlen_k": torch.tensor([0, 3, 9])}, ValueError, "seqlen_k ends at 9"),
        ({"seqlen_k": torch.tensor([1, 3, 8])}, ValueError, "seqlen_k must begin"),
        ({"seqlen_k": torch.tensor([0, 8])}, ValueError, "seqlen_k"),
        ({"seqlen_q": torch.tensor([0.0, 2, 6])}, TypeError, "seqlen_q"),
        ({"query": torch.randn(6, 3, 16), "out": torch.zeros(6, 3, 16)}, ValueError, "divide"),
        ({"key": torch.randn(8, 2, 15)}, ValueError, "key"),
        ({"value": torch.randn(7, 2, 16)}, ValueError, "value"),
        ({"out": torch.zeros(6, 4, 15)}, ValueError, "out"),
        ({"out": torch.zeros(6, 4, 16).bfloat16()}, TypeError, "out"),
        ({"out": torch.zeros(1, 1, 16).expand(6, 4, 16)}, ValueError, "out"),
        ({"softcap": -2.0}, ValueError, "softcap"),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale"),
        ({"alibi_slopes": torch.rand(3)}, ValueError, "alibi_slopes"),
    ],
)
def test_varlen_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        varlen_attention(**{**varlen_arguments(), **change})
