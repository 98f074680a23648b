"""KV caches and decoding for transformers; importing it imports transformers."""

from lmfuse.generation.cache import Cache, Layer, SlidingLayer
from lmfuse.generation.search import hf_beam_sample, hf_beam_search, hf_greedy_search, hf_sample

__all__ = [
    "Cache",
    "Layer",
    "SlidingLayer",
    "hf_beam_sample",
    "hf_beam_search",
    "hf_greedy_search",
    "hf_sample",
]
