"""A Llama of transformers, packed: its files, what restores it, and the arguments of optimize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfuse
from helpers import BF16, F16, F32, assert_same_bits
from lmfuse import _auto_kernel_selection as selection
from lmfuse import hf, modules

IDS = torch.arange(14).view(2, 7)


def llama(**changed: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changed,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_gives_the_files_of_stock(tmp_path: Path, tied: bool) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    stock = llama(tie_word_embeddings=tied).to(BF16)
    ours = lmfuse.optimize(stock)
    assert ours.num_parameters() == stock.num_parameters()
    assert (ours.dtype, ours.device) == (stock.dtype, stock.device)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    theirs, mine = (load_file(tmp_path / d / "model.safetensors") for d in ("stock", "ours"))
    assert mine.keys() == theirs.keys()
    assert ("lm_head.weight" in mine) is not tied
    for name, value in theirs.items():
        assert_same_bits(mine[name], value)
    again, other = (
        LlamaForCausalLM.from_pretrained(tmp_path / d, dtype="auto").eval()
        for d in ("stock", "ours")
    )
    for a, b in zip(again.parameters(), stock.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
    with torch.no_grad():  # both from a safetensors map
        mapped = lmfuse.optimize(again, inplace=True)
        assert_same_bits(mapped(IDS).logits, lmfuse.optimize(other)(IDS).logits)
    ours.tie_weights()
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype_", [None, BF16, F16])
def test_optimize_and_restore(dtype_: torch.dtype | None) -> None:
    stock = llama(tie_word_embeddings=True)
    with torch.no_grad():
        expected = stock(IDS).logits
        ours = lmfuse.optimize(stock, dtype=dtype_)
        assert len(hf.report(ours).packed) == 2 * 7 + 2
        tolerance = 1e-4 if dtype_ is None else 0.02
        torch.testing.assert_close(
            ours(IDS).logits.float(), expected, rtol=tolerance, atol=tolerance
        )
        back = lmfuse.restore(ours)
        assert [type(m) for m in back.modules()] == [type(m) for m in stock.modules()]
        for a, b in zip(back.parameters(), stock.parameters(), strict=True):
            assert type(a) is nn.Parameter
            b.data = b.data.to(dtype_ or F32)
            assert_same_bits(a.detach(), b.detach())
        assert_same_bits(back(IDS).logits, stock(IDS).logits)


# --- the arguments of optimize --------------------------------------------------------------------


def packed(model: nn.Module) -> int:
    return sum(isinstance(m, modules.Linear) for m in model.modules())


def test_weights_prepack() -> None:
    model = llama()
    assert packed(lmfuse.optimize(model)) == 15
    assert packed(lmfuse.optimize(model, weights_prepack=False)) == 0


def test_auto_kernel_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape is measured once, and the faster kernel kept; the blocked one if told so."""
    measured: list[tuple[int, ...]] = []

    def times(*calls: Callable[[], Tensor]) -> list[float]:
        shape = tuple(calls[0]().shape)
        torch.testing.assert_close(calls[0](), calls[1]())
        measured.append(shape)
        return [1.0, 2.0] if shape[-1] == 99 else [2.0, 1.0]

    monkeypatch.setattr(selection, "_times", times)
    selection._compare.cache_clear()
    model = llama()
    ours = lmfuse.optimize(model, auto_kernel_selection=True)
    assert packed(ours) == 1
    assert isinstance(ours.lm_head, modules.Linear)
    assert hf.report(ours).stock["model.layers.0.mlp.up_proj"] == "torch's kernel is faster"
    assert len(measured) == 2 * 5  # rows, shapes: 64x64, 32x64, 96x64, 64x96, 99x64
    assert packed(lmfuse.optimize(model, auto_kernel_selection=True)) == 1
    assert len(measured) == 2 * 5
    selection._enable_tpp()
    try:
        assert selection._using_tpp()
        assert packed(lmfuse.optimize(model, auto_kernel_selection=True)) == 15
    finally:
        selection._disable_tpp()
    selection._enable_dnnl()
    try:
        assert selection._using_dnnl()
        assert packed(lmfuse.optimize(model)) == 1
        assert packed(lmfuse.optimize(model, auto_kernel_selection=False)) == 15
    finally:
        selection._disable_dnnl()
    selection._compare.cache_clear()


def test_kernels_are_measured() -> None:
    fast, slow = selection._times(lambda: torch.ones(1), lambda: torch.randn(200_000))
    assert 0 < fast < slow


def test_bf32() -> None:
    model = llama()
    lmfuse.set_fp32_math_mode(lmfuse.FP32MathMode.BF32)
    try:
        assert lmfuse.get_fp32_math_mode() is lmfuse.FP32MathMode.BF32
        with pytest.warns(UserWarning, match="TF32"):
            lmfuse.set_fp32_math_mode(lmfuse.FP32MathMode.TF32)
        ours = lmfuse.optimize(model)
    finally:
        lmfuse.set_fp32_math_mode()
    assert ours.dtype is F32
    weight = ours.lm_head.weight
    assert weight.packed_dtype is BF16
    assert_same_bits(weight.unpack(), model.lm_head.weight.detach().to(BF16).float())
    with torch.no_grad():
        result = ours(IDS).logits
        assert result.dtype is F32
        torch.testing.assert_close(result, model(IDS).logits, rtol=0.03, atol=0.03)
