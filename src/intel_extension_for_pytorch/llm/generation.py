"""`ipex.llm.generation`: the decoding functions of `lmfuse.generation`."""

from lmfuse import _alias
from lmfuse.generation import hf_beam_sample, hf_beam_search, hf_greedy_search, hf_sample

__all__ = ["hf_beam_sample", "hf_beam_search", "hf_greedy_search", "hf_sample"]

__getattr__, __dir__ = _alias.names(__name__)
