// The loops that all kernels share, so that tails, storage types, strides and streaming stores are
// written once. A kernel is a lambda (i, lanes) -> Vec.
#pragma once

#include "simd.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// Every lane in use, known to the compiler.
struct All {};
template <class T>
LMFUSE_INLINE Vec load(const T* p, All) {
  return load(p);
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a, All) {
  store(p, a);
}
LMFUSE_INLINE Vec keep(Vec a, All) { return a; }

// Calls f with a value of the C++ type that stores t.
template <class F>
LMFUSE_INLINE void with_type(DType t, F f) {
  switch (t) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16_t{});
    case DType::f16:
      return f(f16_t{});
  }
}

// Calls f with the constant b.
template <bool B>
struct Flag {
  static constexpr bool value = B;
};
template <class F>
LMFUSE_INLINE void with_flag(bool b, F f) {
  if (b) {
    f(Flag<true>{});
  } else {
    f(Flag<false>{});
  }
}

// Calls f with the constant n, 1 <= n <= N.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int N, class F>
LMFUSE_INLINE void with_count(int64_t n, F f) {
  if constexpr (N > 1)
    if (n < N) return with_count<N - 1>(n, f);
  f(Count<N>{});
}

LMFUSE_INLINE int64_t offset(const Rows& rows, int64_t r) {
  int64_t at = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    at += r % rows.size[d] * rows.stride[d];
    r /= rows.size[d];
  }
  return rows.dims ? at + r * rows.stride[0] : 0;
}

// Fetches the line of p, which may lie anywhere: a hint never faults.
template <class T>
LMFUSE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p);
}

template <class T>
LMFUSE_INLINE T* row(const Matrix& m, int64_t r) {
  return static_cast<T*>(m.data) + offset(m.rows, r);
}

// y[i] = f(i) for i in [0, n).
template <class T, class F>
LMFUSE_INLINE void map(T* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(i, All{}));
  if (i < n) store(y + i, f(i, Lanes::first(n - i)), Lanes::first(n - i));
}

constexpr uintptr_t kStreamAlign = 4 * kLanes;  // of what stream() writes to, in bytes

// The same with stores around the caches, for a y that would not stay in them anyway: a store that
// first fetches its line costs half as much traffic again.
template <class T, class F>
LMFUSE_INLINE void map_stream(T* y, int64_t n, F f) {
  constexpr int64_t kStep = 2 * kLanes;
  const uintptr_t past = reinterpret_cast<uintptr_t>(y) % kStreamAlign;
  const int64_t head = past ? static_cast<int64_t>((kStreamAlign - past) / sizeof(T)) : 0;
  if (past % sizeof(T) || head > n) return map(y, n, f);
  map(y, head, f);
  int64_t i = head;
  for (; i + kStep <= n; i += kStep) stream(y + i, f(i, All{}), f(i + kLanes, All{}));
  map(y + i, n - i, [&](int64_t j, auto l) { return f(i + j, l); });
}

template <class T, class F>
LMFUSE_INLINE void map(bool streaming, T* y, int64_t n, F f) {
  if (streaming) {
    map_stream(y, n, f);
  } else {
    map(y, n, f);
  }
}

// Sum of f(i) over [0, n): four chains hide the latency of the addition, joined in a fixed order.
template <class F>
LMFUSE_INLINE float sum(int64_t n, F f) {
  Vec s0 = broadcast(0.0f), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 = s0 + f(i, All{});
    s1 = s1 + f(i + kLanes, All{});
    s2 = s2 + f(i + 2 * kLanes, All{});
    s3 = s3 + f(i + 3 * kLanes, All{});
  }
  for (; i + kLanes <= n; i += kLanes) s0 = s0 + f(i, All{});
  if (i < n) s1 = s1 + keep(f(i, Lanes::first(n - i)), Lanes::first(n - i));
  return sum((s0 + s1) + (s2 + s3));
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
