"""DecoderLayers: the showcases' layers in one op give what they give one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfuse
from lmfuse.functional._decoder_cache import Presents
from lmfuse.modules import DecoderLayers, QuantizedLinear
from lmfuse.quantization import WeightOnlyConfig
from test_examples import MODELS, VOCAB, _randomized

NORMS_LAST = "opt, untied, norms last, narrow embedding, gelu"  # no layer that the op computes


@pytest.fixture(params=[name for name in MODELS if name != NORMS_LAST])
def model(request: pytest.FixtureRequest) -> Any:
    _, kind, config = MODELS[request.param]
    torch.manual_seed(0)
    return lmfuse.optimize(_randomized(kind(config())), inplace=True)


@pytest.fixture
def llama() -> Any:
    _, kind, config = MODELS["llama"]
    torch.manual_seed(0)
    return lmfuse.optimize(_randomized(kind(config())), inplace=True)


def layers_of(model: nn.Module) -> DecoderLayers:
    return next(m for m in model.modules() if isinstance(m, DecoderLayers))


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


class Apart:
    """A model whose layers run one after the other: somebody listens."""

    def __init__(self, model: nn.Module) -> None:
        self.layer = layers_of(model)[0]

    def __enter__(self) -> None:
        self.hook = self.layer.register_forward_hook(lambda *_: None)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def placeholders(model: Any, columns: int) -> Any:
    none = torch.zeros((1, 0, 0, 1), dtype=torch.int64), torch.zeros(1, 1, 1, 1)
    return tuple(
        (*none, none[1], torch.zeros(1, columns, dtype=torch.int64)) for _ in layers_of(model)
    )


@torch.no_grad()
def steps(model: Any, columns: int, shared: bool, padded: bool, whole: bool) -> Tensor:
    """The logits of a prompt and of five steps, before each of which the rows are reordered."""
    batch = 2 if shared else columns
    prompt = ids(batch, 6)
    mask = torch.ones_like(prompt)
    if padded:
        mask[0, :3] = 0
    past = placeholders(model, columns)
    out = model(prompt, attention_mask=mask, past_key_values=past)
    assert isinstance(out.past_key_values, Presents) == whole
    found = [out.logits[mask.bool()]]
    mask = mask.repeat_interleave(columns // batch, 0)
    parents = torch.arange(columns)
    random = torch.Generator().manual_seed(2)
    for step in range(5):
        mask = torch.cat([mask, mask.new_ones(columns, 1)], 1)
        tokens = ids(columns, 9)[:, step : step + 1]
        positions = mask.sum(1, keepdim=True) - 1
        out = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=model._reorder_cache(out.past_key_values, parents),
        )
        assert isinstance(out.past_key_values, Presents) == whole
        found.append(out.logits.flatten(0, 1))
        if shared:
            half = columns // 2  # beams stay with their prompt
            moved = torch.randint(half, (2, half), generator=random) + torch.tensor([[0], [half]])
            parents = moved.flatten()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("columns", "shared", "padded"),
    [(1, False, False), (3, False, True), (6, True, False), (6, True, True), (2, True, False)],
)
def test_gives_what_the_layers_give(model: Any, columns: int, shared: bool, padded: bool) -> None:
    found = steps(model, columns, shared, padded, whole=True)
    with Apart(model):
        expected = steps(model, columns, shared, padded, whole=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("bits", "compute"), [(8, None), (4, None), (4, "int8"), (4, "fp32")], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gptj", "opt"])
def test_quantized_layers_run_whole(name: str, bits: int, compute: str | None) -> None:
    """Each with the compute that it has, also one that was set later."""
    _, kind, config = MODELS[name]
    torch.manual_seed(0)
    plain = _randomized(kind(config()))
    quantized = lmfuse.quantize(plain, WeightOnlyConfig(bits, group_size=32))
    model = lmfuse.optimize(quantized, inplace=True)
    linears = [m for m in layers_of(model).modules() if isinstance(m, QuantizedLinear)]
    assert linears
    before = steps(model, 2, False, True, whole=True)
    changed = [m for m in linears[::2] if compute not in (None, m.compute)]
    for linear in changed:
        linear.compute = compute
    found = steps(model, 2, False, True, whole=True)
    with Apart(model):
        expected = steps(model, 2, False, True, whole=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert torch.equal(found, before) != bool(changed)


def test_goes_on_where_the_layers_were(llama: Any) -> None:
    """From tuples that the modules made, and the other way round."""
    with torch.no_grad():
        expected = llama(ids(2, 9)).logits[:, -1]
        for first, second in ((True, False), (False, True)):
            out = None
            for whole, part in ((first, slice(0, 5)), (second, slice(5, 9))):
                past = None if out is None else out.past_key_values
                if whole:
                    out = llama(ids(2, 9)[:, part], past_key_values=past)
                else:
                    with Apart(llama):
                        out = llama(ids(2, 9)[:, part], past_key_values=past)
                assert isinstance(out.past_key_values, Presents) == whole
            torch.testing.assert_close(out.logits[:, -1], expected, rtol=0, atol=1e-4)


def test_caches_grow(llama: Any) -> None:
    layers_of(llama).text_max_length = 4
    with torch.no_grad():
        expected = llama(ids(2, 12)).logits
        past, found = None, []
        for i in range(12):
            out = llama(ids(2, 12)[:, i : i + 1], past_key_values=past)
            past = out.past_key_values
            found.append(out.logits)
    assert past[0][1].shape[0] == 16
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-4)


def runs_whole(model: Any, **inputs: Any) -> bool:
    out = model(**{"input_ids": ids(1, 5), **inputs})
    return isinstance(out.past_key_values, Presents)


def _replace_forward(model: Any) -> None:
    mlp = layers_of(model)[1].mlp
    mlp.forward = mlp.forward


WATCHERS: dict[str, Callable[[Any], object]] = {
    "a hook": lambda m: layers_of(m)[1].mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: layers_of(m)[0].register_forward_pre_hook(lambda *_: None),
    "a forward on the instance": _replace_forward,
    "stock weights": lmfuse.restore,
}


@pytest.mark.parametrize("watcher", WATCHERS)
@torch.no_grad()
def test_leaves_the_layers_to_who_looks(llama: Any, watcher: str) -> None:
    assert runs_whole(llama)
    WATCHERS[watcher](llama)
    assert not runs_whole(llama)


def test_leaves_what_the_op_cannot(llama: Any) -> None:
    assert not runs_whole(llama)  # in grad mode
    with torch.no_grad():
        assert runs_whole(llama)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not runs_whole(llama)
        holes = torch.tensor([[1, 0, 1, 1, 1]])
        assert not runs_whole(llama, attention_mask=holes)
        fp8 = [list(layer) for layer in placeholders(llama, 1)]
        for layer in fp8:
            layer[1] = layer[2] = torch.zeros(1, 1, 1, 1, dtype=torch.float8_e5m2)
        assert not runs_whole(llama, past_key_values=tuple(map(tuple, fp8)))


@torch.no_grad()
def test_a_norm_the_op_does_not_know() -> None:
    _, kind, config = MODELS[NORMS_LAST]
    assert not runs_whole(lmfuse.optimize(kind(config()).eval()))


@torch.no_grad()
def test_sees_new_weights(llama: Any) -> None:
    before = llama(ids(1, 5)).logits
    layer = layers_of(llama)[1]
    layer.mlp.down_proj.weight = nn.Parameter(torch.zeros_like(layer.mlp.down_proj.weight))
    layer.input_layernorm.weight.mul_(2.0)
    found = llama(ids(1, 5))
    assert isinstance(found.past_key_values, Presents)
    with Apart(llama):
        expected = llama(ids(1, 5)).logits
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(before, expected)


@torch.no_grad()
def test_copies_have_weights_of_their_own(llama: Any) -> None:
    before = llama(ids(1, 5)).logits
    other = copy.deepcopy(llama)
    for parameter in layers_of(other).parameters():
        if parameter.dim() == 1:
            parameter.mul_(3.0)
    assert not torch.allclose(other(ids(1, 5)).logits, before)
    assert torch.equal(llama(ids(1, 5)).logits, before)
