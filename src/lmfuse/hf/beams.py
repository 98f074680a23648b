"""The loop of `generate` with beams: beam search, and beam sample.

transformers keeps all that it knows of beams in tensors, and what they say in the order in which
`torch.topk` leaves equal sums: 1.9 ms of the 13 that a step of SmolLM2 takes with 4 beams on a
Zen 4, of which choosing among 4 * 49152 sums takes 0.6. Here a sequence is known by its last token
and the one that it continues, and tensors hold scores alone, which go through the operations of
transformers: so all that is returned has its bits. What a caller may look into is called and filled
as in `hf/loop.py`, and all else is left to transformers' own loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MaxLengthCriteria
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from lmfuse import functional
from lmfuse.hf import step
from lmfuse.hf.loop import Criteria, ordinary, understood

# Methods of a model that the loop of transformers calls, and this one does not.
_METHODS = (
    "_beam_search",
    "_has_unfinished_sequences",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_flatten_beam_dim",
    "_unflatten_beam_dim",
    "_gather_beams",
    "_get_top_k_continuations",
    "_get_running_beams_for_next_iteration",
    "_update_finished_beams",
    "_check_early_stop_heuristic",
    "_beam_search_has_unfinished_sequences",
)
_NEVER = -1.0e9  # added to the score of what must not be chosen


def search(
    model: Any,
    stock: Callable[..., Any],
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """What `stock`, the `_beam_search` of transformers, returns."""
    steps = step.of(model)
    if (
        steps is None
        or synced_gpus
        or not ordinary(model, _METHODS)
        or hasattr(model, "_reorder_cache")
        or not understood(steps, generation_config, stopping_criteria, model_kwargs)
        or not _fits(input_ids, generation_config, stopping_criteria)
    ):
        return stock(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            **model_kwargs,
        )
    criteria = Criteria(stopping_criteria, len(input_ids))
    found = _Search(model, steps, input_ids, generation_config, logits_processor, criteria)
    return found.run(model_kwargs)


def _fits(input_ids: Tensor, settings: Any, criteria: Any) -> bool:
    """Whether transformers would find room for all tokens."""
    room, memory = settings.max_length, settings.low_memory  # which it refuses in words
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    return not memory and room is not None and input_ids.shape[1] < min(lengths, default=0) <= room


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens: `token`, and those before it.

    Attributes:
        before: None for a prompt, which has no token.
        row: of the beam that it continues, or of the prompt.
    """

    before: _Sequence | None
    token: int
    row: int

    def parts(self) -> list[_Sequence]:
        """The prompt, and what became of it token by token."""
        found, part = [self], self.before
        while part is not None:
            found.append(part)
            part = part.before
        return found[::-1]


