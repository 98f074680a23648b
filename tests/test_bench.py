"""The benchmarks measure what they say: each case is right, the limits are those of the machine."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lmfuse
from lmfuse import bench
from lmfuse.bench import attention, limits, linear, woq
from lmfuse.bench.case import Case, MismatchError
from lmfuse.bench.limits import Probe, Timing
from lmfuse.bench.norm import llama_rms_norm
from lmfuse.bench.rope import gptj_rope, llama_rope
from lmfuse.bench.runner import Runner
from lmfuse.functional import limits as loops

# A stream and a prompt often become the same small case. Linear layers do not become small so.
ROWS = [case for stem in ("norm", "activation", "rope") for case in bench.cases(stem)]
SMALL = {str(case.small()): case.small() for case in ROWS}
KERNELS = Path(__file__).parents[1] / "csrc" / "kernels"


@pytest.mark.parametrize("isa", lmfuse.available_isas())
@pytest.mark.parametrize("case", SMALL.values(), ids=str)
def test_every_case_is_right(case: Case, isa: str) -> None:
    with lmfuse.use_isa(isa):
        case.check(case.inputs())


@pytest.mark.parametrize("post", [None, "gelu", "silu_mul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_cases_are_right(dtype: torch.dtype, post: str | None) -> None:
    """Also when each call takes another copy of the weight."""
    case = replace(linear.case(20, 70, 96, dtype, post), shape=(20, 96))
    inputs = case.inputs()
    for _ in range(3):
        case.check(inputs)
    assert {c.limit for c in bench.cases("linear")} == {"roof", "cached"}
    assert case.bytes(inputs) == sum(t.nbytes for t in inputs) + 20 * 70 * dtype.itemsize


@pytest.mark.parametrize(
    "case",
    [
        attention.contiguous(2, 300, 64),
        attention.int8(2, 300, 64),
        attention.paged(2, 320, 64, 16),
        attention.paged(4, 320, 64, 16, shared=256),
        attention.indirect(2, 300, 64),
        attention.indirect(4, 300, 64, shared=256),
        attention.prompt(300, 64),
        attention.cache_write(64, 64, 16),
    ],
    ids=str,
)
def test_attention_cases_are_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when each call takes other copies of the caches; stock computes the same."""
    monkeypatch.setattr(attention, "_COLD_BYTES", 2 << 20)
    inputs = case.inputs()
    for _ in range(3):
        case.check(inputs)
    for y, s in zip(_tuple(case.run(*inputs)), _tuple(case.stock(*inputs)), strict=True):
        torch.testing.assert_close(y[: len(s)], s.view_as(y[: len(s)]), rtol=0.05, atol=0.02)


WOQ = [(*form, compute) for form in (("int8", -1), ("int4", 32)) for compute in ("int8", "bf16")]


