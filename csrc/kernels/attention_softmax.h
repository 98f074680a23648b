// One row of scores over one chunk of keys: scale, softcap, bias and masks, then 2^(s log2 e -
// max); and how chunks are joined.
#pragma once

#include "attention_ints.h"
#include "math.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr float kNever = -__builtin_inff();  // the score of a key that is not seen

// Below 0.625 by the polynomial of Cephes, so that small values keep their digits.
LMFUSE_INLINE Vec tanh(Vec x) {
  const Vec one = broadcast(1.0f), a = abs(x), z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec large = one - broadcast(2.0f) / (exp(min(broadcast(88.0f), a + a)) + one);
  const Vec signed_large = select(x < broadcast(0.0f), broadcast(0.0f) - large, large);
  return select(a < broadcast(0.625f), fma(p * z, x, x), signed_large);
}

// A row of a unit: whose it is, and which positions it sees.
struct RowInfo {
  int64_t seq, query, head, position;
  int64_t begin, end;
};

inline RowInfo row_info(const AttentionArgs& a, const AttentionUnit& u, int64_t r) {
  const int64_t group = a.heads / a.kv_heads, row = u.row + r % u.row_count;
  RowInfo info;
  info.seq = u.seq + r / u.row_count;
  info.query = row / group;
  info.head = row % group;
  const AttentionSequence& s = a.sequences[info.seq];
  info.position = s.kv_len - s.q_len + info.query;
  info.begin = info.position - a.window_left;
  info.end = info.position + a.window_right + 1;
  if (info.begin < 0) info.begin = 0;
  if (info.end > s.kv_len) info.end = s.kv_len;
  if (info.end < info.begin) info.end = info.begin;
  return info;
}

// Scores of a row: vector i lies at at[i / kPanel * panel_stride + i % kPanel].
struct Scores {
  float* at;
  int64_t panel_stride, count;  // a multiple of kPanel

  LMFUSE_INLINE float* operator[](int64_t i) const {
    return at + i / kPanel * panel_stride + i % kPanel;
  }
  void multiply(const float* factors) const {
    for (int64_t i = 0; i < count; i += kLanes)
      store((*this)[i], load((*this)[i]) * load(factors + i));
  }
  void hide(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end;) {
      const int64_t stop = i / kPanel * kPanel + kPanel, n = (stop < end ? stop : end) - i;
      map((*this)[i], n, [](int64_t, auto) { return broadcast(kNever); });
      i += n;
    }
  }
};

// The mask of one row as numbers to add; true if there is one.
inline bool mask_row(const AttentionArgs& a, const RowInfo& row, int64_t head, int64_t begin,
                     int64_t count, float* to) {
  using Type = AttentionMask::Type;
  const AttentionMask& m = a.mask;
  if (m.type == Type::none) return false;
  const int64_t first =
      row.seq * m.stride_seq + head * m.stride_head + row.query * m.stride_query + begin * m.step;
  const auto floats = [&](auto* from) {
    if (m.step) {
      map(to, count, [&](int64_t i, auto l) { return load(from + i, l); });
    } else {
      float one[kLanes];
      store(one, load(from, Lanes::first(1)));
      for (int64_t i = 0; i < count; ++i) to[i] = one[0];
    }
  };
  switch (m.type) {
    case Type::none:
      break;
    case Type::boolean: {
      const auto* from = static_cast<const uint8_t*>(m.data) + first;
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * m.step] ? 0.0f : kNever;
      break;
    }
    case Type::f32:
      floats(static_cast<const float*>(m.data) + first);
      break;
    case Type::bf16:
      floats(static_cast<const bf16_t*>(m.data) + first);
      break;
    case Type::f16:
      floats(static_cast<const f16_t*>(m.data) + first);
      break;
  }
  return true;
}

LMFUSE_INLINE bool is_plain(const AttentionArgs& a) {
  return a.mask.type == AttentionMask::Type::none && !a.alibi && a.softcap == 0.0f &&
         a.scale > 0.0f;
}

