// What a mixture of experts needs besides the products.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {

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
