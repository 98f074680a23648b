"""KV caches and decoding for transformers; importing it imports transformers."""

from lmfuse.generation.cache import Cache, Layer, SlidingLayer

__all__ = ["Cache", "Layer", "SlidingLayer"]
