"""`ipex.cpu`: the switches that lmfuse serves."""

from intel_extension_for_pytorch.cpu import _auto_kernel_selection

__all__ = ["_auto_kernel_selection"]
