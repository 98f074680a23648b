"""Siblings compute together, and give what each gives alone."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import lmfuse
from lmfuse import functional
from lmfuse.modules.pack import pack_model, unpack_model
from lmfuse.modules.siblings import SiblingLinear, join_siblings


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(40, 64, bias)
        self.k_proj = nn.Linear(40, 24, bias)
        self.v_proj = nn.Linear(40, 24, False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y = x if y is None else y
        return self.q_proj(x), self.k_proj(y), self.v_proj(y)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Attention, Attention]:
    """Alone, and together."""
    alone = Attention().to(request.param).eval()
    together = copy.deepcopy(alone)
    pack_model(alone)
    pack_model(together)
    assert join_siblings(together) == 1
    return alone, together


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("linear", "linear_concat"):
        stock = getattr(functional, name)

        def counted(
            *args: object, _stock: object = stock, _name: str = name, **kw: object
        ) -> object:
            calls.append(_name)
            return _stock(*args, **kw)  # type: ignore[operator]

        monkeypatch.setattr(functional, name, counted)
    return calls


@torch.no_grad()
def test_one_call_with_the_same_bits(
    pair: tuple[Attention, Attention], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = pair
    calls = _calls(monkeypatch)
    for rows in (1, 7, 70):
        x = torch.randn(2, rows, 40).to(alone.q_proj.weight.dtype)
        expected = alone(x)
        del calls[:]
        for y, e in zip(together(x), expected, strict=True):
            assert torch.equal(y, e)
        assert calls == ["linear_concat"]


@torch.no_grad()
def test_what_changes_in_between_counts(pair: tuple[Attention, Attention]) -> None:
    alone, together = pair
    x = torch.randn(3, 40).to(alone.q_proj.weight.dtype)
    together.q_proj(x)
    x.mul_(2)
    assert torch.equal(together.k_proj(x), alone.k_proj(x))
    together.q_proj(x)
    for model in pair:
        model.k_proj.weight.mul_(3)
    assert torch.equal(together.k_proj(x), alone.k_proj(x))
    together.q_proj(x)
    functional.rotary_embedding(  # an op of ours that writes in place
        x.view(1, 3, 1, 40),
        x.view(1, 3, 1, 40).clone(),
        torch.ones(9, 4),
        torch.ones(9, 4),
        8,
        True,
    )
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


@torch.no_grad()
def test_cross_attention_parts_them(
    pair: tuple[Attention, Attention], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = pair
    x, y = (torch.randn(5, 40).to(alone.q_proj.weight.dtype) for _ in range(2))
    calls = _calls(monkeypatch)
    for _ in range(3):
        expected = alone(x, y)
        del calls[:]
        for a, b in zip(together(x, y), expected, strict=True):
            assert torch.equal(a, b)
    assert calls == ["linear"] * 3


@torch.no_grad()
def test_two_threads(pair: tuple[Attention, Attention]) -> None:
    alone, together = pair
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for _ in range(50):
                x = torch.randn(2, 40, generator=generator).to(alone.q_proj.weight.dtype)
                if not all(map(torch.equal, together(x), alone(x))):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_elsewhere_each_works_alone(pair: tuple[Attention, Attention]) -> None:
    alone, together = pair
    x = torch.randn(3, 40).to(alone.q_proj.weight.dtype)
    for y, e in zip(together(x), alone(x), strict=True):  # grad mode
        assert torch.equal(y, e)
    with torch.inference_mode():
        x = x + 1
        for y, e in zip(together(x), alone(x), strict=True):
            assert torch.equal(y, e)


@torch.no_grad()
def test_copies_have_families_of_their_own(pair: tuple[Attention, Attention]) -> None:
    _, together = pair
    x = torch.randn(3, 40).to(together.q_proj.weight.dtype)
    for other in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert type(other.v_proj) is SiblingLinear
        assert other.q_proj.family.members == [other.q_proj, other.k_proj, other.v_proj]
        assert all(map(torch.equal, other(x), together(x)))


@torch.no_grad()
def test_unpacking(pair: tuple[Attention, Attention]) -> None:
    _, together = pair
    names = list(together.state_dict())
    unpack_model(together)
    assert type(together.k_proj) is nn.Linear
    assert not {"family", "place"} & set(vars(together.k_proj))
    assert list(together.state_dict()) == names


@torch.no_grad()
def test_optimize_joins_unless_told_not_to() -> None:
    x = torch.randn(3, 40)
    for concat_linear in (True, False):
        model = lmfuse.optimize(Attention().eval(), concat_linear=concat_linear)
        assert isinstance(model.q_proj, SiblingLinear) is concat_linear
        plain = lmfuse.restore(model)
        assert type(plain.q_proj) is nn.Linear
        plain(x)
