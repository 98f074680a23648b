"""GGUF files by way of transformers' own names and shapes; blocks that lmfuse keeps stay blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from lmfuse.hf.checkpoint import Lazy, load_state
from lmfuse.quantization.config import WeightOnlyConfig
from lmfuse.quantization.gguf import BLOCKS, KEPT, GgufTensor, gguf_tensors, pack_gguf


def load(path: Path, how: WeightOnlyConfig, kwargs: dict[str, Any]) -> Any:
    """See `lmfuse.hf.from_pretrained`."""
    tensors = gguf_tensors(path)  # before any other reader sees the file
    where = {"gguf_file": path.name, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(path.parent, **where)
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        empty = auto.from_config(config)
    file = _File(path, empty, config)
    state: dict[str, Any] = {}
    layers: list[str] = []
    for name, tensor in tensors.items():
        theirs = file.names.get(name)
        if theirs is None:
            continue  # as transformers: what the model has no use for, such as rope tables
        layer = theirs.removesuffix(".weight")
        if file.keeps(tensor, empty, layer):
            state[theirs] = Lazy(file.packed(tensor))
            layers.append(layer)
        else:
            state[theirs] = Lazy(file.plain(tensor), "F32")
    layers += _tied(empty, layers)
    if not layers:
        raise ValueError(
            f"{path} has no tensor of {', '.join(KEPT.values())} for a linear layer: "
            "load it with transformers, and lmfuse.quantize it"
        )
    return load_state(config, state, how, layers, {"dtype": torch.float32, **kwargs})


def _tied(model: Any, layers: list[str]) -> list[str]:
    """The layers that hold the same weight as one of `layers`, under another name."""
    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    return [
        target.removesuffix(".weight")
        for target, source in pairs
        if source.removesuffix(".weight") in layers and target.removesuffix(".weight") not in layers
    ]


class _File:
    def __init__(self, path: Path, model: Any, config: Any) -> None:
        metadata, _ = read_gguf_metadata(str(path))
        kind: Any = TENSOR_PROCESSORS.get(metadata["general.architecture"], TensorProcessor)
        self.path = path
        self.processor = kind(config=config.to_dict())
        try:
            self.names: dict[str, str] = get_gguf_hf_weights_map(model, self.processor)
        except NotImplementedError as error:
            raise ValueError(f"{path}: {error}") from None
        self.data = np.memmap(path, mode="r", dtype=np.uint8)

    def raw(self, tensor: GgufTensor) -> np.ndarray[Any, Any]:
        """The bytes of a tensor, row by row."""
        found = self.data[tensor.start : tensor.start + tensor.size]
        return found.reshape(*tensor.shape[:-1], -1)

    def keeps(self, tensor: GgufTensor, model: nn.Module, layer: str) -> bool:
        """Whether the blocks of a tensor can stay: its values are those of a layer's weight."""
        if tensor.type not in KEPT or len(tensor.shape) != 2:
            return False
        module: Any = model.get_submodule(layer.rpartition(".")[0])
        module = getattr(module, layer.rpartition(".")[2], None)
        if type(module) not in (nn.Linear, nn.Embedding):
            return False
        return tuple(module.weight.shape) == tensor.shape and self.order(tensor) is not None

    def order(self, tensor: GgufTensor) -> np.ndarray[Any, Any] | None:
        """The order in which transformers takes the rows; None if it does more than that."""
        n, k = tensor.shape
        token = np.broadcast_to(np.zeros((), np.int64), (n, 1))
        if self.processor.process(token, tensor.name).weights is token:
            return np.arange(n)
        numbers = np.arange(n * k, dtype=np.int64).reshape(n, k)
        found = self.processor.process(numbers.copy(), tensor.name).weights
        rows = found[:, 0] // k if found.shape == (n, k) else np.zeros(0, np.int64)
        return rows if len(rows) == n and np.array_equal(found, numbers[rows]) else None

    def packed(self, tensor: GgufTensor) -> Any:
        """What makes the packed bytes."""

        def make() -> Tensor:
            order = self.order(tensor)
            blocks = torch.from_numpy(np.ascontiguousarray(self.raw(tensor)[order]))
            return pack_gguf(blocks, tensor.type)

        return make

    def plain(self, tensor: GgufTensor) -> Any:
        """What makes the values, as transformers has them."""

        def make() -> Tensor:
            import gguf

            raw = self.raw(tensor)
            if BLOCKS[tensor.type][0] == 1:  # numbers, not blocks
                raw = raw.view({0: np.float32, 1: np.float16}.get(tensor.type, np.uint8))
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType(tensor.type))
            result = self.processor.process(values, tensor.name)
            if result.name is None:
                raise ValueError(f"{self.path}: lmfuse cannot take {tensor.name} apart")
            return torch.from_numpy(np.array(result.weights))

        return make
