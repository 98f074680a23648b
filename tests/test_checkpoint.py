"""Checkpoints: round trips through transformers; GPTQ, AWQ, GGUF as published; hostile files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lmfuse
from helpers import BF16, F16
from lmfuse import WeightOnlyConfig
from lmfuse.functional import dequantize
from lmfuse.modules import QuantizedExperts, QuantizedLinear
from lmfuse.quantization import gguf_tensors, pack_awq, pack_gguf, pack_gptq, quantization
from test_quantization import IDS, logits, tiny
from test_quantization_ipex import words

Auto = transformers.AutoModelForCausalLM
CONFIGS = {
    "int8": WeightOnlyConfig(),
    "int4": WeightOnlyConfig(bits=4, group_size=32, embedding=True),
    "no head": WeightOnlyConfig(bits=4, group_size=32, lm_head=False, skip=["q_proj"]),
    "fp8": WeightOnlyConfig(kind="fp8", embedding=True, lm_head=False),
}


# --- saved by lmfuse ------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trips(config: WeightOnlyConfig, tie: bool, tmp_path: Path) -> None:
    model = tiny(tie)
    got = lmfuse.quantize(model, config)
    expected = logits(got)
    got.save_pretrained(tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.bin"))
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "lmfuse"
    again, info = Auto.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), expected)
    computes = {n: m.compute for n, m in again.named_modules() if isinstance(m, QuantizedLinear)}
    assert computes == {n: m.compute for n, m in got.named_modules() if n in computes}
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "b")), expected)

    model.save_pretrained(tmp_path / "c")
    on_the_way = Auto.from_pretrained(tmp_path / "c", quantization_config=config)
    assert torch.equal(logits(on_the_way), expected)
    assert quantization(on_the_way).quantized.keys() == quantization(got).quantized.keys()
    on_the_way.save_pretrained(tmp_path / "d")
    assert torch.equal(logits(lmfuse.from_pretrained(tmp_path / "d")), expected)


def test_state_dict_and_optimize(tmp_path: Path) -> None:
    got, other = (lmfuse.quantize(tiny(hidden_act=act)) for act in ("silu", "gelu"))
    other.load_state_dict(got.state_dict())
    for a, b in zip(got.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    got.save_pretrained(tmp_path)
    fused = lmfuse.optimize(Auto.from_pretrained(tmp_path), dtype=None)
    assert torch.allclose(logits(fused), logits(got), atol=1e-4)
    new = fused.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(new, got.generate(IDS, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("order", ["lmfuse, transformers", "transformers, lmfuse"])
def test_a_fresh_process_loads_it(order: str, tmp_path: Path) -> None:
    got = lmfuse.quantize(tiny())
    got.save_pretrained(tmp_path)
    code = f"""