@pytest.mark.parametrize(("kind", "group", "compute"), [*WOQ, ("nf4", 32, "bf16")])
def test_woq_cases_are_right(
    kind: str, group: int, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when each call takes another copy of the weight; bytes are codes and scales."""
    monkeypatch.setattr(woq, "_COLD_BYTES", 64 << 10)
    case = woq.case(5, 64, 96, kind, group, compute)
    inputs = case.inputs()
    for _ in range(3):
        case.check(inputs)
    weight = 64 * 96 + 64 * 2 if kind == "int8" else 64 * 96 // 2 + 64 * 3 * 2
    padded = 64 * 32 if kind == "int8" else 0  # k to a multiple of 64
    assert case.bytes(inputs) == 64 + weight + padded + 2 * 5 * (96 + 64)
    assert {c.unit for c in bench.cases("woq")} == {"int8", "bf16"}


STREAMS = [case for case in ROWS if case.kind == "stream"]


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_every_stream_is_right_around_the_caches(case: Case) -> None:
    """From 32 MB on, results are written with other stores."""
    row = math.prod(case.shape[1:]) * case.dtype.itemsize
    stream = replace(case, shape=((32 << 20) // row, *case.shape[1:]))
    stream.check(stream.inputs())


@pytest.mark.parametrize("case", [c for c in SMALL.values() if c.kind == "row"], ids=str)
def test_stock_computes_the_same(case: Case) -> None:
    """Loosely: stock rounds at every step."""
    inputs = case.inputs()
    ours, stock = case.run(*inputs), case.stock(*inputs)
    for y, s in zip(_tuple(ours), _tuple(stock), strict=True):
        torch.testing.assert_close(y, s, rtol=0.05, atol=0.05)


def _tuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def test_stock_formulas_are_those_of_transformers() -> None:
    from transformers.models.gptj import modeling_gptj
    from transformers.models.llama import modeling_llama

    norm = modeling_llama.LlamaRMSNorm(64, eps=1e-6).to(torch.bfloat16)
    x = torch.randn(3, 64).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(llama_rms_norm(x, norm.weight), norm(x))

    query, key = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    sin, cos = torch.randn(1, 7, 16), torch.randn(1, 7, 16)
    theirs = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    for y, t in zip(llama_rope(query, key, sin, cos), theirs, strict=True):
        assert torch.equal(y, t)

    sin, cos = torch.randn(1, 4, 8), torch.randn(1, 4, 8)  # here 4 is the number of tokens
    for y, x in zip(gptj_rope(query, key, sin, cos), (query, key), strict=True):
        assert torch.equal(y, modeling_gptj.apply_rotary_pos_emb(x, sin, cos))


def test_a_wrong_op_is_found() -> None:
    case = bench.cases("activation")[0].small()
    one_off = Case(
        **{**vars(case), "run": lambda x, y: case.run(x, y) + torch.eye(*x.shape, dtype=x.dtype)}
    )
    with pytest.raises(MismatchError, match="silu_mul"):
        one_off.check(one_off.inputs())


def test_bytes_counts_what_is_read_and_written() -> None:
    case = next(c for c in bench.cases("norm") if c.name == "add_rms_norm" and c.kind == "row")
    assert case.bytes(case.inputs()) == 2 * 2048 * 4  # residual, x, weight and y


def test_unknown_stem() -> None:
    with pytest.raises(ValueError, match="'nrom'; there are norm, activation, rope"):
        bench.cases("nrom")


@pytest.mark.parametrize("isa", lmfuse.available_isas())
@pytest.mark.parametrize("unit", ["fp32", "bf16", "int8"])
def test_peak_counts_operations(isa: str, unit: str) -> None:
    with lmfuse.use_isa(isa):
        one, three = loops.peak(unit, 1), loops.peak(unit, 3)
    assert three == 3 * one > 0
    assert one % torch.get_num_threads() == 0


def test_peak_of_an_unknown_unit() -> None:
    with pytest.raises(ValueError, match="fp64"):
        loops.peak("fp64", 1)


@pytest.mark.parametrize("isa", lmfuse.available_isas())
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pages", [1, 3, 200])
def test_copy_copies(isa: str, stream: bool, pages: int) -> None:
    x = torch.randn(pages * 1024)
    y = torch.full_like(x, -1)
    with lmfuse.use_isa(isa):
        loops.read(x)
        loops.copy(x, y, stream)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "x",
    [torch.ones(1000), torch.ones(1025)[1:], torch.ones(2048)[::2], torch.ones(1024).double()],
    ids=["size", "alignment", "stride", "dtype"],
)
def test_loops_refuse_what_they_cannot_read(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="x must be a contiguous, aligned"):
        loops.read(x)


def test_copy_refuses_two_sizes() -> None:
    with pytest.raises(RuntimeError, match="one size"):
        loops.copy(torch.ones(2048), torch.ones(1024), stream=False)


def test_limits_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PROBE_BYTES", 1 << 20)
    found = limits.measure()
    assert found.isa == lmfuse.isa()
    assert found.threads == torch.get_num_threads()
    assert min(found.read, found.copy, found.fp32) > 0
    assert min(found.bf16, found.int8) >= found.fp32


def test_paired_divides_out_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose clock runs slower and slower, work as fast as the probe is at 100 %."""
    clock = 0.0
    pace = 1.0

    def work() -> None:
        nonlocal clock, pace
        clock += pace
        pace *= 1.1

    monkeypatch.setattr(limits, "perf_counter", lambda: clock)
    timing, fraction = limits.paired(work, 200 << 20, Probe(work, 200 << 20))
    assert fraction == pytest.approx((1 / 1.1 + 1.1) / 2)
    assert timing.median > timing.best > 1.0
    _, fraction = limits.paired(work, 100 << 20, Probe(work, 200 << 20))
    assert fraction == pytest.approx((1 / 1.1 + 1.1) / 4)


def test_best_of_repeats_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def work() -> None:
        nonlocal clock
        clock += 1e-6

    monkeypatch.setattr(limits, "perf_counter", lambda: clock)
    ours, other = limits.best_of(work, work, seconds=0.01)
    assert ours == other == Timing(pytest.approx(1e-6), pytest.approx(1e-6))  # type: ignore[arg-type]


def test_runner_fills_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PROBE_BYTES", 1 << 20)
    stream = bench.cases("norm")[0].small()
    result = Runner().run("norm", stream)
    assert (result.name, result.limit, result.dtype) == ("rms_norm", "copy", "float32")
    assert result.fraction is not None
    assert result.fraction > 0
    assert result.gigabytes == pytest.approx(result.bytes / result.seconds / 1e9)
    assert result.ratio == pytest.approx(result.stock_seconds / result.seconds)


# Three products of random tiles each, as bytes on standard output; A and B come from a fixed
# generator, some of them so small that the hardware flushes them to zero.
TILES = r"""
#include <cstdio>
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define LMFUSE_ISA amx
#include "tiles.h"
using namespace lmfuse::amx;

static uint32_t state = 1;
static uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }

int main() {
#if !defined(LMFUSE_SOFT_TILES)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
#endif
  static unsigned char a[16 * 80], b[1024], c[1024];
  for (int round = 0; round < 6; ++round) {
    const float scale = round % 3 == 2 ? 0x1p-64f : 1.0f;
    for (int i = 0; i < 16 * 40; ++i) {
      const float v = (float(next()) * 0x1p-24f - 0.5f) * scale;
      std::memcpy(a + 2 * i, reinterpret_cast<const char*>(&v) + 2, 2);
      const float w = (float(next()) * 0x1p-24f - 0.5f) * scale;
      if (i < 512) std::memcpy(b + 2 * i, reinterpret_cast<const char*>(&w) + 2, 2);
    }
    Tiles tiles;
    tiles.zero<0>();
    tiles.load<4>(a, 80);  // rows of 64 bytes, 80 apart
    tiles.load<6>(b, 64);
    tiles.dot_bf16<0, 4, 6>();
    tiles.dot_bf16<0, 4, 6>();
    tiles.store<0>(c, 64);
    std::fwrite(a, 1, sizeof(a), stdout);
    std::fwrite(b, 1, sizeof(b), stdout);
    std::fwrite(c, 1, sizeof(c), stdout);
    for (auto& x : c) x = next();
    tiles.load<1>(c, 64);
    std::fwrite(c, 1, sizeof(c), stdout);
    tiles.dot_int8<1, 4, 6>();
    tiles.store<1>(c, 64);
    std::fwrite(c, 1, sizeof(c), stdout);
  }
}
"""
TILE_BYTES = 16 * 80 + 4 * 1024


def _tiles(folder: Path, *flags: str) -> bytes:
    compiler = shutil.which("g++") or shutil.which("c++") or "g++"
    source, program = folder / "tiles.cpp", folder / "tiles"
    source.write_text(TILES)
    subprocess.run(
        [compiler, "-std=c++20", "-O2", f"-I{KERNELS}", *flags, str(source), "-o", str(program)],
        check=True,
    )
    return subprocess.run([str(program)], check=True, capture_output=True).stdout


def test_soft_tiles_against_float64(tmp_path: Path) -> None:
    output = _tiles(tmp_path, "-DLMFUSE_SOFT_TILES")
    assert len(output) == 6 * TILE_BYTES
    for round_ in range(6):
        block = bytearray(output[round_ * TILE_BYTES : (round_ + 1) * TILE_BYTES])
        a, b, c, before, after = (
            block[i:j]
            for i, j in [(0, 1280), (1280, 2304), (2304, 3328), (3328, 4352), (4352, 5376)]
        )
        rows = torch.frombuffer(a, dtype=torch.bfloat16).view(16, 40)[:, :32].double()
        columns = torch.frombuffer(b, dtype=torch.bfloat16).view(16, 16, 2).double()
        exact = 2 * torch.einsum("mkp,knp->mn", rows.view(16, 16, 2), columns)
        result = torch.frombuffer(c, dtype=torch.float32).view(16, 16).double()
        # Products below 2^-126 are flushed: 64 of them may be missing.
        torch.testing.assert_close(
            result, exact, rtol=0, atol=4e-6 if round_ % 3 < 2 else 2.0**-120
        )

        rows8 = torch.frombuffer(a, dtype=torch.int8).view(16, 80)[:, :64].long()
        columns8 = torch.frombuffer(b, dtype=torch.int8).view(16, 16, 4).long()
        product = torch.einsum("mkp,knp->mn", rows8.reshape(16, 16, 4), columns8)
        start, end = (torch.frombuffer(t, dtype=torch.int32).view(16, 16) for t in (before, after))
        assert torch.equal((start.long() + product).to(torch.int32), end)


if "amx" in lmfuse.available_isas():

    def test_hardware_tiles_equal_soft_tiles(tmp_path: Path) -> None:
        flags = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mfma")
        hardware = _tiles(tmp_path, *flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8")
        assert hardware == _tiles(tmp_path, "-DLMFUSE_SOFT_TILES")
