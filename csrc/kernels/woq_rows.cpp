// Rows of x for quantized weights: in the order of the panels, as bf16 or as int8 with scales, and
// the sums of their blocks.
#include "woq_int8.h"
#include "woq_outliers.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// How x becomes int8: q = round(x * inverse), x = q * scale. Where x is not finite, no integer
// stands for it: the scale is NaN, and so is the result.
struct Int8Scale {
  float inverse, scale;
};
Int8Scale int8_scale(const float* x, int64_t n) {
  Vec most[2] = {broadcast(0.0f), broadcast(0.0f)}, bad[2] = {broadcast(0.0f), broadcast(0.0f)};
  for (int64_t i = 0; i < n; i += 2 * kLanes)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec each = load(x + i + v * kLanes);
      most[v] = max(most[v], abs(each));
      bad[v] = fma(each, broadcast(0.0f), bad[v]);
    }
  const float largest = max(max(most[0], most[1])), rest = sum(bad[0] + bad[1]);
  return {rest == 0.0f && largest >= 0x1p-120f ? 127.0f / largest : 0.0f, largest / 127.0f + rest};
}

// Writes one block, and returns its sum.
float write_int8(const float* x, int64_t n, Int8Scale s, int8_t* to) {
  const bool finite = s.scale == s.scale;
  const Vec inverse = broadcast(s.inverse);
  return sum(n, [&](int64_t i, auto) {
    const Vec q = finite ? round(load(x + i) * inverse) : broadcast(0.0f);
    store(reinterpret_cast<i8_t*>(to + i), q);
    return q;
  });
}

int64_t row_count(const Rows& rows) {
  int64_t count = 1;
  for (int d = 0; d < rows.dims; ++d) count *= rows.size[d];
  return count;
}

// One row of x, already in fp32 and in the order of the panels.
void write_row(const WoqRowsArgs& a, float* x, int64_t r) {
  const int64_t blocks = woq_blocks(a.format, a.block), columns = a.block;
  const int64_t width = a.format.packed_k();
  const int64_t m = row_count(a.x.rows);
  const auto each_block = [&](auto f) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t k0 = b * columns;
      f(b * m + r, k0, b + 1 < blocks ? columns : width - k0);
    }
  };
  const auto add_up = [&](const auto* from, int64_t n) {
    return sum(n, [&](int64_t i, auto l) { return load(from + i, l); });
  };
  const auto copy = [&](auto* to) {
    map(to, width, [&](int64_t i, auto l) { return load(x + i, l); });
  };
  switch (a.compute) {
    case WoqCompute::f32:
      return copy(static_cast<float*>(a.rows) + r * a.lda);
    case WoqCompute::bf16: {
      bf16_t* to = static_cast<bf16_t*>(a.rows) + r * a.lda;
      copy(to);
      return each_block(
          [&](int64_t at, int64_t k0, int64_t n) { a.sums[at] = add_up(to + k0, n); });
    }
    case WoqCompute::int8: {
      take_outliers(a.format, x, a.outliers + r * kWoqOutliers);
      int8_t* to = static_cast<int8_t*>(a.rows) + r * a.lda;
      Int8Scale scale{};
      if (!a.block_scales) a.scales[r] = (scale = int8_scale(x, width)).scale;
      each_block([&](int64_t at, int64_t k0, int64_t n) {
        if (a.block_scales) a.scales[at] = (scale = int8_scale(x + k0, n)).scale;
        a.sums[at] = write_int8(x + k0, n, scale, to + k0);
      });
      if (a.format.nibbles()) order_bytes(to, width);
    }
  }
}

}  // namespace

void woq_rows(const WoqRowsArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.format.packed_k();
  float *x = a.scratch, *ordered = a.order ? x + a.k : x;
  for (int64_t i = a.format.k; i < width; ++i) ordered[i] = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    with_type(a.x.dtype, [&](auto t) {
      const auto* from = row<decltype(t)>(a.x, r);
      map(x, a.k, [&](int64_t i, auto l) { return load(from + i, l); });
    });
    for (int64_t i = 0; a.order && i < a.format.k; ++i) {
      const int64_t from = a.order[i];
      ordered[i] = from >= 0 && from < a.k ? x[from] : 0.0f;
    }
    if (a.round)
      for (int64_t i = 0; i < width; i += kLanes) {
        bf16_t rounded[kLanes];
        store(rounded, load(ordered + i));
        store(ordered + i, load(rounded));
      }
    write_row(a, ordered, r);
  }
}

}  // namespace lmfuse::LMFUSE_ISA
