"""`ipex.nn`: the modules that lmfuse serves."""

from intel_extension_for_pytorch.nn import modules

__all__ = ["modules"]
