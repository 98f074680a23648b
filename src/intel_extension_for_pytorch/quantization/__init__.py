"""`ipex.quantization`: weight-only quantization."""

from lmfuse import _alias
from lmfuse.quantization.ipex import *  # noqa: F403

__getattr__, __dir__ = _alias.names(__name__)
