"""Transformers models whose layers ran in the decoder op, and are others now than they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lmfuse
from lmfuse import hf
from test_decoder_models import generated, inputs, model_of
from test_hf_attention import TINY


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_layers_that_were_taken_away(family: str) -> None:
    """The last one of the list, which then ends as it did; or all of a kind."""
    stock = model_of(family)
    ours = lmfuse.optimize(stock)
    for beams in (1, 3):
        generated(ours, num_beams=beams)
    for keep in (slice(-1), slice(1)):
        for model in (stock, ours):
            base = model.base_model
            name = "h" if family == "gpt2" else "layers"
            if keep == slice(1):
                setattr(base, name, nn.ModuleList(getattr(base, name)[keep]))
            else:
                del getattr(base, name)[-1]
        for beams in (1, 3):
            assert torch.equal(generated(ours, num_beams=beams), generated(stock, num_beams=beams))


class Halved(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.tanh() / 2


class Halves(Halved):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(hidden_states), None


def each(model: Any, name: str) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, name)]


LATER: dict[str, Callable[[Any], Any]] = {
    "norm": lambda m: setattr(m.model.layers[1], "input_layernorm", Halved()),
    "norm of heads": lambda m: setattr(m.model.layers[1].self_attn, "q_norm", Halved()),
    "mlp": lambda m: setattr(m.model.layers[1], "mlp", Halved()),
    "attention": lambda m: setattr(m.model.layers[1], "self_attn", Halves()),
    "activation": lambda m: [setattr(x, "act_fn", nn.Tanh()) for x in each(m, "act_fn")],
    "epsilon": lambda m: [setattr(x, "eps", 0.5) for x in each(m, "eps")],
    "scale": lambda m: [setattr(x, "scaling", 0.9) for x in each(m, "scaling")],
    "angles": lambda m: [
        setattr(x, name, 1.4)
        for x in m.modules()
        for name in [*vars(x)]
        if name.endswith("attention_scaling")
    ],
}


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("what", LATER)
def test_modules_and_numbers_that_are_others_now(what: str, when: str, runs: list[int]) -> None:
    """Run as the modules that they are, until they are again what they were."""
    stock = model_of("gemma3_text")
    ours = lmfuse.optimize(stock)
    before = generated(ours) if when == "later" else None
    scales = [layer.self_attn.scaling for layer in ours.model.layers]
    runs.clear()
    for model in (stock, ours):
        LATER[what](model)
    for beams in (1, 3):
        assert torch.equal(generated(ours, num_beams=beams), generated(stock, num_beams=beams))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**inputs(True)).logits[:, -1], stock(**inputs(True)).logits[:, -1]
        )
    if what == "angles":  # which are given to the layers
        return
    assert 4 not in runs
    if what == "scale" and before is not None:
        for layer, scale in zip(ours.model.layers, scales, strict=True):
            layer.self_attn.scaling = scale
        assert torch.equal(generated(ours), before)
        assert 4 in runs


@pytest.mark.parametrize("where", ["", "model", "model.layers.1", "model.layers.1.mlp"])
def test_a_class_derived_to_change_its_forward(where: str) -> None:
    """By something that is told to it after it was tried."""
    stock = model_of()
    kind: Any = type(stock.get_submodule(where))
    told: dict[str, Any] = {"times": 1.0, "seen": 0}

    class Steered(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            told["seen"] += 1
            out = super().forward(*args, **kwargs)
            if isinstance(out, Tensor):
                return out * told["times"]
            name = "logits" if "logits" in out else "last_hidden_state"
            out[name] = out[name] * told["times"]
            return out

    stock.get_submodule(where).__class__ = Steered
    ours = lmfuse.optimize(stock)
    for times in (1.0, -1.0):
        told["times"] = times
        for beams in (1, 3):
            counts = []
            found = []
            for model in (ours, stock):
                told["seen"] = 0
                found.append(generated(model, num_beams=beams))
                counts.append(told["seen"])
            assert torch.equal(*found)
            assert counts[0] == counts[1]
    if where == "model.layers.1":
        assert "Steered's own" in hf.report(ours).stock[where]


def test_a_forward_that_adds_between_layers() -> None:
    """Qwen3-VL adds what it knows of an image after its first layers."""
    text = {**TINY, "head_dim": 16, "num_hidden_layers": 4}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    text["rope_parameters"]["rope_theta"] = 10000.0
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"out_hidden_size": 64, "patch_size": 4, "deepstack_visual_indexes": [0, 1]}
    tokens = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, vision_end_token_id=123, **tokens
    )
    torch.manual_seed(0)
    stock = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    ours = lmfuse.optimize(stock)
    assert hf.report(ours).replaced["model.language_model.layers"] == "stack of decoder layers"
    ids = torch.tensor([[5, 6, 122, 120, 120, 120, 120, 123, 7, 8]])
    image = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "pixel_values": torch.randn(16, 96)}
    given = {"input_ids": ids, "mm_token_type_ids": (ids == 120).int(), **image}
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**given).logits, stock(**given).logits, rtol=1e-4, atol=1e-4
        )
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), stock.generate(**given, **options))
