// What a mixture of experts needs besides the products.
#include "loops.h"
#include "math.h"

namespace lmfuse::LMFUSE_ISA {

void softmax(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  with_type(a.x.dtype, [&](auto t) {
    for (int64_t r = begin; r < end; ++r) {
      const auto* x = row<decltype(t)>(a.x, r);
      float* y = row<float>(a.y, r);
      map(y, a.n, [&](int64_t i, auto l) { return load(x + i, l); });
      float most = y[0];
      for (int64_t i = 1; i < a.n; ++i) most = y[i] > most ? y[i] : most;
      const Vec shift = broadcast(most);
      map(y, a.n, [&](int64_t i, auto l) { return exp(load(y + i, l) - shift); });
      const Vec scale =
          broadcast(1.0f / sum(a.n, [&](int64_t i, auto l) { return load(y + i, l); }));
      map(y, a.n, [&](int64_t i, auto l) { return load(y + i, l) * scale; });
    }
  });
}

void mix(const MixArgs& a, int64_t begin, int64_t end) {
  with_type(a.y.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t* from = a.from + r * a.count;
      const float* weights = a.weights + r * a.count;
      map(row<T>(a.y, r), a.n, [&](int64_t i, auto l) {
        Vec mixed = broadcast(0.0f);
        for (int64_t j = 0; j < a.count; ++j)
          mixed = fma(load(row<T>(a.x, from[j]) + i, l), broadcast(weights[j]), mixed);
        return mixed;
      });
    }
  });
}

}  // namespace lmfuse::LMFUSE_ISA
