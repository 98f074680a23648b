"""Tells transformers' registry of quantizers of ours, once transformers has one.

`import lmfuse` does not wait for transformers; but a model that lmfuse quantized must load through
`AutoModelForCausalLM.from_pretrained`, in whichever order the two were imported. So a finder waits
for the module with the registry, lets it load as ever, registers ours, and is gone.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Registers now if transformers' quantizers are loaded, else as soon as they are."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("lmfuse.hf.quantizer")  # which registers what it defines


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, theirs: Loader) -> None:
        self._theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._theirs.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._theirs
        module.__loader__ = self._theirs
        self._theirs.exec_module(module)
        _register()
