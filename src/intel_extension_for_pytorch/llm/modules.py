"""`ipex.llm.modules` is `lmfuse.modules`."""

from lmfuse import _alias
from lmfuse.modules import *  # noqa: F403

__getattr__, __dir__ = _alias.names(__name__)
