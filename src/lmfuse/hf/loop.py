"""The loop of `generate` that adds one token after the other: greedy search and sampling.

transformers asks its criteria and the rest of its loop for some twenty small tensors a token, with
code that the weights have just thrown out of the caches: 0.4 ms of the 8 that a step of SmolLM2
takes on a Zen 4. Here what these tensors say is said by numbers, and a step of which all parts are
known (`hf/step.py`) is called without its inputs being prepared. What transformers would return is
returned, bit for bit; what a caller may look into (processors, criteria, streamers, scores) is
called and filled as ever, with the tensors it expects. All else is left to transformers' own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lmfuse import functional
from lmfuse.generation.cache import Cache
from lmfuse.hf import step

# Methods of a model that the loop of transformers calls, and this one does not.
_METHODS = (
    "_sample",
    "_has_unfinished_sequences",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
)


def sample(
    model: Any,
    stock: Callable[..., Any],
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What `stock`, the `_sample` of transformers, returns."""
    steps = step.of(model)
    if (
        steps is None
        or synced_gpus
        or not ordinary(model, _METHODS)
        or not understood(steps, generation_config, stopping_criteria, model_kwargs)
    ):
        return stock(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    criteria = Criteria(stopping_criteria, len(input_ids))
    loop = _Loop(model, steps, generation_config, logits_processor, criteria, streamer)
    return loop.run(input_ids, model_kwargs)


def ordinary(model: Any, methods: Sequence[str]) -> bool:
    """Whether a loop over `model` that calls these is the one that transformers has."""
    stock = type(model).fused_stock
    return type(model).fused_step is not None and all(
        getattr(stock, name) is getattr(GenerationMixin, name) and name not in vars(model)
        for name in methods
    )


def understood(steps: step.Run, settings: Any, criteria: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked for that the loops here do not do."""
    looks = settings.return_dict_in_generate and (
        settings.output_attentions or settings.output_hidden_states
    )
    ends = any(hasattr(c, "eos_token_id") for c in criteria)
    return (
        not looks
        and not (ends and settings._pad_token_tensor is None)
        and settings.compile_config is None
        and type(model_kwargs.get("past_key_values")) is Cache
        and steps.told(model_kwargs.get("position_ids"))
        and model_kwargs.get("use_cache") is True
        and model_kwargs.keys() <= step.KNOWN
    )


class Criteria:
    """Stopping criteria; of those that are known, what they say without tensors.

    Attributes:
        pads: rows that have come to an end get padding.
    """

    def __init__(self, given: Any, rows: int) -> None:
        self.lengths = [c for c in given if type(c) is MaxLengthCriteria]
        ends = [c for c in given if type(c) is EosTokenCriteria]
        known = {*map(id, self.lengths), *map(id, ends)}
        self.others = StoppingCriteriaList(c for c in given if id(c) not in known)
        self.ends = {int(token) for c in ends for token in c.eos_token_id}
        self.pads = any(hasattr(c, "eos_token_id") for c in given)
        self.stopped = [False] * rows

    def met(self, tokens: list[int], count: int, ids: Callable[[], Tensor], scores: Any) -> bool:
        """Whether all rows have come to an end, with these tokens the last of `count`."""
        found = self.ended(tokens, count, ids, scores)
        self.stopped = [a or b for a, b in zip(self.stopped, found, strict=True)]
        return all(self.stopped)

    def ended(
        self, tokens: list[int], count: int, ids: Callable[[], Tensor], scores: Any
    ) -> list[bool]:
        """Which rows come to an end with these tokens, the last of `count`."""
        found = [token in self.ends for token in tokens]
        for criterion in self.lengths:
            positions = criterion.max_position_embeddings
            if count >= criterion.max_length:
                found = [True] * len(tokens)
            elif positions is not None and count > positions:
                criterion(ids(), scores)  # which warns
        if self.others:
            others = self.others(ids(), scores).tolist()
            found = [a or b for a, b in zip(found, others, strict=True)]
        return found


class _Loop:
    """One call of the loop."""

    def __init__(
        self,
        model: Any,
        steps: step.Run,
        settings: Any,
        processors: Any,
        criteria: Criteria,
        streamer: Any,
    ) -> None:
        self.model, self.steps, self.settings = model, steps, settings
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        recorded = settings.return_dict_in_generate
        self.scores: Any = () if recorded and settings.output_scores else None  # a tuple
        self.logits: Any = () if recorded and settings.output_logits else None

    def run(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """See transformers' `GenerationMixin._sample`."""
        model, settings, criteria = self.model, self.settings, self.criteria
        self.ids, self.new, self.count = input_ids, [], input_ids.shape[1]
        first = not settings.is_assistant
        outputs = model._prefill(input_ids, settings, model_kwargs, is_first_iteration=first)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits, largest, outputs = outputs.logits[:, -1:].clone(), None, None
        with model._optimize_model_for_decode():
            while True:
                tokens = self._padded(self._chosen(logits, largest))
                self.new.append(tokens)
                self.count += 1
                met = criteria.met(tokens.flatten().tolist(), self.count, self._all, self.scores)
                if self.streamer is not None:
                    self.streamer.put(tokens.squeeze(1))
                if met:
                    break
                logits, largest = self.steps.next(tokens, model_kwargs, self._all)
        if self.streamer is not None:
            self.streamer.end()
        if not settings.return_dict_in_generate:
            return self._all()
        ids: Any = self._all()
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=self.scores,
            logits=self.logits,
            past_key_values=model_kwargs["past_key_values"],
        )

    def _all(self) -> Tensor:
        """[rows, tokens] so far."""
        if self.new:
            self.ids = torch.cat([self.ids, *self.new], 1)
            self.new = []
        return self.ids

    def _chosen(self, logits: Tensor, largest: Tensor | None) -> Tensor:
        """The next tokens, [rows, 1]; those of the largest logits may be known."""
        recorded = self.scores is not None or self.logits is not None
        if not (self.processors or recorded or self.settings.do_sample):
            return functional.argmax(logits) if largest is None else largest
        logits = logits[:, -1].to(dtype=torch.float32, copy=True)
        scores = self.processors(self._all(), logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if not self.settings.do_sample:
            return functional.argmax(scores).unsqueeze(1)
        return torch.multinomial(nn.functional.softmax(scores, -1), 1)

    def _padded(self, tokens: Tensor) -> Tensor:
        """Padding for the rows that came to an end before."""
        stopped = self.criteria.stopped
        if not self.criteria.pads or not any(stopped):
            return tokens
        pad = self.settings._pad_token_tensor
        return torch.where(torch.tensor(stopped).unsqueeze(1), pad, tokens)
