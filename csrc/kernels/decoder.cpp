// What decoder layers need besides the kernels of the single ops.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {

void add_scaled(const AddScaledArgs& a, int64_t begin, int64_t end) {
  const Vec scale = broadcast(a.scale);
  with_type(a.y.dtype, [&](auto t) {
    using T = decltype(t);
    const auto rows = [&](auto from) {
      using From = decltype(from);
      for (int64_t r = begin; r < end; ++r) {
        const From* x = row<From>(a.x, r);
        const T* residual = a.residual.data ? row<T>(a.residual, r) : nullptr;
        map(row<T>(a.y, r), a.n, [&](int64_t i, auto l) {
          const Vec scaled = load(x + i, l) * scale;
          return residual ? load(residual + i, l) + scaled : scaled;
        });
      }
    };
    if (a.x.dtype == a.y.dtype) {
      rows(t);
    } else {
      rows(float{});
    }
  });
}

}  // namespace lmfuse::LMFUSE_ISA
