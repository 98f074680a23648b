// Rotary position embedding. Both elements of a pair are read before either is written: y may be x.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

struct Rotated {
  Vec first, second;
};

LMFUSE_INLINE Rotated rotate(Vec a, Vec b, Vec sin, Vec cos) {
  return {a * cos - b * sin, b * cos + a * sin};
}

// Heads of usual widths stay aligned from one to the next; others are stored through the caches.
template <class T>
LMFUSE_INLINE bool aligned(const T* y, int64_t n) {
  return (reinterpret_cast<uintptr_t>(y) | n * sizeof(T)) % kStreamAlign == 0;
}

// Pairs (j, j + half).
template <class T, class W>
LMFUSE_INLINE void rotate_half(const T* x, T* y, const W* sin, const W* cos, int64_t half,
                               bool streaming) {
  const auto at = [&](int64_t j, auto l) {
    return rotate(load(x + j, l), load(x + half + j, l), load(sin + j, l), load(cos + j, l));
  };
  const auto step = [&](int64_t j, auto l) {
    const Rotated r = at(j, l);
    store(y + j, r.first, l);
    store(y + half + j, r.second, l);
  };
  int64_t j = 0;
  if (streaming && aligned(y, half))
    for (; j + 2 * kLanes <= half; j += 2 * kLanes) {
      const Rotated r = at(j, All{}), s = at(j + kLanes, All{});
      stream(y + j, r.first, s.first);
      stream(y + half + j, r.second, s.second);
    }
  for (; j + kLanes <= half; j += kLanes) step(j, All{});
  if (j < half) step(j, Lanes::first(half - j));
}

// Pairs (2j, 2j + 1).
template <class T, class W>
LMFUSE_INLINE void rotate_interleaved(const T* x, T* y, const W* sin, const W* cos, int64_t half,
                                      bool streaming) {
  const auto at = [&](int64_t j, auto l, auto low, auto high) {
    Rotated in, out;
    deinterleave(load(x + 2 * j, low), load(x + 2 * j + kLanes, high), in.first, in.second);
    const Rotated r = rotate(in.first, in.second, load(sin + j, l), load(cos + j, l));
    interleave(r.first, r.second, out.first, out.second);
    return out;
  };
  const auto step = [&](int64_t j, auto l, auto low, auto high) {
    const Rotated r = at(j, l, low, high);
    store(y + 2 * j, r.first, low);
    store(y + 2 * j + kLanes, r.second, high);
  };
  int64_t j = 0;
  if (streaming && aligned(y, 2 * half))
    for (; j + kLanes <= half; j += kLanes) {
      const Rotated r = at(j, All{}, All{}, All{});
      stream(y + 2 * j, r.first, r.second);
    }
  for (; j + kLanes <= half; j += kLanes) step(j, All{}, All{}, All{});
  if (j < half) {
    const int64_t n = half - j, low = 2 * n < kLanes ? 2 * n : kLanes;
    step(j, Lanes::first(n), Lanes::first(low), Lanes::first(2 * n - low));
  }
}

template <class T, class W>
void rotate_token(const RopeArgs& a, int64_t token) {
  const int64_t b = token / a.seq_len, s = token % a.seq_len;
  const int64_t position =
      a.positions ? a.positions[b * a.pos_b + s * a.pos_s] + s * a.pos_step : s;
  const W* sin = static_cast<const W*>(a.sin) + b * a.sin_stride_b + position * a.sin_stride_s;
  const W* cos = static_cast<const W*>(a.cos) + b * a.cos_stride_b + position * a.cos_stride_s;
  const T* x = static_cast<const T*>(a.x.data) + b * a.x.stride_b + s * a.x.stride_s;
  T* y = static_cast<T*>(a.y.data) + b * a.y.stride_b + s * a.y.stride_s;
  for (int64_t h = 0; h < a.heads; ++h, x += a.x.stride_h, y += a.y.stride_h) {
    if (a.half) {
      rotate_half(x, y, sin, cos, a.rotary_dim / 2, a.stream);
    } else {
      rotate_interleaved(x, y, sin, cos, a.rotary_dim / 2, a.stream);
    }
    if (x != y && a.rotary_dim < a.head_dim)
      map(a.stream, y + a.rotary_dim, a.head_dim - a.rotary_dim,
          [&](int64_t i, auto l) { return load(x + a.rotary_dim + i, l); });
  }
}

}  // namespace

void rope(const RopeArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto x) {
    with_type(a.table_dtype, [&](auto w) {
      for (int64_t t = begin; t < end; ++t) rotate_token<decltype(x), decltype(w)>(a, t);
    });
  });
  if (a.stream) stream_end();
}

}  // namespace lmfuse::LMFUSE_ISA
