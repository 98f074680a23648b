"""Joins Hugging Face models, by class swap: no transformers global is ever edited."""

from lmfuse.hf.load import from_pretrained
from lmfuse.hf.optimize import optimize, report, restore
from lmfuse.hf.registry import register_when_imported
from lmfuse.hf.swap import Report

__all__ = ["Report", "from_pretrained", "optimize", "report", "restore"]

register_when_imported()