// Everything but the exponential, for calls that ask for more than a scale and a range.
inline void bias_scores(const AttentionArgs& a, const RowInfo& row, int64_t head, int64_t begin,
                        int64_t visible, const Scores& scores) {
  alignas(64) float mask[kKeyChunk] = {}, distance[kKeyChunk];
  const bool masked = mask_row(a, row, head, begin, visible, mask);
  const float slope = a.alibi ? a.alibi[row.seq * a.alibi_stride + head] : 0.0f;
  if (a.alibi)
    for (int64_t i = 0; i < kKeyChunk; ++i)
      distance[i] = static_cast<float>(begin + i - row.position);
  for (int64_t i = 0; i < scores.count; i += kLanes) {
    Vec s = load(scores[i]) * broadcast(a.scale);
    if (a.softcap != 0.0f) s = broadcast(a.softcap) * tanh(s * broadcast(1.0f / a.softcap));
    if (a.alibi) s = s - broadcast(slope) * abs(load(distance + i));
    if (masked) s = s + load(mask + i);
    store(scores[i], s);
  }
}

// 2^x, relative error 2e-7 for fp32 weights and 3e-6 for those that become bf16 or integers.
// Polynomials of the least relative error on [-1/2, 1/2]. Below -126 it is 0: subnormal numbers
// take Intel's cores 150 cycles each. NaN gives NaN.
template <class Input>
LMFUSE_INLINE Vec exp2(Vec x) {
  const Mask tiny = x < broadcast(-126.0f);
  x = max(broadcast(-126.0f), x);
  const Vec n = round(x), r = x - n;
  Vec p;
  if constexpr (sizeof(Input) == 2) {
    p = broadcast(9.582836385e-3f);
    p = fma(p, r, broadcast(5.590641339e-2f));
    p = fma(p, r, broadcast(2.402409882e-1f));
    p = fma(p, r, broadcast(6.931241948e-1f));
  } else {
    p = broadcast(1.326471433e-3f);
    p = fma(p, r, broadcast(9.671512635e-3f));
    p = fma(p, r, broadcast(5.550733774e-2f));
    p = fma(p, r, broadcast(2.402224209e-1f));
    p = fma(p, r, broadcast(6.931469776e-1f));
  }
  return select(tiny, broadcast(0.0f), scale2(fma(p, r, broadcast(1.0f)), n));
}
constexpr float kLog2E = 1.44269504088896341f;

// Where the weights of a row go: as Input to `to`, whose rows are `row` apart.
template <class Input>
class Weights {
 public:
  Weights(Input* to, int64_t /*row*/) : to_(to) {}

  // Those of at[0 … 2 kLanes), scores i and on.
  LMFUSE_INLINE void take(float* /*at*/, int64_t i, Vec a, Vec b) { store_low(to_ + i, a, b); }
  LMFUSE_INLINE void finish(const Scores&) {}

 private:
  Input* to_;
};

#if defined(LMFUSE_INTS)
// In the place of their scores, until the largest of them is known.
template <>
class Weights<split_t> {
 public:
  Weights(split_t* to, int64_t row) : to_(to), row_(row), most_{broadcast(0.0f), broadcast(0.0f)} {}

  LMFUSE_INLINE void take(float* at, int64_t, Vec a, Vec b) {
    store_low(at, a, b);
    most_[0] = larger(most_[0], a);
    most_[1] = larger(most_[1], b);
  }
  LMFUSE_INLINE void finish(const Scores& weights) {
    split_row(
        weights.count, larger(most_[0], most_[1]),
        [&](int64_t i) LMFUSE_LAMBDA { return load(weights[i]); }, to_, row_);
  }

 private:
  split_t* to_;
  int64_t row_;
  Vec most_[2];
};
#endif

// Of one row: its largest score, in units of log 2, and the sum of 2^(score - largest).
struct RowSums {
  float largest, sum;
};

