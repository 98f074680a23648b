"""`ipex.llm.functional` is `lmfuse.functional`."""

from intel_extension_for_pytorch.llm.functional import fusions as fusions
from lmfuse import _alias
from lmfuse.functional import *  # noqa: F403

__getattr__, __dir__ = _alias.names(__name__)
