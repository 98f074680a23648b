"""Joins Hugging Face models, by class swap: no transformers global is ever edited."""

from lmfuse.hf.optimize import optimize, report, restore
from lmfuse.hf.swap import Report

__all__ = ["Report", "optimize", "report", "restore"]
