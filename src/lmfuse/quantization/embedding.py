"""`QuantizedEmbedding`: an embedding that reads its rows out of a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmfuse import functional
from lmfuse.functional import QuantizedFormat


class QuantizedEmbedding(nn.Module):
    """Rows of the bytes of `lmfuse.functional.pack_quantized`, dequantized one by one.

    Args:
        weight: from `pack_quantized`; a layer that is tied to the embedding may hold the same.
        dtype: of the result; `to(dtype)` changes it.
        padding_idx: as nn.Embedding says it; of no effect without training.

    Raises:
        TypeError, ValueError: not the bytes of a quantized weight.
    """

    weight: Tensor
    like: Tensor
    format: QuantizedFormat

    def __init__(self, weight: Tensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        self.format = format = functional.quantized_format(weight)
        self.num_embeddings, self.embedding_dim = format.out_features, format.in_features
        self.padding_idx = padding_idx
        self.register_buffer("weight", weight)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """input: integers in [0, num_embeddings), of any shape; returns [*input.shape, k]."""
        rows = functional.quantized_rows(
            self.weight, input, self.num_embeddings, self.embedding_dim
        )
        return rows.to(self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
