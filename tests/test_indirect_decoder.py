"""`indirect_cache_decoder`: all layers of a traced graph in one op, for whatever it is given."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import lmfuse
from lmfuse import functional
from lmfuse.functional import indirect_decoder
from lmfuse.hf import tracing
from test_decoder_layers import layers_of
from test_generation import make
from test_tracing import FAMILIES, close, family, showcases, trace

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
STEP = "lmfuse::decoder_indirect_step"


IDS = torch.randint(3, 97, (5, 16), generator=torch.Generator().manual_seed(1))


def given(model: Any, mask: Tensor, past: Any = None, tokens: int | None = None) -> dict[str, Any]:
    """Inputs for the last `tokens` of the positions that `mask` tells."""
    rows, length = mask.shape
    tokens = length if tokens is None else tokens
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    sample: dict[str, Any] = tracing.sample_inputs(model, rows, tokens, 1)
    return sample | {
        "input_ids": IDS[:rows, length - tokens : length],
        "attention_mask": mask,
        "position_ids": positions[:, length - tokens :],
        "past_key_values": sample["past_key_values"] if past is None else past,
    }


@pytest.fixture
def model() -> Any:
    return lmfuse.optimize(make())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gptj", "opt"])
def test_layers_are_one_op_of_a_graph(name: str, model: Any) -> None:
    kind, config = showcases()[name]
    for each in (model, lmfuse.optimize(kind(config()).eval())):
        graph = str(trace(each).inlined_graph)
        assert graph.count(STEP) == 1
        assert "lmfuse::attention" not in graph


@torch.no_grad()
def test_what_the_op_cannot_do_the_modules_do(model: Any) -> None:
    layers: Any = model.model.layers
    hook = layers[0].mlp.register_forward_hook(lambda *_: None)
    assert STEP not in str(trace(model).inlined_graph)
    hook.remove()
    assert STEP in str(trace(model).inlined_graph)
    sample = tracing.sample_inputs(model)
    small = torch.zeros((1, 1, 1, 1), dtype=torch.float8_e5m2)
    sample["past_key_values"] = tuple(
        (info, small.clone(), small.clone(), beams)
        for info, _, _, beams in sample["past_key_values"]
    )
    graph = torch.jit.trace(model, example_kwarg_inputs=sample, strict=False, check_trace=False)
    assert "lmfuse::attention_indirect_step" in str(graph.inlined_graph)
    assert STEP not in str(graph.inlined_graph)


# Padding on the left, on the right, in between, and a row without any token.
MASKS = torch.tensor(
    [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1], [0] * 7, [1] * 7]
)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_masks_of_any_form(name: str) -> None:
    """And windows: of what is hidden, too, they count every position."""
    model = lmfuse.optimize(make() if name == "llama" else family(name))
    graph = trace(model)
    assert STEP in str(graph.inlined_graph)
    for mask in (MASKS, MASKS[:1], MASKS[1:2], MASKS[[0, 4]]):
        first = given(model, mask)
        expected, left = model(**first), bool((mask[:, 1:] >= mask[:, :-1]).all())
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            logits, past = graph(**first)
        slow = [w for w in found if "7 tokens are taken one by one" in str(w.message)]
        assert len(slow) == (not left)
        seen = mask.bool()
        close(logits[seen], expected.logits[seen])
        for new in (1, 2):
            held = past[0][0].size(-2)
            longer = torch.cat([mask, torch.ones(len(mask), held - 7 + new).long()], 1)
            expected = model(**given(model, longer, expected.past_key_values, new))
            logits, past = graph(**given(model, longer, past, new))
            close(logits, expected.logits)


@torch.no_grad()
def test_caches_grow_and_may_be_gone_on_with_twice(model: Any) -> None:
    """What is remembered of a cache is that of its last step, not of one that somebody repeats."""
    model.config.text_max_length = 4
    graph, mask = trace(model), torch.ones(2, 12).long()
    _, past = graph(**given(model, mask[:, :3]))
    assert past[0][1].shape[0] == 4
    whole = model(**given(model, mask)).logits
    for end in (4, 5, 6, 12):
        tokens = end - past[0][0].size(-2)
        for _ in range(2):
            logits, after = graph(**given(model, mask[:, :end], past, tokens))
            close(logits, whole[:, end - tokens : end])
        past = after
    assert past[0][1].shape[0] == 16
    copies = tuple(tuple(x.clone() for x in layer) for layer in past)
    more = given(model, torch.ones(2, 13).long(), past, 1)
    expected = graph(**more)[0]
    assert torch.equal(graph(**more | {"past_key_values": copies})[0], expected)


@torch.no_grad()
def test_a_file_holds_the_layers() -> None:
    """Of int4, too; two graphs at once, and one that is gone."""
    model = lmfuse.optimize(make())
    quantized = lmfuse.quantize(make(), lmfuse.WeightOnlyConfig(bits=4, group_size=32))
    sample = given(model, torch.ones(2, 5).long())
    loaded = []
    for each in (model, lmfuse.optimize(quantized)):
        file = io.BytesIO()
        torch.jit.save(trace(each), file)
        file.seek(0)
        loaded.append((torch.jit.load(file), each(**sample).logits))
        assert STEP in str(loaded[-1][0].inlined_graph)
    for _ in range(2):
        for graph, logits in loaded:
            assert torch.equal(graph(**sample)[0], logits)
    del loaded[0], graph
    assert torch.equal(loaded[0][0](**sample)[0], logits)


@torch.no_grad()
def test_what_is_remembered_goes_with_the_caches(model: Any) -> None:
    gc.collect()
    known, graph = len(indirect_decoder._known), trace(model)
    mask = torch.ones(2, 4).long()
    _, past = graph(**given(model, mask[:, :3]))
    _, past = graph(**given(model, mask, past, 1))
    assert len(indirect_decoder._known) == known + 1
    cache = weakref.ref(past[0][1])
    del past
    gc.collect()
    assert cache() is None
    assert len(indirect_decoder._known) == known


@torch.no_grad()
def test_refusals() -> None:
    kind, config = showcases()["llama"]
    model = lmfuse.optimize(kind(config()).eval())
    layers = layers_of(model)
    x = torch.randn(2, 3, model.config.hidden_size)
    run: Any = layers._found(x)
    angles = model.model.layers[0].self_attn.rope.angles(3, torch.arange(3).expand(2, 3), 3)
    turned = {"sin": angles[:1], "cos": angles[1:]}

    def call(past: Any, **more: Any) -> Any:
        states = more.pop("hidden_states", x)
        return functional.indirect_cache_decoder(states, run.stack, past, **turned | more)

    def empty(rows: int = 2) -> Any:
        return tracing.sample_inputs(model, 1, 1, rows)["past_key_values"]

    _, past = call(empty())
    small = tuple((i, k.to(torch.float8_e5m2), v, b) for i, k, v, b in empty())
    other = (past[0], tuple(x.clone() for x in past[0][:2]) + past[1][2:])
    wide = (past[0], (past[1][0], past[1][1][..., :8], *past[1][2:]))
    short = (past[0], (past[1][0][:, :2, :2], *past[1][1:]))
    flat = ((past[0][0].view(3, 3), *past[0][1:]), past[1])
    for words, caches, more in (
        ("layer_past has 4 tensors, but must have four for each of 2 layers", past[:1], {}),
        (r"layer_past\[1\] is torch.float8_e5m2", small, {}),
        (r"layer_past\[3\] has 3 columns", empty(3), {}),
        (r"layer_past\[1\]", wide, {}),
        (r"layer_past\[0\] is torch.int64 of shape \(1, 2, 2, 1\)", short, {}),
        (r"layer_past\[0\] has shape \(3, 3\)", flat, {}),
        (r"layer_past\[1\] is torch.float32", past, {"hidden_states": x[:1]}),
        ("hidden_states has shape", past, {"hidden_states": x[0]}),
        (r"mask has shape \(2, 5\), but must be \[batch, L \+ seq\], \(2, 6\)", past,
         {"mask": torch.ones(2, 5, dtype=torch.bool)}),
        ("mask is torch.int64, but must be bool", past, {"mask": torch.ones(2, 6).long()}),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            call(caches, **more)
    assert call(other)[0].shape == x.shape
    for parents in (2, -1, 2**62):
        past[0][3][2] = parents
        with pytest.raises(ValueError, match=f"name row {parents} at position 2, but the batch"):
            call(past)
