// Outliers of int8 compute. One scale for a row of x leaves little of it where a few values are
// much larger than the rest, as in most layers of language models (arXiv:2208.07339). So these stay
// as they are, in fp32: kernels.h says which, and a column of the weight is added for each.
#pragma once

#include "woq_decode.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kOutlierLanes = 32;  // rows are padded to a multiple of it

LMFUSE_INLINE Vec largest_lanes(const float* x, Vec most, int64_t v) {
  return max(most, abs(load(x + v * kLanes)));
}
LMFUSE_INLINE float largest_of(const float* x) {
  Vec most = abs(load(x));
#pragma GCC unroll 4
  for (int64_t v = 1; v < kOutlierLanes / kLanes; ++v) most = largest_lanes(x, most, v);
  return max(most);
}

// The kWoqOutliers + 1 largest of what was offered, in order.
struct Largest {
  float top[kWoqOutliers + 1] = {};

  float least() const { return top[kWoqOutliers]; }
  void offer(float a) {
    if (!(a > least())) return;
    int64_t i = kWoqOutliers;
    for (; i > 0 && top[i - 1] < a; --i) top[i] = top[i - 1];
    top[i] = a;
  }
  void offer_all(const float* x) {
    for (int64_t i = 0; i < kOutlierLanes; ++i) offer(__builtin_fabsf(x[i]));
  }
};

// The largest magnitude but for kWoqOutliers. The largest of each lane are a bound, below which
// most of a row is not looked at twice.
float largest_of_rest(const float* x, int64_t n) {
  constexpr int64_t kParts = kOutlierLanes / kLanes;
  Vec most[kParts];
#pragma GCC unroll 4
  for (int64_t v = 0; v < kParts; ++v) most[v] = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += kOutlierLanes)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kParts; ++v) most[v] = largest_lanes(x + i, most[v], v);
  float lanes[kOutlierLanes];
#pragma GCC unroll 4
  for (int64_t v = 0; v < kParts; ++v) store(lanes + v * kLanes, most[v]);
  Largest bound, found;
  bound.offer_all(lanes);
  for (int64_t i = 0; i < n; i += kOutlierLanes)
    if (largest_of(x + i) >= bound.least()) found.offer_all(x + i);
  return found.least();
}

// Where column k of a panel lies, whatever the scales of its format are.
WoqOutlier outlier(const WoqFormat& f, int64_t k, float value) {
  const int64_t group = k / f.group, at = k % f.group, each = f.nibbles() ? 8 : 4;
  const int64_t shift = f.nibbles() ? 28 - nibble_shift(at % 8) : 24 - 8 * (at % 4);
  return {static_cast<int32_t>(group), static_cast<int32_t>(at / each * 4 * kPanel),
          static_cast<int32_t>(shift), value};
}

// Moves the outliers of a row out of it, in the order of their columns. Infinity stays: then the
// row is none of integers. (NaN hides what is beside it from the limit, so that more may be above.)
void take_outliers(const WoqFormat& f, float* x, WoqOutlier* to) {
  const int64_t n = f.packed_k();
  const float limit = largest_of_rest(x, n);
  const WoqOutlier* end = to + kWoqOutliers;
  for (int64_t i = 0; i < n; i += kOutlierLanes) {
    if (!(largest_of(x + i) > limit)) continue;
    for (int64_t k = i; k < i + kOutlierLanes; ++k) {
      const float size = __builtin_fabsf(x[k]);
      if (!(size > limit) || size - size != 0.0f || to == end) continue;
      *to++ = outlier(f, k, x[k]);
      x[k] = 0.0f;
    }
  }
  if (to != end) to->codes = -1;
}

template <bool kNibbles, class Scale>
LMFUSE_INLINE void add_columns(const WoqFormat& f, const WoqOutlier* x, const char* panel,
                               float* sum) {
  const int64_t scale_bytes = f.scale_bytes(), group_bytes = scale_bytes + f.code_bytes(f.group);
  Vec z[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) z[v] = load(sum + v * kLanes);
  for (int64_t i = 0; i < kWoqOutliers && x[i].codes >= 0; ++i) {
    const char* group = panel + x[i].group * group_bytes;
    const auto* scales = reinterpret_cast<const Scale*>(group);
    const char* codes = group + scale_bytes + x[i].codes;
    const Vec value = broadcast(x[i].value);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Words top = load_words(codes + 4 * v * kLanes) << x[i].shift;
      Vec w = kNibbles ? number(top >> 28) : number(byte(top, 3));
      if (f.zero == WoqZero::zero) w = w - load(scales + kPanel + v * kLanes);
      if (kNibbles && f.zero == WoqZero::none) w = w - broadcast(8.0f);
      w = w * load(scales + v * kLanes);
      if (f.zero == WoqZero::offset) w = w + load(scales + kPanel + v * kLanes);
      z[v] = fma(value, w, z[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store(sum + v * kLanes, z[v]);
}

// sum[rows][32] += what the outliers of the rows from `first` on add to the results of a panel.
void add_outliers(const WoqArgs& a, const TileRows& rows, int64_t first, const char* panel,
                  float* sum) {
  with_type(a.format.scale_type, [&](auto t) LMFUSE_LAMBDA {
    with_flag(a.format.nibbles(), [&](auto nibbles) LMFUSE_LAMBDA {
      for (int64_t r = 0; r < rows.count; ++r)
        add_columns<decltype(nibbles)::value, decltype(t)>(
            a.format, a.outliers + (first + r) * kWoqOutliers, panel, sum + rows.at(r) * kPanel);
    });
  });
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
