"""The import name of Intel Extension for PyTorch, served by lmfuse: re-exports and nothing else.

    import intel_extension_for_pytorch as ipex

`__version__` is the release of IPEX that the calls follow, then "+lmfuse." and lmfuse's own.
"""

from lmfuse import _alias

_alias.refuse_beside_ipex()

from intel_extension_for_pytorch import llm  # noqa: E402  (after the check, which must speak first)

__version__ = _alias.VERSION
__all__ = ["llm"]

__getattr__, __dir__ = _alias.names(__name__, {"optimize": "lmfuse"})
