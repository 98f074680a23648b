// RMS norm and layer norm, with or without a residual. Rows are read two (rms) or three (layer)
// times; after the first time they lie in the first-level cache. While the last pass of a stream
// computes, it fetches the next row, or memory would rest for that long.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

template <class X, class W, bool kCenter, bool kResidual>
void norm_row(const NormArgs& a, const X* x, X* residual, X* y) {
  const int64_t n = a.n;
  const W* weight = static_cast<const W*>(a.weight.data);
  const W* bias = static_cast<const W*>(a.bias.data);

  const auto value = [&](int64_t i, auto l) {
    const Vec v = load(x + i, l);
    if constexpr (kResidual) return v + load(residual + i, l);
    return v;
  };
  const Vec shift = broadcast(kCenter ? sum(n, value) / static_cast<float>(n) : 0.0f);
  const auto deviation = [&](Vec v) {
    if constexpr (kCenter) return v - shift;
    return v;
  };
  const float squares = sum(n, [&](int64_t i, auto l) {
    const Vec d = deviation(value(i, l));
    return d * d;
  });
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + a.eps));
  const Vec weight_offset = broadcast(a.weight_offset);

  map(a.stream, y, n, [&](int64_t i, auto l) {
    if (a.stream) {
      prefetch(x + n + i);
      if constexpr (kResidual) prefetch(residual + n + i);
    }
    const Vec s = value(i, l);
    if constexpr (kResidual)
      if (a.add_back) store(residual + i, s, l);
    Vec r = deviation(s) * scale;
    if (weight) r = r * (load(weight + i, l) + weight_offset);
    if constexpr (kCenter)
      if (bias) r = r + load(bias + i, l);
    return r;
  });
}

}  // namespace

void norm(const NormArgs& a, int64_t begin, int64_t end) {
  with_type(a.x.dtype, [&](auto x) {
    with_type(a.weight.dtype, [&](auto w) {
      with_flag(a.center, [&](auto center) {
        with_flag(a.residual.data != nullptr, [&](auto residual) {
          using X = decltype(x);
          constexpr bool kResidual = decltype(residual)::value;
          for (int64_t r = begin; r < end; ++r)
            norm_row<X, decltype(w), decltype(center)::value, kResidual>(
                a, row<X>(a.x, r), kResidual ? row<X>(a.residual, r) : nullptr, row<X>(a.y, r));
        });
      });
    });
  });
  if (a.stream) stream_end();
}

}  // namespace lmfuse::LMFUSE_ISA
