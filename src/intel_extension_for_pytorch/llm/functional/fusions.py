"""`ipex.llm.functional.fusions`: the same functions, under the name of IPEX's inner module."""

from lmfuse import _alias
from lmfuse.functional import *  # noqa: F403

__getattr__, __dir__ = _alias.names(__name__)
