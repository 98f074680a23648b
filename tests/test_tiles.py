"""The AMX kernels of linear layers in software, on any machine: tiles in plain C++.

`make tiles` runs every test of the amx level so, where the CPU has all else of that level.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lmfuse
from helpers import BF16, assert_close, assert_same_bits
from lmfuse.functional import linear, pack_linear

KERNELS = Path(__file__).parents[1] / "csrc" / "kernels"

HARNESS = r"""
#include <cstring>
#include <vector>
#include "kernels.h"
namespace lmfuse::amx {
void pack(const PackArgs&, int64_t, int64_t);
void gemm_rows(const GemmRowsArgs&, int64_t, int64_t);
void gemm(const GemmArgs&, int64_t, int64_t);
GemmFormat gemm_format(DType, int64_t);
}
using namespace lmfuse;

// out = x W^T in fp32, of bf16.
extern "C" void linear(void* x, void* w, float* out, int64_t m, int64_t n, int64_t k) {
  const auto rows = [](void* data, DType type, int64_t stride) {
    Matrix matrix;
    matrix.data = data;
    matrix.dtype = type;
    matrix.rows.dims = 1;
    matrix.rows.stride[0] = stride;
    return matrix;
  };
  const int64_t panels = panel_count(n);
  std::vector<char> packed(panels * panel_bytes(DType::bf16, k));
  amx::pack({rows(w, DType::bf16, k), packed.data(), n, k}, 0, panels);
  const GemmFormat format = amx::gemm_format(DType::bf16, m);
  const int64_t lda = (k + format.k_multiple - 1) / format.k_multiple * format.k_multiple;
  std::vector<char> input(m * lda * 2);
  amx::gemm_rows({rows(x, DType::bf16, k), input.data(), format.type, k, lda}, 0, m);
  std::vector<float> scratch(format.scratch_rows * kPanel + 1);
  GemmArgs a{};
  a.x = input.data();
  a.lda = lda;
  a.weight = packed.data();
  a.out = rows(out, DType::f32, n);
  a.weight_type = DType::bf16;
  a.m = m;
  a.n = n;
  a.k = k;
  a.scratch = scratch.data();
  amx::gemm(a, 0, panels * ((m + kRowBlock - 1) / kRowBlock));
}
"""


@pytest.fixture(scope="module")
def soft_tiles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, Tensor], Tensor]:
    """x W^T by the kernels of the amx level, over tiles in plain C++."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "harness.cpp").write_text(HARNESS)
    compiler = shutil.which("g++") or shutil.which("c++") or "g++"
    sources = [folder / "harness.cpp", KERNELS / "gemm.cpp", KERNELS / "pack.cpp"]
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-DLMFUSE_ISA=amx", "-DLMFUSE_SOFT_TILES"]
    library = folder / "tiles.so"
    subprocess.run([compiler, *flags, f"-I{KERNELS}", *sources, "-o", library], check=True)
    run = ctypes.CDLL(str(library)).linear

    def product(x: Tensor, w: Tensor) -> Tensor:
        (m, k), n = x.shape, w.shape[0]
        out = torch.empty(m, n)
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, w, out)]
        run(*addresses, *(ctypes.c_int64(i) for i in (m, n, k)))
        return out

    return product


# Around the heights of a tile and of two, the block of k and the padding of both.
TILES = [(1, 1, 1), (1, 33, 40), (3, 45, 64), (16, 32, 32), (17, 40, 31), (32, 64, 513)]
TILES += [(33, 70, 512), (40, 33, 1100), (63, 5, 600), (70, 300, 97), (100, 200, 577)]


@pytest.mark.parametrize(("m", "n", "k"), TILES)
def test_soft_tiles(soft_tiles: Callable[[Tensor, Tensor], Tensor], m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k).to(BF16), torch.randn(n, k).div(k**0.5).to(BF16)
    y = soft_tiles(x, w)
    size = x.double().abs() @ w.double().abs().T
    assert_close(y, x.double() @ w.double().T, ulps=(k + 16) / 2, scale=size)  # see test_linear.py
    if "amx" in lmfuse.available_isas():
        with lmfuse.use_isa("amx"):
            assert_same_bits(linear(x.float(), pack_linear(w)), y)
