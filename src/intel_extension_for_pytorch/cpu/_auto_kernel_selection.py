"""`ipex.cpu._auto_kernel_selection` is `lmfuse._auto_kernel_selection`."""

from lmfuse._auto_kernel_selection import (
    _disable_dnnl,
    _disable_tpp,
    _enable_dnnl,
    _enable_tpp,
    _using_dnnl,
    _using_tpp,
)

__all__ = [
    "_disable_dnnl",
    "_disable_tpp",
    "_enable_dnnl",
    "_enable_tpp",
    "_using_dnnl",
    "_using_tpp",
]
