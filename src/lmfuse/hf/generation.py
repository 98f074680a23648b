"""`generate` with our cache, and continuous batching with our paged attention."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from lmfuse.generation.cache import Cache, Layer
from lmfuse.hf import attention, attention_modules, swap
from lmfuse.hf.inputs import Explains

_STATE = "_lmfuse_attention"

# Ways of generating that prepare a cache of their own.
_OWN_CACHE = (
    "cache_implementation",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
)


class FusedGeneration(Explains, swap.Fused):
    """A model that generates with `lmfuse.generation.Cache` where the caller named no cache."""

    config: Any
    generation_config: Any
    _supports_default_dynamic_cache: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Models are saved under the name of their class, and told from remote code by its module.
        stock = cls.fused_stock
        cls.__name__, cls.__qualname__ = stock.__name__, stock.__qualname__
        cls.__module__ = stock.__module__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `GenerationMixin.generate`."""
        if not _prepares_its_own(self, args, kwargs):
            cache = Cache(self.config.get_text_config(decoder=True))
            if cache.layer_class_to_replicate is not None or any(
                isinstance(layer, Layer) for layer in cache.layers
            ):
                kwargs["past_key_values"] = cache
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `ContinuousMixin.init_continuous_batching`."""
        before = self.config._attn_implementation
        if before != attention.NAME:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        self.config._attn_implementation = attention.PAGED_NAME
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.config._attn_implementation = before
            raise
        # What a manager that stops sets again.
        manager._original_attn_impl = before
        return manager


def _prepares_its_own(model: FusedGeneration, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether generate(*args, **kwargs) is to use another cache than ours, or none."""
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return True
    if any(
        kwargs.get(k) is not None for k in ("past_key_values", "assistant_model", "custom_generate")
    ):
        return True
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

    def setting(name: str) -> Any:
        found = kwargs.get(name, getattr(given, name, None))
        return getattr(model.generation_config, name, None) if found is None else found

    return setting("use_cache") is False or any(setting(k) is not None for k in _OWN_CACHE)


def join(model: nn.Module, done: swap.Report) -> None:
    """Gives the transformers models in `model` our attention and our cache; `leave` undoes it."""
    attention.register()
    for name, root in _roots(model):
        where = f"{name}.attention".lstrip(".")
        reason = _against(root)
        if reason is not None:
            done.stock[where] = reason
            continue
        if where in done.replaced:
            continue
        before = {n: m.config._attn_implementation for n, m in _models(root)}
        vars(root)[_STATE] = before
        attention_modules.choose(root, attention.NAME)
        done.replaced[where] = "attention"
        if isinstance(root, GenerationMixin) and root.can_generate():
            swap.put(root, swap.Swap(swap.subclass(FusedGeneration, type(root)), "generate"))


def leave(model: nn.Module) -> None:
    """Gives every transformers model in `model` the attention it had; classes are `swap`'s."""
    for module in model.modules():
        before = vars(module).pop(_STATE, None)
        if before is None:
            continue
        parts = dict(module.named_modules())
        for name, implementation in before.items():  # the outer ones set the inner ones, too
            if name in parts:
                parts[name].config._attn_implementation = implementation


def _roots(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The transformers models that are part of no other."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(not r or name.startswith(f"{r}.") for r, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return found


def _models(root: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    return [(n, m) for n, m in root.named_modules() if isinstance(m, PreTrainedModel)]


def _against(root: PreTrainedModel) -> str | None:
    """Why `root` keeps its attention, or None."""
    ours = attention_modules.covers(root)
    if not (ours or root._can_set_attn_implementation()):
        return "its attention does not go through transformers' AttentionInterface"
    if not (
        ours or root._supports_attention_backend or root._supports_sdpa or root._supports_flash_attn
    ):
        return "it declares support for no attention but its own"
    if any(m.config.output_attentions for _, m in _models(root)):
        return "config.output_attentions asks for attention weights, which lmfuse never stores"
    return None
