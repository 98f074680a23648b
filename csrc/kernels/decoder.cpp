// What decoder layers need besides the kernels of the single ops.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {

void add_scaled(const AddScaledArgs& a, int64_t begin, int64_t end) {
  with_type(a.y.dtype, [&](auto t) {
    using T = decltype(t);
    const Vec scale = broadcast(a.scale);
    for (int64_t r = begin; r < end; ++r) {
      const T *x = row<T>(a.x, r), *residual = row<T>(a.residual, r);
      map(row<T>(a.y, r), a.n,
          [&](int64_t i, auto l) { return load(residual + i, l) + load(x + i, l) * scale; });
    }
  });
}

}  // namespace lmfuse::LMFUSE_ISA