class _Search:
    """One call of the loop.

    Attributes:
        running: of each prompt the sequences that go on, with `sums` [batch, beams].
        best: of each prompt the best that have come to an end, with `scores` [batch, beams]; where
            `ended` is False, one that has not, as transformers has no others.
        open: of each prompt, whether what goes on may become better than the best.
    """

    def __init__(
        self,
        model: Any,
        steps: step.Run,
        input_ids: Tensor,
        settings: Any,
        processors: Any,
        criteria: Criteria,
    ) -> None:
        self.model, self.steps, self.settings = model, steps, settings
        self.processors, self.criteria = processors, criteria
        self.prompts = self.ids = input_ids
        self.new: list[tuple[list[int], Tensor]] = []  # of `ids`: rows that go on, with what
        self.count = input_ids.shape[1]
        self.beams = beams = settings.num_beams
        self.batch = batch = len(input_ids) // beams
        ends = settings._eos_token_tensor
        self.candidates = max(2, 1 + (0 if ends is None else len(ends))) * beams
        rows = [[_Sequence(None, -1, b * beams + i) for i in range(beams)] for b in range(batch)]
        self.running, self.best = rows, rows
        self.sums = torch.tensor([[0.0] + [_NEVER] * (beams - 1)] * batch)
        self.scores = torch.full((batch, beams), _NEVER)
        self.ended = [[False] * beams for _ in range(batch)]
        self.open = [True] * batch
        self.into: Tensor | None = None  # memory for what a step makes of its logits
        recorded = settings.return_dict_in_generate
        self.all_scores: Any = () if recorded and settings.output_scores else None  # a tuple
        self.all_logits: Any = () if recorded and settings.output_logits else None

    def run(self, model_kwargs: dict[str, Any]) -> Any:
        """See transformers' `GenerationMixin._beam_search`."""
        model, settings = self.model, self.settings
        first = not settings.is_assistant
        outputs = model._prefill(self.prompts, settings, model_kwargs, is_first_iteration=first)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits, outputs = outputs.logits[:, -1:], None
        while self._goes_on(logits):
            rows = [s.row for beams in self.running for s in beams]
            tokens = torch.tensor([[s.token] for beams in self.running for s in beams])
            self.new.append((rows, tokens))
            if rows != list(range(len(rows))):
                model_kwargs["past_key_values"].reorder_cache(torch.tensor(rows))
            logits, _ = self.steps.next(tokens, model_kwargs, self._all)
        return self._result(model_kwargs["past_key_values"])

    def _all(self) -> Tensor:
        """[rows, tokens] so far."""
        for rows, tokens in self.new:
            self.ids = torch.cat([self.ids[rows], tokens], 1)
        self.new = []
        return self.ids

    def _goes_on(self, logits: Tensor) -> bool:
        """Takes the next tokens by their logits, [rows, 1, vocabulary]; whether that was not the
        last time."""
        sums, places = self._chosen(logits)
        size, of_prompt = logits.shape[-1], range(self.candidates)
        found = [
            [_Sequence(beams[p // size], p % size, beams_at + p // size) for p in row]
            for beams, beams_at, row in zip(
                self.running, range(0, len(self.prompts), self.beams), places.tolist(), strict=True
            )
        ]
        self.count += 1
        flat = [s for row in found for s in row]
        ended = self.criteria.ended(
            [s.token for s in flat], self.count, lambda: self._longer(flat), self.all_scores
        )
        ends = [[ended[b * len(of_prompt) + i] for i in of_prompt] for b in range(self.batch)]
        self._keep_running(found, sums, ends)
        self._keep_best(found, sums, ends)
        self._look_ahead()
        filled = self.settings.early_stopping is True and all(map(all, self.ended))
        return any(self.open) and not filled and not all(ended)

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """For each prompt the sums and places of continuations, [batch, candidates]."""
        x = self._log_probs(logits[:, -1])
        if self.processors:
            x = self.processors(self._all(), x)
        if self.all_scores is not None:
            self.all_scores += (x.clone(),)
        x = x.view(self.batch, self.beams, -1)
        if not self.settings.do_sample:
            return functional.top_sums(x, self.sums, self.candidates)
        x = (x + self.sums.unsqueeze(-1)).flatten(1)
        places = torch.multinomial(nn.functional.softmax(x, -1), self.candidates)
        return x.gather(1, places), places

    def _log_probs(self, logits: Tensor) -> Tensor:
        if not self.processors and self.all_logits is None:  # nobody can keep them
            if self.into is None:
                self.into = torch.empty_like(logits, dtype=torch.float32)
            return torch.log_softmax(self.into.copy_(logits), -1, out=self.into)
        logits = logits.to(dtype=torch.float32, copy=True)
        if self.all_logits is not None:
            self.all_logits += (logits,)
        return nn.functional.log_softmax(logits, -1)

    def _longer(self, found: list[_Sequence]) -> Tensor:
        """[sequences, tokens]"""
        tokens = torch.tensor([[s.token] for s in found])
        return torch.cat([self._all()[[s.row for s in found]], tokens], 1)

    def _keep_running(
        self, found: list[list[_Sequence]], sums: Tensor, ends: list[list[bool]]
    ) -> None:
        if any(map(any, ends)):
            sums = sums + torch.tensor(ends) * _NEVER
        self.sums, order = torch.topk(sums, self.beams)
        self.running = _ordered(found, order)

    def _keep_best(
        self, found: list[list[_Sequence]], sums: Tensor, ends: list[list[bool]]
    ) -> None:
        """Of the sequences that come to an end here, those among the first `beams` count."""
        settings = self.settings
        scores = sums / self._weight(self.count)
        for b in range(self.batch):
            if settings.early_stopping is True and all(self.ended[b]):
                scores[b] += _NEVER
            if not self.open[b]:
                scores[b] += _NEVER
        done = [[end and i < self.beams for i, end in enumerate(row)] for row in ends]
        scores += ~torch.tensor(done) * _NEVER if any(map(any, done)) else _NEVER
        self.scores, order = torch.topk(torch.cat([self.scores, scores], 1), self.beams)
        self.best = _ordered([a + b for a, b in zip(self.best, found, strict=True)], order)
        self.ended = _ordered([a + b for a, b in zip(self.ended, done, strict=True)], order)

    def _look_ahead(self) -> None:
        settings = self.settings
        far = settings.early_stopping == "never" and settings.length_penalty > 0.0
        weight = self._weight(settings.max_length if far else self.count)
        hopes = (self.sums[:, 0] / weight).tolist()
        for b, (hope, ended) in enumerate(zip(hopes, self.ended, strict=True)):
            least = float(self.scores[b].min()) if any(ended) else _NEVER
            better = any(hope > (least if end else _NEVER) for end in ended)
            self.open[b] = self.open[b] and better

    def _weight(self, count: int) -> float:
        """What sums of sequences of so many tokens are divided by."""
        weight: float = (count - self.prompts.shape[1]) ** self.settings.length_penalty
        return weight

    def _result(self, cache: Any) -> Any:
        settings = self.settings
        pad, ends = settings._pad_token_tensor, settings._eos_token_tensor
        # transformers' words: a padding token 0 gives way to the end token
        fill = int(pad or ends[0]) if ends is not None else -1
        count = settings.num_return_sequences
        parts = [s.parts() for row in self.best for s in row[:count]]
        longest = max(map(len, parts)) - 1
        tokens = [[s.token for s in p[1:]] + [fill] * (longest + 1 - len(p)) for p in parts]
        rows = [[s.row for s in p[1:]] + [-1] * (longest + 1 - len(p)) for p in parts]
        prompts = self.prompts[[p[0].row for p in parts]]
        ids: Any = torch.cat([prompts, torch.tensor(tokens, dtype=torch.int64)], 1)
        if not settings.return_dict_in_generate:
            return ids
        scores: Any = self.scores[:, :count].flatten() if settings.output_scores else None
        beam_indices: Any = torch.tensor(rows, dtype=torch.int32)
        return GenerateBeamDecoderOnlyOutput(
            sequences=ids,
            sequences_scores=scores,
            scores=self.all_scores,
            logits=self.all_logits,
            beam_indices=beam_indices,
            past_key_values=cache,
        )


def _ordered(rows: list[list[Any]], order: Tensor) -> list[list[Any]]:
    return [[row[i] for i in places] for row, places in zip(rows, order.tolist(), strict=True)]
