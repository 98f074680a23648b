// RMS norm and layer norm, with or without a residual. Rows are read two (rms) or three (layer)
// times; after the first time they lie in the first-level cache. While the last pass of a stream
// computes, it fetches the next row, or memory would rest for that long.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

template <class X, class W>
void norm_row(const NormArgs& a, const X* x, X* residual, X* y) {
  const int64_t n = a.n;
  const W* weight = static_cast<const W*>(a.weight.data);
  const W* bias = static_cast<const W*>(a.bias.data);

  const auto value = [&](int64_t i, auto l) {
    return residual ? load(x + i, l) + load(residual + i, l) : load(x + i, l);
  };
  const float mean = a.center ? sum(n, value) / static_cast<float>(n) : 0.0f;
  const Vec shift = broadcast(mean);
  const float squares = sum(n, [&](int64_t i, auto l) {
    const Vec d = value(i, l) - shift;
    return d * d;
  });
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + a.eps));
  const Vec weight_offset = broadcast(a.weight_offset), zero = broadcast(0.0f);

  map(a.stream, y, n, [&](int64_t i, auto l) {
    const Vec s = value(i, l);
    if (a.stream) prefetch(x + n + i);
    if (a.stream && residual) prefetch(residual + n + i);
    if (a.add_back) store(residual + i, s, l);
    const Vec normal = (s - shift) * scale;
    const Vec scaled = weight ? normal * (load(weight + i, l) + weight_offset) : normal;
    return scaled + (bias ? load(bias + i, l) : zero);
  });
}

}  // namespace

void norm(const NormArgs& a, int64_t begin, int64_t end) {
  with_type(a.x.dtype, [&](auto x) {
    with_type(a.weight.dtype, [&](auto w) {
      using X = decltype(x);
      using W = decltype(w);
      for (int64_t r = begin; r < end; ++r)
        norm_row<X, W>(a, row<X>(a.x, r), a.residual.data ? row<X>(a.residual, r) : nullptr,
                       row<X>(a.y, r));
    });
  });
  if (a.stream) stream_end();
}

}  // namespace lmfuse::LMFUSE_ISA
