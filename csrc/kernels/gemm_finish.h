// What linear layers share besides their arithmetic: rows cut into tiles, and what is done to the
// accumulators before the one rounding.
#pragma once

#include "gemm_tile.h"
#include "math.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// What the last step of a row may need besides its accumulators.
template <class T>
struct Operands {
  const T *u, *v;             // rows of the other operands
  const float *up, *up_bias;  // the accumulators of the second weight
};

void widen_bias(const Vector& bias, int64_t n0, int64_t count, float* to) {
  if (!bias.data) return;
  with_type(bias.dtype, [&](auto b) {
    const auto* from = static_cast<const decltype(b)*>(bias.data) + n0;
    map(to, count, [&](int64_t i, auto l) { return load(from + i, l); });
  });
}

// Rows [from, to) of a tile, whose first is row0 of x.
struct Part {
  TileRows rows;
  int64_t from, to, row0, panel;
};

// out = f(acc + bias), rounded once. The last panel may have fewer channels than 32.
template <class T, class F>
void finish_rows(const GemmArgs& a, const Part& part, const float* acc, const float* acc_up, F f) {
  const int64_t n0 = part.panel * kPanel, count = a.n - n0 < kPanel ? a.n - n0 : kPanel;
  alignas(64) float bias[kPanel] = {}, up_bias[kPanel] = {};
  widen_bias(a.bias, n0, count, bias);
  widen_bias(a.bias2, n0, count, up_bias);
  for (int64_t t = part.from; t < part.to; ++t) {
    const int64_t r = part.row0 + t, acc_row = part.rows.at(t);
    const float* z = acc + acc_row * kPanel;
    T* out = row<T>(a.out, r) + n0;
    const Operands<T> o{a.other.data ? row<T>(a.other, r) + n0 : nullptr,
                        a.other2.data ? row<T>(a.other2, r) + n0 : nullptr,
                        acc_up + acc_row * kPanel, up_bias};
    const auto value = [&](int64_t i, auto l)
                           LMFUSE_LAMBDA { return f(load(z + i, l) + load(bias + i, l), o, i, l); };
    if (count == kPanel) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPanel; i += kLanes) store(out + i, value(i, All{}));
    } else {
      map(out, count, value);
    }
  }
}

void finish(const GemmArgs& a, const Part& part, const float* acc, const float* acc_up) {
  with_type(a.out.dtype, [&](auto t) {
    using T = decltype(t);
    using O = const Operands<T>&;
    const auto with = [&](auto f) { finish_rows<T>(a, part, acc, acc_up, f); };
    switch (a.post) {
      case PostOp::none:
        return with([](Vec z, O, int64_t, auto) { return z; });
      case PostOp::relu:
        return with([](Vec z, O, int64_t, auto) { return relu(z); });
      case PostOp::gelu_erf:
        return with([](Vec z, O, int64_t, auto) { return gelu_erf(z); });
      case PostOp::gelu_tanh:
        return with([](Vec z, O, int64_t, auto) { return gelu_tanh(z); });
      case PostOp::silu:
        return with([](Vec z, O, int64_t, auto) { return silu(z); });
      case PostOp::mul:
        return with([](Vec z, O o, int64_t i, auto l) { return z * load(o.u + i, l); });
      case PostOp::add:
        return with([](Vec z, O o, int64_t i, auto l) { return z + load(o.u + i, l); });
      case PostOp::add_add:
        return with(
            [](Vec z, O o, int64_t i, auto l) { return z + load(o.u + i, l) + load(o.v + i, l); });
      case PostOp::silu_mul:
        return with([](Vec z, O o, int64_t i, auto l) { return silu(z) * load(o.u + i, l); });
      case PostOp::gate_up:
        return with([](Vec z, O o, int64_t i, auto l) {
          return silu(z) * (load(o.up + i, l) + load(o.up_bias + i, l));
        });
    }
  });
}

// The rows of one block, cut into tiles of equal height; the last overlaps the one before.
struct RowTiles {
  int64_t row0, rows, count, height;

  RowTiles(int64_t first, int64_t n, int64_t tile_rows)
      : row0(first),
        rows(n),
        count((n + tile_rows - 1) / tile_rows),
        height((n + count - 1) / count) {}
  int64_t first(int64_t tile) const {
    const int64_t at = tile * height;
    return row0 + (at + height > rows ? rows - height : at);
  }
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