import {order}, torch
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    print(type(model.lm_head).__name__, float(model(torch.arange(2, 20)[None]).logits.sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind, total = done.stdout.split()
    assert kind == "QuantizedLinear"
    assert float(total) == pytest.approx(float(logits(got).sum()), rel=1e-4)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lmfuse.quantize(tiny()).save_pretrained(tmp_path)
    file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, said = load_file(file), json.loads(settings.read_text())
    name = "model.layers.0.mlp.up_proj"

    def fails(match: str, tensor: torch.Tensor | None = None, **config: Any) -> None:
        changed = dict(tensors)
        changed.pop(f"{name}.weight")
        if tensor is not None:
            changed[f"{name}.weight"] = tensor
        save_file(changed, file, {"format": "pt"})
        quant = {**said["quantization_config"], **config}
        settings.write_text(json.dumps({**said, "quantization_config": quant}))
        with pytest.raises((ValueError, RuntimeError), match=match):
            Auto.from_pretrained(tmp_path)

    good = tensors[f"{name}.weight"]
    broken = good.clone()
    broken[:8] = 255
    fails(f"{name}.weight", broken)
    fails(f"{name}.weight", good[:100].clone())
    other = tensors["model.layers.0.mlp.down_proj.weight"].clone()
    fails(r"is quantized \(64, 96\)", other)
    fails(f"the checkpoint has no {name}.weight")
    fails("has no such module", good, layers={"model.nothing": "bf16"})
    fails("that is a LlamaMLP", good, layers={"model.layers.0.mlp": "bf16"})
    fails("'colour'", good, colour=1)
    fails("int7", good, kind="int7")


def test_devices_other_than_the_cpu_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map names cuda"):
        Auto.from_pretrained(
            tmp_path, quantization_config=WeightOnlyConfig(), device_map={"": "cuda:0"}
        )


# --- GPTQ and AWQ ---------------------------------------------------------------------------------

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def published(
    n: int, k: int, bits: int = 4, group: int = 32, act_order: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as GPTQ writes it, and its values in float32, one formula for each element."""
    groups, top = k // group, 1 << bits
    codes = torch.randint(top, (n, k))
    zeros = torch.randint(1, top, (groups, n))
    scales = (torch.rand(groups, n) * 0.01 + 0.001).half()
    g_idx = torch.arange(k) // group
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    values = (codes - zeros[g_idx].T) * scales.float()[g_idx].T
    if bits == 4:
        qweight, qzeros = words(codes).T, words(zeros - 1)
    else:
        qweight = codes.to(torch.uint8).view(torch.int32).T
        qzeros = (zeros - 1).to(torch.uint8).view(torch.int32)
    parts = {"qweight": qweight.contiguous(), "qzeros": qzeros.contiguous(), "scales": scales}
    return {**parts, "g_idx": g_idx.int()}, values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_values(bits: int, act_order: bool) -> None:
    parts, values = published(40, 96, bits, 32, act_order)
    packed = pack_gptq(**parts, bits=bits, group_size=32)
    assert torch.equal(dequantize(packed), values)
    assert torch.equal(pack_gptq(**parts, bits=bits), packed)
    if bits == 4 and not act_order:
        middle = pack_gptq(parts["qweight"], parts["scales"])
        shift = (8 - (parts_zeros(parts) + 1)).T.repeat_interleave(32, 1)
        scales = parts["scales"].float().T.repeat_interleave(32, 1)
        assert torch.allclose(dequantize(middle), values - shift * scales, atol=1e-6)


def parts_zeros(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    found = parts["qzeros"].view(torch.uint8)
    return torch.stack((found & 15, found >> 4), -1).flatten(1).long()


def test_gptq_zero_points_wrap() -> None:
    """Specification, appendix A.4: stored 15 means 16, which the kernels take as 0."""
    qweight = torch.full((4, 8), 0x33333333, dtype=torch.int32)
    scales = torch.ones(1, 8)
    for stored, zero in ((7, 8), (15, 0), (0, 1)):
        qzeros = words(torch.full((1, 8), stored))
        assert torch.equal(
            dequantize(pack_gptq(qweight, scales, qzeros)), torch.full((8, 32), 3.0 - zero)
        )
    v2 = pack_gptq(qweight, scales, words(torch.full((1, 8), 15)), zero_offset=0)
    assert torch.equal(dequantize(v2), torch.full((8, 32), -12.0))


def test_awq_values() -> None:
    codes, zeros = torch.randint(16, (64, 40)), torch.randint(16, (2, 40))
    scales = torch.rand(2, 40).half()
    packed = pack_awq(words(codes, _AWQ), scales, words(zeros, _AWQ), 32)
    g = torch.arange(64) // 32
    assert torch.equal(dequantize(packed), ((codes - zeros[g]) * scales.float()[g]).T)


def test_published_tensors_that_do_not_fit() -> None:
    parts, _ = published(40, 96)

    def fails(match: str, error: type[Exception] = ValueError, **changed: Any) -> None:
        with pytest.raises(error, match=match):
            pack_gptq(**{**parts, **changed})

    fails("bits is 3", bits=3)
    fails(r"qweight is torch.float32", TypeError, qweight=torch.ones(12, 40))
    fails(r"qweight has shape", qweight=parts["qweight"][0])
    fails(r"scales has shape \(3, 39\)", scales=parts["scales"][:, 1:])
    fails(r"qzeros has shape", qzeros=parts["qzeros"][:, 1:])
    fails("3 groups, but 96 rows in groups of 64 are 2", group_size=64)
    fails("g_idx reaches from 7 to 9", g_idx=parts["g_idx"] + 7)
    fails(r"g_idx has shape \(95,\)", g_idx=parts["g_idx"][1:])
    fails("g_idx is torch.float32", TypeError, g_idx=parts["g_idx"].float())
    fails("NaN or infinity", scales=torch.full_like(parts["scales"], float("nan")))
    awq = words(torch.zeros(64, 40, dtype=torch.long))
    with pytest.raises(ValueError, match="scales has shape"):
        pack_awq(awq, torch.ones(2, 5))


def save_published(folder: Path, method: str, act_order: bool = False, model: Any = None) -> Any:
    """A whole checkpoint of quantized linear layers, and experts as if they were such; returns a
    stock model of the same values."""
    model = (tiny(tie=False) if model is None else model).to(F16)
    tensors: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, weight in linear_weights(model):
        n, k = weight.shape
        parts, values = published(n, k, act_order=act_order)
        if method == "awq":
            codes = (values.T / parts["scales"].float().repeat_interleave(32, 0)).round().long()
            zeros = 0 * parts_zeros(parts) + 8
            codes = codes.clamp(-8, 7) + 8
            values = ((codes - 8) * parts["scales"].float().repeat_interleave(32, 0)).T
            parts = {
                "qweight": words(codes, _AWQ), "qzeros": words(zeros, _AWQ),
                "scales": parts["scales"],
            }  # fmt: skip
        exact[name] = values
        tensors |= {f"{name}.{key}": part for key, part in parts.items()}
    for key, value in model.state_dict().items():
        if f"{key.removesuffix('.weight')}.qweight" not in tensors and ".experts." not in key:
            tensors[key] = value
    model.config.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": method, "bits": 4, "group_size": 32, "desc_act": act_order, "sym": False,
        "version": "gemm", "zero_point": True,
    }  # fmt: skip
    said["architectures"], said["dtype"] = [type(model).__name__], "float16"
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = model.float()
    with torch.no_grad():
        for name, weight in linear_weights(model):
            weight.copy_(exact[name])
    return model


def linear_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of them, experts as they are published: one by one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            yield name, module.weight
        elif name.endswith(".experts"):
            for e, (both, down) in enumerate(
                zip(module.gate_up_proj, module.down_proj, strict=True)
            ):
                gate, up = both.chunk(2)
                yield from ((f"{name}.{e}.gate_proj", gate), (f"{name}.{e}.up_proj", up))
                yield f"{name}.{e}.down_proj", down


@pytest.mark.parametrize(("method", "act_order"), [("gptq", False), ("gptq", True), ("awq", False)])
def test_published_checkpoints(method: str, act_order: bool, tmp_path: Path) -> None:
    stock = save_published(tmp_path, method, act_order)
    got = lmfuse.from_pretrained(tmp_path, compute="fp32", dtype=torch.float32)
    assert torch.allclose(logits(got), logits(stock), rtol=1e-4, atol=1e-4)
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(got.get_submodule(name).dequantize(), stock.get_submodule(name).weight)
    assert got.get_submodule(name).format.act_order is act_order
    assert type(got.lm_head) is torch.nn.Linear
    assert lmfuse.from_pretrained(tmp_path).dtype is F16
    got.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "ours")), logits(got))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_published_experts(method: str, tmp_path: Path) -> None:
    model = qwen3_moe()
    stock = save_published(tmp_path, method, model=model)
    got = lmfuse.from_pretrained(tmp_path, compute="fp32", dtype=torch.float32)
    assert isinstance(got.model.layers[0].mlp.experts, QuantizedExperts)
    assert torch.allclose(logits(got), logits(stock), rtol=1e-4, atol=1e-4)
    got.save_pretrained(tmp_path / "again")
    again = Auto.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(got))


def test_published_experts_with_an_order_of_columns(tmp_path: Path) -> None:
    save_published(tmp_path, "gptq", True, qwen3_moe())
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: .* \(desc_act\)"):
        lmfuse.from_pretrained(tmp_path)


def test_published_experts_with_biases(tmp_path: Path) -> None:
    save_published(tmp_path, "gptq", model=qwen3_moe())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.bias"] = torch.ones(64)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: its experts have biases"):
        lmfuse.from_pretrained(tmp_path)


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Auto.from_config(config).eval()


def test_published_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    save_published(tmp_path, "gptq")
    settings, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    said = json.loads(settings.read_text())

    def fails(match: str, **changed: Any) -> None:
        quant = {**said["quantization_config"], **changed}
        settings.write_text(json.dumps({**said, "quantization_config": quant}))
        with pytest.raises((ValueError, RuntimeError), match=match):
            lmfuse.from_pretrained(tmp_path)

    fails("format 'marlin'", checkpoint_format="marlin")
    fails("AWQ 'gemv' of 4 bits", quant_method="awq", version="gemv")
    fails("bits is 3", bits=3)
    data = file.read_bytes()
    for wrong in (struct.pack("<Q", 1 << 60) + data[8:], data[:-40], b"", b"\x80\x02"):
        file.unlink()  # threads of the loading that failed may still read what it was
        file.write_bytes(wrong)
        fails("is not a sound safetensors file")
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    fails("has no safetensors files")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
    )
    fails("is no file of its folder")


# --- GGUF -----------------------------------------------------------------------------------------

TYPES = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}


@pytest.mark.parametrize("kind", TYPES, ids=TYPES.values())
def test_gguf_blocks_are_kept(kind: int) -> None:
    quant = gguf.GGMLQuantizationType(kind)
    w = np.random.default_rng(0).standard_normal((40, 96), dtype=np.float32)
    blocks = gguf.quantize(w, quant)
    expected = torch.from_numpy(gguf.dequantize(blocks, quant))
    assert torch.equal(dequantize(pack_gguf(torch.from_numpy(blocks), kind)), expected)


def save_gguf(path: Path, kinds: dict[str, int] | int = 3) -> Any:
    """tiny() as llama.cpp would have written it; returns it with the values of the file."""
    model = tiny()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    for name, parameter in model.named_parameters():
        theirs = name.replace("model.layers.", "blk.").replace("model.", "")
        for ours, short in (
            ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("mlp.", "ffn_"),
            ("_proj", ""), ("input_layernorm", "attn_norm"), ("embed_tokens", "token_embd"),
            ("post_attention_layernorm", "ffn_norm"),
        ):  # fmt: skip
            theirs = theirs.replace(ours, short)
        theirs = "output_norm.weight" if theirs == "norm.weight" else theirs
        w = parameter.detach().numpy()
        heads = {"attn_q": 4, "attn_k": 2}.get(theirs.split(".")[-2])
        if heads:
            w = w.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(w.shape)
        if w.ndim == 1:
            writer.add_tensor(theirs, w)
            continue
        kind = kinds if isinstance(kinds, int) else kinds.get(theirs.split(".")[-2], 3)
        quant = gguf.GGMLQuantizationType(kind)
        blocks = gguf.quantize(w, quant)
        values = gguf.dequantize(blocks, quant).reshape(w.shape)
        if heads:
            values = values.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(w.shape)
        parameter.data = torch.from_numpy(values.copy())
        writer.add_tensor(theirs, blocks, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kinds", [2, 3, 8, {"token_embd": 8, "ffn_up": 6, "attn_v": 1}], ids=str)
def test_gguf_files(kinds: Any, tmp_path: Path) -> None:
    stock = save_gguf(tmp_path / "tiny.gguf", kinds)
    got = lmfuse.from_pretrained(tmp_path, gguf_file="tiny.gguf", compute="fp32")
    assert torch.allclose(logits(got), logits(stock), rtol=1e-4, atol=1e-5)
    for name, module in got.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.dequantize(), stock.get_submodule(name).weight)
    assert isinstance(got.lm_head, QuantizedLinear)
    assert got.lm_head.weight is got.model.embed_tokens.weight
    plain = type(got.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert plain is isinstance(kinds, dict)
    got.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "ours")), logits(got))
    assert lmfuse.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=BF16).dtype is BF16


def test_hostile_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    save_gguf(path)
    data = path.read_bytes()
    tensors = gguf_tensors(path)
    assert len(tensors) == 2 * 9 + 2

    def fails(match: str, wrong: bytes) -> None:
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=match):
            lmfuse.from_pretrained(tmp_path, gguf_file="tiny.gguf")

    huge = struct.pack("<Q", (1 << 64) - 8)
    fails("has 3 bytes", b"GGU")
    fails("does not begin with GGUF", b"PK34" + data[4:])
    fails("its version is 1", data[:4] + struct.pack("<I", 1) + data[8:])
    fails("there are 18446744073709551608 tensors", data[:8] + huge + data[16:])
    fails("there are 18446744073709551608 keys", data[:16] + huge + data[24:])
    fails("reaches beyond its end", data[:24] + huge + data[32:])
    fails("but the file ends at", data[:-64])
    name = b"token_embd.weight"
    at = data.index(name) + len(name)  # dimensions, shape, type, offset
    fails("has 9 dimensions", data[:at] + struct.pack("<I", 9) + data[at + 4 :])
    fails("has shape", data[: at + 4] + huge + data[at + 12 :])
    fails("has shape", data[: at + 4] + struct.pack("<Q", 0) + data[at + 12 :])
    fails("not a multiple of 32", data[: at + 4] + struct.pack("<Q", 33) + data[at + 12 :])
    fails("of type 99", data[: at + 20] + struct.pack("<I", 99) + data[at + 24 :])
    fails("askew or over another|but the file ends", data[: at + 24] + huge + data[at + 32 :])
    other = data.index(b"blk.0.attn_q.weight")
    again = data[:other] + b"blk.0.attn_k.weight" + data[other + 19 :]
    fails("two tensors called", again)


def test_gguf_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    save_gguf(path)
    data = path.read_bytes()
    for size in range(0, len(data), 997):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="GGUF"):
            gguf_tensors(path)


def test_pack_gguf_refuses() -> None:
    with pytest.raises(ValueError, match="type is 12"):
        pack_gguf(torch.zeros(2, 144, dtype=torch.uint8), 12)
    with pytest.raises(ValueError, match="blocks of 18 bytes"):
        pack_gguf(torch.zeros(2, 19, dtype=torch.uint8), 2)
