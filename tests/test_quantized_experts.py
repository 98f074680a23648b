"""Models with mixtures of experts, quantized: what they compute, and their checkpoints."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lmfuse
from lmfuse import WeightOnlyConfig, functional
from lmfuse.hf import report
from lmfuse.modules import QuantizedExperts, QuantizedLinear
from lmfuse.quantization import compute, quality
from test_models import make
from test_quantization import logits

Auto = transformers.AutoModelForCausalLM
NAMES = ["mixtral", "qwen3_moe", "gpt_oss"]
CONFIGS = {
    "int8": WeightOnlyConfig(),
    "int4": WeightOnlyConfig(bits=4, group_size=32, compute="bf16"),
    "nf4": WeightOnlyConfig(kind="nf4", group_size=64, lm_head=False),
}


def experts(model: nn.Module) -> dict[str, QuantizedExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


def turned(weight: Tensor, parts: int) -> Tensor:
    """[experts, parts n, k] as gpt-oss has it: [experts, k, n parts]."""
    count, rows, columns = weight.shape
    each = weight.view(count, parts, rows // parts, columns)
    return each.permute(0, 3, 2, 1).reshape(count, columns, rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_compute_what_their_weights_stand_for(
    name: str, config: WeightOnlyConfig, isa: str
) -> None:
    model = make(name)
    got = lmfuse.quantize(
        model, WeightOnlyConfig.from_dict({**config.to_dict(), "compute": "fp32"})
    )
    assert len(experts(got)) == model.config.num_hidden_layers
    plain = copy.deepcopy(model)
    for at, module in got.named_modules():
        stock: Any = plain.get_submodule(at)
        if isinstance(module, QuantizedLinear):
            stock.weight.data = module.dequantize()
        elif isinstance(module, QuantizedExperts):
            values = module.dequantize()
            if name == "gpt_oss":
                values = turned(values[0], 2), turned(values[1], 1)
            stock.gate_up_proj.data, stock.down_proj.data = values
            assert stock.gate_up_proj.shape == model.get_submodule(at).gate_up_proj.shape
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(logits(got), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trips(name: str, config: WeightOnlyConfig, tmp_path: Path) -> None:
    model = make(name)
    got = lmfuse.quantize(model, config)
    expected = logits(got)
    got.save_pretrained(tmp_path / "a")
    again, info = Auto.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), expected)
    assert {n: m.compute for n, m in experts(again).items()} == {
        n: m.compute for n, m in experts(got).items()
    }
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "b")), expected)

    model.save_pretrained(tmp_path / "c")  # expert by expert, as they are published
    on_the_way = Auto.from_pretrained(tmp_path / "c", quantization_config=config)
    assert torch.equal(logits(on_the_way), expected)
    assert report(on_the_way).packed == report(got).packed
    on_the_way.save_pretrained(tmp_path / "d")
    assert torch.equal(logits(lmfuse.from_pretrained(tmp_path / "d")), expected)


@pytest.mark.parametrize("name", NAMES)
def test_optimized_before_or_after(name: str) -> None:
    model, config = make(name), WeightOnlyConfig(bits=4, group_size=32, compute="fp32")
    got = lmfuse.quantize(model, config)
    ids = torch.randint(64, (2, 9))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = got.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for other in (
        lmfuse.optimize(got),
        lmfuse.optimize(model, quantization_config=config),
        lmfuse.quantize(lmfuse.optimize(model), config),
        lmfuse.quantize(lmfuse.optimize(model), config, inplace=True),
    ):
        assert len(experts(other)) == len(experts(got))
        torch.testing.assert_close(logits(other), logits(got), rtol=1e-4, atol=1e-4)
        found = other.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(found, expected)
    restored = lmfuse.restore(lmfuse.optimize(got))
    assert torch.equal(logits(restored), logits(got))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_state_dicts_copies_and_files(name: str) -> None:
    got = lmfuse.quantize(make(name))
    for other in (copy.deepcopy(got), _saved(got)):
        assert torch.equal(logits(other), logits(got))
    other = lmfuse.quantize(make(name))
    with torch.no_grad():
        one = next(iter(experts(other).values()))
        one.down.zero_()
        for bias in one.parameters():
            bias.zero_()
    other.load_state_dict(got.state_dict())
    assert torch.equal(logits(other), logits(got))
    assert f"act={'silu' if name == 'mixtral' else 'clamped_swiglu'}" in repr(one)


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # our own file


def test_what_stays_says_why() -> None:
    model = make("mixtral")
    names = [n for n, m in model.named_modules() if n.endswith(".experts")]
    model.get_submodule(names[0]).register_forward_hook(lambda *_: None)
    got = lmfuse.quantize(model, WeightOnlyConfig(skip=[names[1]]))
    assert not experts(got)
    assert "hooks" in report(got).stock[names[0]]
    assert report(got).stock[names[1]] == "skip names it"
    # Experts with biases compute something else.
    model = make("mixtral")
    odd: Any = model.get_submodule(names[0])
    odd.bias = nn.Parameter(torch.zeros(3))
    got = lmfuse.quantize(model)
    assert names[0] not in experts(got)
    assert names[1] in experts(got)
    assert "compute more" in report(got).stock[names[0]]


def test_compute_is_chosen_for_experts_as_for_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    got = lmfuse.quantize(make("mixtral"))
    said = report(got).packed
    for name, module in experts(got).items():
        assert f"computes in {module.compute}: " in said[name]
    assert any(m.compute == "int8" for m in experts(got).values())
    monkeypatch.setattr(compute, "LIMIT", 0.0)
    got = lmfuse.quantize(make("mixtral"))
    said = report(got).packed
    for name, module in experts(got).items():
        assert module.compute == "bf16"
        assert "more than 0.0%" in said[name]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_quality_knows_experts(name: str) -> None:
    model = make(name)
    got = lmfuse.quantize(model, CONFIGS["int4"])
    row = torch.randint(64, (40,))
    found = {error.name: error for error in quality.layer_errors(model, got, row)}
    for name in experts(got):
        assert 0.01 < found[name].weight < 0.2
        assert 0.005 < found[name].output < 0.3


def test_weights_that_are_not_finite_are_refused() -> None:
    model = make("mixtral")
    name = next(n for n, m in model.named_modules() if n.endswith(".experts"))
    weight: Any = model.get_submodule(name).down_proj
    weight.data[0, 0, 0] = torch.nan
    before = logits(model)
    with pytest.raises(ValueError, match=rf"{name}\.down_proj: weight holds NaN"):
        lmfuse.quantize(model, inplace=True)
    assert not experts(model)
    torch.testing.assert_close(logits(model), before, equal_nan=True)


@pytest.mark.parametrize("wrong", ["short", "other", "none"])
def test_hostile_checkpoints(wrong: str, tmp_path: Path) -> None:
    lmfuse.quantize(make("mixtral")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("experts.down"))
    up = name.replace("down", "gate_up")
    if wrong == "short":
        tensors[name] = tensors[name][:-64].clone()
    elif wrong == "other":
        tensors[name] = tensors[up].clone()
    else:
        del tensors[name]
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, TypeError), match=r"experts\.down"):
        Auto.from_pretrained(tmp_path)


def test_a_module_of_ones_own() -> None:
    gate_up, down = torch.randn(3, 2 * 40, 33) / 6, torch.randn(3, 33, 40) / 6
    packed = [_int8(gate_up, 2), _int8(down, 1)]
    module = QuantizedExperts(*packed, compute="fp32")
    assert (module.num_experts, module.hidden_features, module.inner_features) == (3, 33, 40)
    for values, plain in zip(module.dequantize(), (gate_up, down), strict=True):
        torch.testing.assert_close(values, plain, rtol=0, atol=0.01)
    x, index, weights = torch.randn(4, 33), torch.tensor([[0, 2]] * 4), torch.rand(4, 2)
    dense = [
        functional.pack_experts(v, p) for v, p in zip(module.dequantize(), (2, 1), strict=True)
    ]
    with torch.no_grad():
        expected = functional.experts(x, index, weights, *dense)
        torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not the matrices of as many experts"):
        QuantizedExperts(packed[1], packed[0])
    with pytest.raises(TypeError, match=r"gate_up is torch\.float32"):
        QuantizedExperts(gate_up, packed[1])
    with pytest.raises(ValueError, match="header"):
        QuantizedExperts(packed[0], torch.zeros_like(packed[1]))


def _int8(weight: Tensor, parts: int) -> Tensor:
    rows = functional.expert_rows(weight, parts)
    scales = (rows.abs().amax(1) / 127).clamp(min=1e-6)
    codes = (rows / scales[:, None]).round().to(torch.int8)
    return functional.pack_quantized("int8", codes, scales)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_and_graphs_choose_anew() -> None:
    gate_up, down = torch.randn(3, 2 * 40, 33) / 6, torch.randn(3, 33, 40) / 6
    module = QuantizedExperts(_int8(gate_up, 2), _int8(down, 1))
    x, index, weights = torch.randn(4, 33), torch.tensor([[0, 2]] * 4), torch.rand(4, 2)
    traced = torch.jit.trace(module, (x, index, weights))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(module, (x, index, weights)).module()
    for other in (index, index.flip(1), torch.ones_like(index)):
        expected = module(x, other, weights)
        for run in (traced, compiled, exported):
            assert torch.equal(run(x, other, weights), expected)
