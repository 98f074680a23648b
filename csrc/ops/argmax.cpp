// Where each row is largest.
#include "linear.h"

namespace lmfuse {
namespace {

Tensor argmax(Tensor x) {
  LMFUSE_CHECK(x.is_cpu() && x.dim() >= 1 && x.size(x.dim() - 1) > 0,
               "x must be a CPU tensor whose rows are not empty");
  ArgmaxArgs a{};
  a.n = x.size(x.dim() - 1);
  const Sizes sizes(x, x.dim() - 1, a.n, "x");
  Tensor y = new_tensor(sizes.at, sizes.dim - 1, ScalarType::Long);
  a.x = as_rows(x, "x");
  a.y = static_cast<int64_t*>(y.mutable_data_ptr());
  const auto kernel = kernels().argmax;
  parallel(y.numel(), a.n, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) { m.def("argmax(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) { m.impl("argmax", TORCH_BOX(&argmax)); }

}  // namespace lmfuse
