"""The steps of `generate` after the first, with less Python around the layers.

A step of a few milliseconds has thrown out of the caches all that Python looks at, and between two
runs of the decoder op transformers looks at a lot: 1.5 ms in SmolLM2, on a Zen 4. Here a step is
one op, or the embedding, the angles, the layers, the norm and the head, called as the model's own
forward calls them, where trying has shown that it does nothing else (`hf/step_parts.py`), and while
nobody looks at it; and its inputs are made of those of the step before in three operations, not in
twelve. With the loop around it (`hf/loop.py`) 0.25 ms are left of the 1.5.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmfuse.generation.cache import Cache
from lmfuse.hf.step_parts import Form, StepParts, look

# What a step is given, and what else of no consequence.
_GIVEN = {"input_ids", "past_key_values", "position_ids", "attention_mask"}
KNOWN = _GIVEN | {"use_cache", "logits_to_keep", "return_dict"}
_ROOM = 256  # columns of a mask that are made at a time


class Steps(nn.Module):
    """Mixin for transformers' models whose steps are prepared, and where they can be, run here."""

    fused_step: Form | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = getattr(cls, "fused_stock", None)
        for name, ours in (
            ("prepare_inputs_for_generation", _prepare),
            ("_update_model_kwargs_for_generation", _update),
        ):
            if getattr(stock, name, None) is getattr(GenerationMixin, name):
                setattr(cls, name, ours)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module."""
        if not torch.compiler.is_compiling() and not args:
            steps = of(self)
            logits = None if steps is None else steps.run(kwargs)
            if logits is not None:
                cache = kwargs["past_key_values"]
                return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return super().__call__(*args, **kwargs)


class Run:
    """Those of one `generate`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.looping = False  # in a loop that we know
        self.last: Tensor | None = None  # the mask of the next step,
        self.room = torch.empty(0)  # of which it is a part,
        self.hides = False  # whether it hides anything,
        self.padding: list[int] | None = None  # and of each row how many positions, if the first
        self.parts: StepParts | None = None
        self.looked = False
        self.positions: list[int] | None = None  # of the next step, where they are known,
        self.ahead = 0  # by so many tokens of what the model would be given

    def told(self, positions: Tensor | None) -> bool:
        """Whether these are enough to know where tokens are."""
        form: Form | None = self.model.fused_step
        return positions is not None or (form is not None and not form.placed)

    def longer(self, mask: Tensor, count: int = 1) -> Tensor:
        """`mask` with so many ones more in each row."""
        count += mask.shape[1]
        if mask is not self.last:
            seen = mask.bool()
            self.hides = not bool(seen.all())
            holes = self.hides and bool((seen[:, 1:] < seen[:, :-1]).any())
            self.padding = None if holes else (~seen).sum(1).tolist()
        if mask is not self.last or count > self.room.shape[1]:
            self.room = mask.new_ones((mask.shape[0], count + _ROOM))
            self.room[:, : mask.shape[1]] = mask
        self.last = self.room[:, :count]
        return self.last

    def run(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The logits [batch, 1, vocabulary], or None if the forward of the model has to say."""
        if not self.looping or not {"input_ids", "past_key_values"} <= kwargs.keys() <= KNOWN:
            return None
        ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        if ids is None or ids.shape[-1] != 1 or not self.told(positions):
            return None
        whole = self._whole(ids, _of_rows(positions, len(ids)), kwargs)
        return self._by_parts(ids, kwargs) if whole is None else whole[0]

    def next(
        self, tokens: Tensor, model_kwargs: dict[str, Any], all_ids: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The logits [batch, 1, vocabulary] after `tokens`, [batch, 1]; and where they are largest,
        if the op has looked.

        Args:
            model_kwargs: as `_update_model_kwargs_for_generation` left them; they go on, but lag
                behind while nobody needs them.
            all_ids: [batch, tokens], until now.
        """
        if self.positions is None:
            self.positions = _of_rows(model_kwargs.get("position_ids"), len(tokens))
        whole = self._whole(tokens, self.positions, model_kwargs)
        if whole is not None:
            self.positions = [position + 1 for position in self.positions]
            self.ahead += 1
            return whole
        self._catch_up(model_kwargs)
        logits = self._by_parts(tokens, model_kwargs)
        if logits is not None:
            self.ahead = 1
            self._catch_up(model_kwargs)
            return logits, None
        inputs = self.model.prepare_inputs_for_generation(
            all_ids(), next_sequence_length=1, **model_kwargs
        )
        outputs = self.model(**inputs, return_dict=True)
        self.model._update_model_kwargs_for_generation(outputs, model_kwargs)
        return outputs.logits[:, -1:], None

    def _catch_up(self, model_kwargs: dict[str, Any]) -> None:
        if self.ahead:
            if (positions := model_kwargs.get("position_ids")) is not None:
                model_kwargs["position_ids"] = positions + self.ahead
            if (mask := model_kwargs.get("attention_mask")) is not None:
                model_kwargs["attention_mask"] = self.longer(mask, self.ahead)
        self.positions, self.ahead = None, 0

    def _whole(
        self, ids: Tensor, positions: list[int], given: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Logits and where they are largest, by one op."""
        parts, mask = self._looked(), given.get("attention_mask")
        padding = [0] * len(ids) if mask is None else self.padding
        if parts is None or padding is None or not (mask is None or mask is self.last):
            return None
        return parts.whole(ids, positions, padding, given["past_key_values"])

    def _by_parts(self, ids: Tensor, given: dict[str, Any]) -> Tensor | None:
        """Logits, module by module."""
        parts, mask = self._looked(), given.get("attention_mask")
        if parts is None or not (mask is None or mask is self.last):
            return None
        seen = mask.bool() if mask is not None and self.hides else None
        return parts(ids, given.get("position_ids"), seen, given["past_key_values"])

    def _looked(self) -> StepParts | None:
        if not self.looked:
            self.parts, self.looked = look(self.model), True
        return self.parts


def _of_rows(positions: Tensor | None, rows: int) -> list[int]:
    """[rows, 1], or [1, 1] for all; anything where positions do not count."""
    if positions is None:
        return [0] * rows
    given: list[int] = positions.flatten().tolist()
    return given if len(given) == rows else given * rows


class _Here(threading.local):
    steps: Run | None = None


_here = _Here()


@contextmanager
def stepping(model: nn.Module) -> Iterator[None]:
    """Within it, this thread generates with `model`."""
    outer, _here.steps = _here.steps, Run(model)
    try:
        yield
    finally:
        _here.steps = outer


def looping(model: nn.Module) -> None:
    """From here on `generate` is in a loop of single steps, one after the other."""
    steps = of(model)
    if steps is not None:
        steps.looping = True


def of(model: nn.Module) -> Run | None:
    steps = _here.steps
    return steps if steps is not None and steps.model is model else None


def _prepare(
    self: Any,
    input_ids: Tensor,
    next_sequence_length: int | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    is_first_iteration: bool | None = False,
    **kwargs: Any,
) -> Any:
    """See transformers' `GenerationMixin.prepare_inputs_for_generation`."""
    steps = of(self)
    positions = kwargs.get("position_ids")
    if (
        steps is None
        or not steps.looping
        or is_first_iteration
        or next_sequence_length != 1
        or inputs_embeds is not None
        or type(past_key_values) is not Cache
        or positions is None
        or positions.shape[-1] != 1
        or attention_mask is not steps.last
        or not kwargs.keys() <= KNOWN
    ):
        given = (input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds)
        stock: Any = GenerationMixin.prepare_inputs_for_generation
        return stock(self, *given, is_first_iteration, **kwargs)
    inputs = {"input_ids": input_ids[:, -1:].contiguous(), "past_key_values": past_key_values}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    return {**inputs, **kwargs}


def _update(
    self: Any,
    outputs: Any,
    model_kwargs: dict[str, Any],
    is_encoder_decoder: bool = False,
    num_new_tokens: int = 1,
) -> dict[str, Any]:
    """See transformers' `GenerationMixin._update_model_kwargs_for_generation`."""
    steps = of(self)
    cache = model_kwargs.get("past_key_values")
    if (
        steps is None
        or not steps.looping
        or is_encoder_decoder
        or num_new_tokens != 1
        or type(cache) is not Cache
        or not model_kwargs.keys() <= KNOWN
        or outputs.get("past_key_values") is not cache
    ):
        updated: dict[str, Any] = GenerationMixin._update_model_kwargs_for_generation(
            self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        return updated
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is not None:
        model_kwargs["position_ids"] = positions[..., -1:] + 1  # of which a step takes the last
    if mask is not None:
        model_kwargs["attention_mask"] = steps.longer(mask)
    return model_kwargs
