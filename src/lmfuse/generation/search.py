"""IPEX's decoding functions: bound to a model they change its `generate`; called, they decode.

    hf_beam_search = lmfuse.generation.hf_beam_search.__get__(model, model.__class__)
    setattr(model, "beam_search", hf_beam_search)
    model.generate(..., num_beams=4)  # the prompt runs once

transformers looks its loops up on the class of a model, so what is set on the instance is never
called. Binding one of the four therefore arms the model: from then on its `generate` shares
prompts, whichever loop it takes, and times tokens if `config.token_latency` says so. Models that
`lmfuse.optimize` returned do so without.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from lmfuse.generation import latency, sharing

Ids = int | list[int] | Tensor


class SharesPrompts:
    """Mixin for transformers' models: `generate` runs each prompt once, and times tokens."""

    config: Any

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `GenerationMixin.generate`.

        Returns:
            What it says, or (that, seconds of each step) if `config.token_latency` is set.
        """
        return _timed(self, super().generate, args, kwargs)  # type: ignore[misc]

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        return sharing.prefill(self, super()._prefill, *args, **kwargs)  # type: ignore[misc]


def arm(model: nn.Module) -> None:
    """Gives `model`, and no other of its class, what `SharesPrompts` gives a class.

    Raises:
        TypeError: not a model that transformers can generate with.
    """
    if not hasattr(type(model), "generate"):
        raise TypeError(
            f"{type(model).__name__} is no model that transformers generates with: derive it from "
            "transformers.GenerationMixin"
        )
    if not isinstance(model, SharesPrompts):
        # Not as methods, which pickle looks up by name.
        vars(model).update(
            generate=functools.partial(_generate, model),
            _prefill=functools.partial(_prefill, model),
        )


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    stock = functools.partial(type(self).generate, self)
    if isinstance(self, SharesPrompts):  # since it was armed
        return stock(*args, **kwargs)
    return _timed(self, stock, args, kwargs)


def _prefill(self: Any, *args: Any, **kwargs: Any) -> Any:
    return sharing.prefill(self, functools.partial(type(self)._prefill, self), *args, **kwargs)


def _timed(
    model: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`generate`, with times if they are wanted; its fourth argument is the stopping criteria."""
    if not latency.wanted(model) or isinstance(kwargs.get("custom_generate"), str):
        return generate(*args, **kwargs)
    head, tail = args[:3], args[4:]
    given = args[3] if len(args) > 3 else kwargs.pop("stopping_criteria", None)

    def run(criteria: StoppingCriteriaList) -> Any:
        if tail:
            return generate(*head, criteria, *tail, **kwargs)
        return generate(*head, stopping_criteria=criteria, **kwargs)

    return latency.timed(run, given)


class _Search:
    """A decoding function that arms the model which it is bound to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        arm(model)
        return functools.partial(self, model)

    def __reduce__(self) -> str:
        return self.__name__  # type: ignore[attr-defined, no-any-return]


@_Search
def hf_greedy_search(
    self: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    max_length: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: Ids | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    output_scores: bool | None = None,
    return_dict_in_generate: bool | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The most probable token at each step.

    Args:
        input_ids: [rows, tokens].
        logits_processor, stopping_criteria: lists; those of `generation_config` are not added.
        max_length: stop at so many tokens; if None and no criterion knows a length, that of the
            model's generation_config.
        pad_token_id, eos_token_id, output_attentions, output_hidden_states, output_scores,
            return_dict_in_generate: those of the model's generation_config if None.
        model_kwargs: attention_mask, past_key_values and what else the model takes;
            `generation_config` in place of the model's.

    Returns:
        [rows, tokens] ids, or what transformers' `generate` returns in a ModelOutput; with
        `config.token_latency` that and the seconds of each step.

    Raises:
        ValueError: nothing says when to stop.
    """
    settings = _settings(
        self,
        model_kwargs.pop("generation_config", None),
        max_length=max_length,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        output_scores=output_scores,
        return_dict_in_generate=return_dict_in_generate,
        do_sample=False,
        num_beams=1,
    )
    options = {"synced_gpus": synced_gpus, "streamer": streamer}
    return _decode(
        self, input_ids, logits_processor, stopping_criteria, settings, options, model_kwargs
    )


