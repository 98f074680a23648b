"""The floors: who may say what. See HACKING.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samples import PENDING

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "lmfuse"
KERNELS = ROOT / "csrc" / "kernels"
OPS = ROOT / "csrc" / "ops"
DECLARED = (
    "micro-kernel"  # a file under kernels/ whose opening comment says so may name instructions
)


def code(path: Path) -> str:
    """C++ without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


def includes(path: Path) -> list[str]:
    return re.findall(r'#\s*include\s*[<"](.*?)[>"]', code(path))


def attributes(tree: ast.AST) -> Iterator[str]:
    """Every dotted name, such as torch.ops.lmfuse."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def python_files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def test_only_functional_reaches_the_ops() -> None:
    for path in python_files():
        if path.parent == SRC / "functional" or path == SRC / "_library.py":
            continue
        tree = ast.parse(path.read_text())
        for name in attributes(tree):
            assert not name.startswith("torch.ops"), f"{path}: {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "lmfuse._library":
                pytest.fail(f"{path} imports lmfuse._library")


def test_only_vector_headers_and_micro_kernels_name_instructions() -> None:
    named = set()
    for path in [*KERNELS.iterdir(), *OPS.iterdir()]:
        if re.search(r"\b_mm\d*_|\b__m\d+|\b_tile_|immintrin", code(path)):
            named.add(path)
    assert KERNELS / "simd_avx2.h" in named
    for path in named:
        opening = path.read_text().split("#", 1)[0]
        declared = path.name.startswith("simd") or DECLARED in opening
        assert path.parent == KERNELS, path
        assert declared, (
            f'{path} names instructions, but its first comment does not say "{DECLARED}"'
        )


def test_kernels_know_no_torch_and_no_containers() -> None:
    allowed = {"cstdint", "immintrin.h", "cpuid.h", "atomic", "initializer_list"}
    allowed |= {"sys/syscall.h", "unistd.h"}
    for path in KERNELS.iterdir():
        for name in includes(path):
            assert name in allowed or (KERNELS / name).exists(), f"{path}: {name}"
        assert not re.search(r"\b(torch|aten|c10)\b", code(path)), path
        if path.name != "isa.cpp":
            assert "std::" not in code(path), path


def test_ops_use_the_stable_abi_only() -> None:
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in OPS.iterdir():
        for name in includes(path):
            if "torch" in name or "ATen" in name or "c10" in name:
                assert name.startswith(allowed), f"{path}: {name}"


def test_same_stem_on_every_floor() -> None:
    for path in OPS.glob("*.cpp"):
        pending = any(op.startswith(path.stem) for op in PENDING)
        assert (SRC / "functional" / f"{path.stem}.py").exists() != pending, path


def test_no_eval_and_no_pickle() -> None:
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve"} & set(names), path


def test_importing_changes_nothing() -> None:
    """No attribute of torch, nn or transformers' Llama is another object after the import, and
    transformers is not imported."""
    script = """
import sys, torch, torch._dynamo  # which wraps torch.manual_seed itself
import torch.nn.functional as F
spaces = [torch, torch.nn, F, torch.Tensor, torch.nn.Module, torch.nn.Linear]
before = [dict(vars(s)) for s in spaces]
import lmfuse
assert "transformers" not in sys.modules, "lmfuse imports transformers"
import transformers
from transformers.models.llama import modeling_llama
theirs = [modeling_llama, modeling_llama.LlamaRMSNorm, transformers.PreTrainedModel]
kept = [dict(vars(s)) for s in theirs]
import intel_extension_for_pytorch
for space, old in zip([*spaces, *theirs], [*before, *kept]):
    for name, value in old.items():
        now = vars(space).get(name)
        assert now is value or name.startswith("__"), f"{space}.{name} was patched"
print("clean")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "clean", done.stderr
