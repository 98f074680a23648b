// Outliers of int8 compute. One scale for a row of x leaves little of it where a few values are
// much larger than the rest, as in most layers of language models (arXiv:2208.07339). So these stay
// as they are, in fp32: kernels.h says which, and a column of the weight is added for each.
#pragma once

#include "woq_decode.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kOutlierLanes = 32;  // rows are padded to a multiple of it

// Calls f(i) for each of n magnitudes, in order, that is not below the limit (or, above, is beyond
// it). A NaN may be among them.
template <bool kAbove, class F>
LMFUSE_INLINE void each_large(const float* x, int64_t n, float limit, F f) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec size = abs(load(x + i));
    uint32_t found = kAbove ? bits(broadcast(limit) < size)
                            : ~bits(size < broadcast(limit)) & ((1u << kLanes) - 1);
    for (; found; found &= found - 1) f(i + __builtin_ctz(found));
  }
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
    for (int64_t v = 0; v < kParts; ++v) most[v] = max(most[v], abs(load(x + i + v * kLanes)));
  float lanes[kOutlierLanes];
#pragma GCC unroll 4
  for (int64_t v = 0; v < kParts; ++v) store(lanes + v * kLanes, most[v]);
  Largest bound, found;
  for (int64_t i = 0; i < kOutlierLanes; ++i) bound.offer(lanes[i]);
  each_large<false>(x, n, bound.least(), [&](int64_t i) { found.offer(__builtin_fabsf(x[i])); });
  return found.least();
}

// Where column k of a panel lies, whatever the scales of its format are.
WoqOutlier outlier(const WoqFormat& f, int64_t k, float value) {
  const int64_t at = k % f.group, each = f.nibbles() ? 8 : 4;
  return {static_cast<int32_t>(k / f.group),
          static_cast<int32_t>(f.code_bytes(k - at) + at / each * 4 * kPanel),
          static_cast<int32_t>(f.nibbles() ? nibble_shift(at % 8) : at % 4),
          f.nibbles() ? value : value * 0x1p-24f};
}

// Moves the outliers of a row out of it, in the order of their columns. Infinity stays: then the
// row is none of integers. (NaN hides what is beside it from the limit, so that more may be above.)
inline void take_outliers(const WoqFormat& f, float* x, WoqOutlier* to) {
  const int64_t n = f.packed_k();
  const WoqOutlier* end = to + kWoqOutliers;
  each_large<true>(x, n, largest_of_rest(x, n), [&](int64_t k) {
    if (x[k] - x[k] != 0.0f || to == end) return;
    *to++ = outlier(f, k, x[k]);
    x[k] = 0.0f;
  });
  for (; to != end; ++to) *to = {0, 0, 0, 0.0f};
}

// The codes of a column, less the middle of their range; bytes times 2^24.
template <bool kNibbles>
LMFUSE_INLINE Vec column_codes(const char* codes, int32_t shift, const float* values) {
  const Words words = load_words(codes);
  if constexpr (kNibbles) {
    return lookup(values, words >> static_cast<unsigned>(shift));
  } else {
    return number(top(words, shift));
  }
}

// A panel whose columns are looked up.
struct OutlierPanel {
  WoqZero zero;
  const float* values;
  const char *codes, *scales;
  int64_t scale_bytes, group_bytes;

  OutlierPanel(const WoqFormat& f, const char* panel)
      : zero(f.zero),
        values(middle(f) != 0.0f ? kInt4Middle : kInt4),
        codes(panel + f.scale_bytes()),
        scales(panel),
        scale_bytes(f.scale_bytes()),
        group_bytes(f.scale_bytes() + f.code_bytes(f.group)) {}
};

// sum[32] = sum x_scale + what the outliers x of a row add. kOne: all lie in one group, whose
// scales multiply their sum.
template <bool kNibbles, bool kPlain, bool kOne, class Scale>
LMFUSE_INLINE void add_columns(const OutlierPanel& p, const WoqOutlier* x, float x_scale,
                               float* sum) {
  Vec z[kVecs], q[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    z[v] = load(sum + v * kLanes) * broadcast(x_scale);
    q[v] = broadcast(0.0f);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kWoqOutliers; ++i) {
    const int64_t group = kOne ? 0 : x[i].group;
    const auto* scales = reinterpret_cast<const Scale*>(p.scales + group * p.group_bytes);
    const char* codes = p.codes + x[i].codes + group * p.scale_bytes;
    const Vec value = broadcast(x[i].value);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec w = column_codes<kNibbles>(codes + 4 * v * kLanes, x[i].shift, p.values);
      constexpr float kOnTop = kNibbles ? 1.0f : 0x1p24f;
      if (!kPlain && p.zero == WoqZero::zero)
        w = w - load(scales + kPanel + v * kLanes) * broadcast(kOnTop);
      if constexpr (kOne) {
        q[v] = fma(value, w, q[v]);
      } else {
        z[v] = fma(value * load(scales + v * kLanes), w, z[v]);
      }
      if (!kPlain && p.zero == WoqZero::offset)
        z[v] = fma(value * broadcast(kOnTop), load(scales + kPanel + v * kLanes), z[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    if constexpr (kOne)
      z[v] = fma(q[v], load(reinterpret_cast<const Scale*>(p.scales) + v * kLanes), z[v]);
    store(sum + v * kLanes, z[v]);
  }
}

// The results of int8 compute: sum[rows][32] times the scales of the rows from `first` on, if these
// are not in it yet, and what their outliers add.
inline void finish_int8(const WoqArgs& a, const TileRows& rows, int64_t first, const char* panel,
                        float* sum) {
  const WoqFormat& f = a.format;
  const OutlierPanel p(f, panel);
  const auto each_row = [&](auto nibbles, auto plain, auto one, auto scale) LMFUSE_LAMBDA {
    for (int64_t r = 0; r < rows.count; ++r)
      add_columns<decltype(nibbles)::value, decltype(plain)::value, decltype(one)::value,
                  decltype(scale)>(p, a.outliers + (first + r) * kWoqOutliers,
                                   a.block_scales ? 1.0f : a.scales[first + r],
                                   sum + rows.at(r) * kPanel);
  };
  with_type(f.scale_type, [&](auto scale) LMFUSE_LAMBDA {
    with_flag(f.nibbles(), [&](auto nibbles) LMFUSE_LAMBDA {
      with_flag(f.zero == WoqZero::none, [&](auto plain) LMFUSE_LAMBDA {
        with_flag(f.groups() == 1,
                  [&](auto one) LMFUSE_LAMBDA { each_row(nibbles, plain, one, scale); });
      });
    });
  });
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
