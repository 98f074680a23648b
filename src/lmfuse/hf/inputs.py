"""Inputs that a transformers model cannot take, refused in words.

As in the functions of lmfuse, the model looks first, and what was wrong is found out when it
failed: a forward that is right pays nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Explains(nn.Module):
    """A model whose forward says what was wrong with its inputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.

        Raises:
            ValueError: no token, or more tokens than the model has positions.
        """
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            reason = _reason(self, args, kwargs, error)
            if reason is None:
                raise
            raise reason from error

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `GenerationMixin.generate`.

        Raises:
            ValueError: no token.
        """
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        except IndexError as error:
            given = {"input_ids": args[0] if args else kwargs.get("inputs"), **kwargs}
            reason = _empty(given)
            if reason is None:
                raise
            raise reason from error


def _reason(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Exception | None:
    """What is wrong with the inputs of a forward that failed; None if it is not known."""
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    given |= given.pop("kwargs", {})
    cache = given.get("past_key_values")
    if (reason := _empty(given)) is not None:
        return reason
    if not isinstance(error, (IndexError, ValueError)) and "bounds" not in str(error):
        return None
    total = _seen(cache) + max((tokens.shape[1] for _, tokens in _tokens(given)), default=0)
    limit = _positions(model.config)
    if limit is not None and total > limit:
        return ValueError(f"{total} tokens are more than this model has positions, {limit}")
    return None


def _tokens(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        tokens = given.get(name)
        if isinstance(tokens, Tensor) and tokens.dim() == dims:
            yield name, tokens


def _empty(given: dict[str, Any]) -> Exception | None:
    for name, tokens in _tokens(given):
        if tokens.shape[1] == 0:
            return ValueError(
                f"{name} has shape {tuple(tokens.shape)}, but must have at least one token"
            )
    return None


def _seen(cache: Any) -> int:
    """How many tokens the cache held when the forward failed, if it can tell: those of the layer
    with the fewest, for others may have got the new ones already."""
    lengths = [layer.get_seq_length() for layer in getattr(cache, "layers", ())]
    return min(lengths, default=0)


def _positions(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "n_positions", "max_target_positions")
    return next((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), None)
