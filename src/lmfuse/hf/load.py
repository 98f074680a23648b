"""`from_pretrained`: any checkpoint whose weights lmfuse can keep as they are."""

from __future__ import annotations

import os
from typing import Any

from lmfuse.quantization.config import WeightOnlyConfig


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    compute: str = "auto",
    block_scales: bool = False,
    **kwargs: Any,
) -> Any:
    """A model of transformers, whose quantized weights stay as they are published.

    | checkpoint                            | its weights become                                |
    |---------------------------------------|---------------------------------------------------|
    | GPTQ, 4 and 8 bits, act-order too     | int4, int8 groups, scales in their own dtype      |
    | AWQ, 4 bits, "gemm"                   | int4 groups                                       |
    | GGUF, tensors of Q4_0, Q4_1, Q8_0     | int4, int8 groups of 32; other types are unpacked |
    | saved by lmfuse, or not quantized     | as `AutoModelForCausalLM.from_pretrained` has it  |

    They are repacked one by one as they are read, never by way of floating numbers. Only
    safetensors and GGUF files are read, after their headers were checked. `lmfuse.optimize` then
    fuses the rest.

    Args:
        name: a folder, or a repository of the Hugging Face Hub, which is downloaded.
        gguf_file: the name of a GGUF file in it.
        compute, block_scales: as for `WeightOnlyConfig`; for GPTQ, AWQ and GGUF.
        kwargs: for transformers' `from_pretrained`: dtype, quantization_config …

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: a method, format or file that cannot be read, and why.
    """
    from lmfuse.hf import checkpoint

    how = WeightOnlyConfig(compute=compute, block_scales=block_scales)
    if gguf_file is not None:
        return checkpoint.load_gguf(name, gguf_file, how, kwargs)
    return checkpoint.load(name, how, kwargs)