// Weights 2^(score - largest) (times the scales of the values, if any) and their sum. head is
// that of the query. Sums in two chains over fixed places, so that keys beyond those that are seen
// change nothing.
template <class Input>
RowSums softmax_row(const AttentionArgs& a, const RowInfo& row, int64_t head, int64_t begin,
                    const float* value_scales, const Scores& scores, Weights<Input> weights) {
  // Within the chunk, also where the window of the row begins behind it.
  const auto within = [&](int64_t i) { return i < 0 ? 0 : i < scores.count ? i : scores.count; };
  const int64_t from = within(row.begin - begin), end = within(row.end - begin);
  const int64_t to = end < from ? from : end;
  float scale = a.scale;
  if (!is_plain(a)) {
    bias_scores(a, row, head, begin, to, scores);
    scale = 1.0f;
  }
  scale *= kLog2E;
  scores.hide(0, from);
  scores.hide(to, scores.count);

  // NaN stays in sight: the second operand is returned where either is NaN.
  constexpr int64_t kStep = 2 * kLanes;
  Vec top0 = broadcast(kNever), top1 = top0;
  for (int64_t i = 0; i < scores.count; i += kStep) {
    const float* at = scores[i];
    top0 = max(top0, load(at));
    top1 = max(top1, load(at + kLanes));
  }
  const float top = max(max(top0, top1));
  const float largest = top == kNever ? kNever : top * scale;
  const Vec minus = broadcast(largest == kNever ? 0.0f : -largest), factor = broadcast(scale);
  Vec sum0 = broadcast(0.0f), sum1 = sum0;
  const auto weigh = [&](auto finish) LMFUSE_LAMBDA {
    for (int64_t i = 0; i < scores.count; i += kStep) {
      float* at = scores[i];
      const Vec e0 = exp2<Input>(fma(load(at), factor, minus));
      const Vec e1 = exp2<Input>(fma(load(at + kLanes), factor, minus));
      sum0 = sum0 + e0;
      sum1 = sum1 + e1;
      weights.take(at, i, finish(e0, i), finish(e1, i + kLanes));
    }
  };
  if (value_scales) {
    weigh([&](Vec e, int64_t i) LMFUSE_LAMBDA { return e * load(value_scales + i); });
  } else {
    weigh([](Vec e, int64_t) LMFUSE_LAMBDA { return e; });
  }
  weights.finish(scores);
  return {largest, sum(sum0 + sum1)};
}

// Largest scores (in units of log 2) and sums of some rows, one after the other.
struct Softmax {
  float *largest, *sum;
};

// Joins m to r, n rows; what r and m weighted is to be multiplied by old_part and new_part. Where
// neither saw a key, both are 0.
LMFUSE_INLINE void join(Softmax r, Softmax m, int64_t n, float* old_part, float* new_part) {
  const auto step = [&](int64_t i, auto l) LMFUSE_LAMBDA {
    const Vec before = load(r.largest + i, l), more = load(m.largest + i, l);
    const Vec largest = max(before, more);
    const Vec base = max(largest, broadcast(-3e38f));  // -inf less itself would be NaN
    const Vec old_factor = exp2<float>(before - base), new_factor = exp2<float>(more - base);
    const Vec sum = fma(load(r.sum + i, l), old_factor, load(m.sum + i, l) * new_factor);
    store(r.largest + i, largest, l);
    store(r.sum + i, sum, l);
    store(old_part + i, old_factor, l);
    store(new_part + i, new_factor, l);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, All{});
  if (i < n) step(i, Lanes::first(n - i));
}

// What no key was joined to yet.
LMFUSE_INLINE void clear(Softmax r, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    r.largest[i] = kNever;
    r.sum[i] = 0.0f;
  }
}
LMFUSE_INLINE void clear_values(float* values, int64_t n) {
  map(values, n, [](int64_t, auto) { return broadcast(0.0f); });
}

LMFUSE_INLINE void join_values(float* sum, const float* more, int64_t n, float old_part,
                               float new_part) {
  const Vec old_factor = broadcast(old_part), new_factor = broadcast(new_part);
  map(sum, n, [&](int64_t i, auto l) LMFUSE_LAMBDA {
    return fma(load(sum + i, l), old_factor, load(more + i, l) * new_factor);
  });
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
