"""`generate` with our cache, and continuous batching with our paged attention."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, masking_utils
from transformers.generation.configuration_utils import GenerationMode

from lmfuse.generation.cache import Cache, Layer
from lmfuse.generation.processors import quickened
from lmfuse.generation.search import SharesPrompts
from lmfuse.generation.tuples import TupleCache, placeholders
from lmfuse.hf import (
    attention,
    attention_modules,
    beams,
    config,
    decoder,
    decoder_join,
    loop,
    step,
    step_parts,
    swap,
)
from lmfuse.hf.inputs import Explains
from lmfuse.hf.tracing import TakesTuples, forget_graphs

# Ways of generating for which our cache is the better DynamicCache.
_LOOPS = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class FusedGeneration(Explains, step.Steps, SharesPrompts, TakesTuples, swap.Fused):
    """A model that generates with `lmfuse.generation.Cache` where the caller named no cache."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Models are saved under the name of their class, and told from remote code by its module.
        stock = cls.fused_stock
        cls.__name__, cls.__qualname__ = stock.__name__, stock.__qualname__
        cls.__module__ = stock.__module__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `GenerationMixin.generate`."""
        with decoder.generating(), step.stepping(self):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Ours, where transformers prepares a DynamicCache for a loop that we know.

        Not for what is compiled: Dynamo breaks its graph at our lists of slots, and traces a
        DynamicCache.
        """
        settings, model_kwargs, mode, batch = (*args, *kwargs.values())[:4]
        done = super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if mode in _LOOPS:
            step.looping(self)
        if (
            type(cache) is DynamicCache
            and not getattr(cache, "_is_user_defined", False)
            and mode in _LOOPS
            and settings.cache_implementation is None
            and not any(map(_compiled, self.modules()))
        ):
            if "trace_graph" in vars(self):
                model_kwargs["past_key_values"] = TupleCache(placeholders(self.config, batch))
                return done
            ours = Cache(self.config.get_text_config(decoder=True))
            if ours.layer_class_to_replicate is not None or any(
                isinstance(layer, Layer) for layer in ours.layers
            ):
                model_kwargs["past_key_values"] = ours
        return done

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        return loop.sample(self, super()._sample, *args, **kwargs)  # type: ignore[misc]

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        return beams.search(self, super()._beam_search, *args, **kwargs)  # type: ignore[misc]

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Masks for a cache of fixed length, by the config that says whose attention it is."""
        base: Any = self.base_model
        if isinstance(base.config, config.View):
            kwargs["config"] = base.config
        make = getattr(
            super(), "create_masks_for_generate", masking_utils.create_masks_for_generate
        )
        return make(**kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return quickened(super()._get_logits_processor(*args, **kwargs))  # type: ignore[misc]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """See transformers; our own names are not written into the caller's config."""
        if attn_implementation == attention.NAME:
            config.rename(self, attention.NAME)  # type: ignore[arg-type]
            if isinstance(self.config, config.View) and self.base_model is not self:
                self.config = self.config.lmfuse_stock  # continuous batching gave it the other
        elif isinstance(attn_implementation, dict):
            # By part of the config: the parts that modules know are views.
            base: Any = self.base_model
            given, self.config = self.config, base.config
            try:
                super().set_attn_implementation(  # type: ignore[misc]
                    attn_implementation, *args, **kwargs
                )
            finally:
                self.config = given
            config.tell(self, (attention.NAME, attention.PAGED_NAME))  # type: ignore[arg-type]
        else:
            super().set_attn_implementation(  # type: ignore[misc]
                attn_implementation, *args, **kwargs
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `ContinuousMixin.init_continuous_batching`."""
        if config.name(self) != attention.NAME:  # type: ignore[arg-type]
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        base: Any = self.base_model
        self.config = base.config  # of which the manager asks for the name
        config.rename(self, attention.PAGED_NAME)  # type: ignore[arg-type]
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.set_attn_implementation(attention.NAME)
            raise
        # What a manager that stops sets again.
        manager._original_attn_impl = attention.NAME
        return manager


def join(model: nn.Module, done: swap.Report) -> None:
    """Gives the transformers models in `model` our attention and our cache; `leave` undoes it."""
    attention.register()
    generating: list[PreTrainedModel] = []
    for name, root in _roots(model):
        where = f"{name}.attention".lstrip(".")
        reason = _against(root)
        if reason is not None:
            done.stock[where] = reason
            continue
        if where in done.replaced:
            continue
        attention_modules.choose(root, attention.NAME)
        done.replaced[where] = "attention"
        if isinstance(root, GenerationMixin) and root.can_generate():
            swap.put(root, swap.Swap(swap.subclass(FusedGeneration, type(root)), "generate"))
            generating.append(root)
    decoder_join.join(model, done)
    for root in generating:
        if (form := step_parts.find(root)) is not None:
            stock = type(root).fused_stock  # type: ignore[attr-defined]
            swap.put(root, swap.Swap(swap.subclass(FusedGeneration, stock, fused_step=form), ""))


def leave(model: nn.Module) -> None:
    """Gives every transformers model in `model` the attention it had; classes are `swap`'s."""
    for module in model.modules():
        forget_graphs(module)
    config.take(model)


def _compiled(module: nn.Module) -> bool:
    """Whether torch.compile was called on `module` or its forward."""
    return (
        "_orig_mod" in module._modules  # torch.compile(module); next: module.compile()
        or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _roots(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The transformers models that are part of no other."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(not r or name.startswith(f"{r}.") for r, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return found


def _against(root: PreTrainedModel) -> str | None:
    """Why `root` keeps its attention, or None."""
    ours = attention_modules.covers(root)
    if not (ours or root._can_set_attn_implementation()):
        return "its attention does not go through transformers' AttentionInterface"
    if not (
        ours or root._supports_attention_backend or root._supports_sdpa or root._supports_flash_attn
    ):
        return "it declares support for no attention but its own"
    models = [m for m in root.modules() if isinstance(m, PreTrainedModel)]
    if any(m.config.output_attentions for m in models):
        return "config.output_attentions asks for attention weights, which lmfuse never stores"
    return None