@_Search
def hf_sample(
    self: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    logits_warper: Any = None,
    max_length: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: Ids | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    output_scores: bool | None = None,
    return_dict_in_generate: bool | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A token drawn at each step; as `hf_greedy_search`, but for these.

    Args:
        logits_warper: more processors, after `logits_processor`.
        model_kwargs: a `generation_config` with do_sample False makes it `hf_greedy_search`.
    """
    given = model_kwargs.pop("generation_config", None)
    settings = _settings(
        self,
        given,
        max_length=max_length,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        output_scores=output_scores,
        return_dict_in_generate=return_dict_in_generate,
        do_sample=given is None or given.do_sample is not False,
        num_beams=1,
    )
    processors = [*(logits_processor or ()), *(logits_warper or ())]
    options = {"synced_gpus": synced_gpus, "streamer": streamer}
    return _decode(self, input_ids, processors, stopping_criteria, settings, options, model_kwargs)


@_Search
def hf_beam_search(
    self: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """The most probable continuations, `generation_config.num_beams` at a time.

    Args:
        input_ids: [batch * num_beams, tokens], each prompt in as many rows as there are beams.
        generation_config: the model's if None; do_sample makes it `hf_beam_sample`.
        logits_processor, stopping_criteria, model_kwargs: as in `hf_greedy_search`.

    Returns:
        [batch * num_return_sequences, tokens] ids or a ModelOutput, as `hf_greedy_search`.

    Raises:
        ValueError: the rows are no multiple of the beams, or nothing says when to stop.
    """
    settings = _settings(self, generation_config)
    options = {"synced_gpus": synced_gpus}
    return _decode(
        self, input_ids, logits_processor, stopping_criteria, settings, options, model_kwargs
    )


@_Search
def hf_beam_sample(
    self: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """As `hf_beam_search`, but continuations are drawn."""
    settings = _settings(self, generation_config, do_sample=True)
    options = {"synced_gpus": synced_gpus}
    return _decode(
        self, input_ids, logits_processor, stopping_criteria, settings, options, model_kwargs
    )


def _settings(model: Any, given: Any, **changed: Any) -> Any:
    """A generation config of one's own: `given` or that of the model, and what is not None."""
    base = model.generation_config if given is None else given
    settings, _ = model._prepare_generation_config(copy.deepcopy(base))
    settings.update(**{name: value for name, value in changed.items() if value is not None})
    settings.max_length = changed.get("max_length") or base.max_length  # not transformers' 20
    return settings


def _decode(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    settings: Any,
    options: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> Any:
    """Runs the loop of transformers that `settings` names, with what it takes for granted."""
    rows, tokens = input_ids.shape
    beams = settings.num_beams
    if rows % beams:
        raise ValueError(
            f"input_ids has {rows} rows, but must have a multiple of num_beams, {beams}"
        )
    model._prepare_special_tokens(settings, device=input_ids.device, batch_size=rows)
    criteria = _criteria(criteria, settings, tokens)
    model_kwargs = {"use_cache": settings.use_cache, **model_kwargs}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if takes_positions and model_kwargs.get("position_ids") is None:  # as `generate`
        model_kwargs["position_ids"] = model._prepare_position_ids_for_generation(
            input_ids, model_kwargs
        )
    mode = settings.get_generation_mode()
    longest = settings.max_length or model.config.max_position_embeddings
    model._prepare_cache_for_generation(settings, model_kwargs, mode, rows // beams, longest)
    loop = type(model)._beam_search if beams > 1 else type(model)._sample

    def run(criteria: StoppingCriteriaList) -> Any:
        return loop(
            model,
            input_ids,
            logits_processor=LogitsProcessorList(processors or ()),
            stopping_criteria=criteria,
            generation_config=settings,
            **options,
            **model_kwargs,
        )

    return latency.timed(run, criteria) if latency.wanted(model) else run(criteria)


def _criteria(given: Any, settings: Any, tokens: int) -> StoppingCriteriaList:
    """`given`, with the length and the end tokens of `settings` where it names none."""
    criteria = StoppingCriteriaList(given or ())
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    if settings.max_new_tokens:
        settings.max_length = tokens + settings.max_new_tokens
    settings.max_length = min(lengths, default=settings.max_length)
    if settings.max_length is None and (settings.num_beams > 1 or not criteria):
        raise ValueError("nothing says when to stop: give max_length, or a stopping criterion")
    if settings.max_length is not None and not lengths:
        criteria.append(MaxLengthCriteria(settings.max_length))
    eos = settings._eos_token_tensor
    if eos is not None and not any(hasattr(c, "eos_token_id") for c in criteria):
        criteria.append(EosTokenCriteria(eos))
    return criteria
