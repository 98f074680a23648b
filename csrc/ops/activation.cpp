#include "common.h"

namespace lmfuse {
namespace {

Tensor gated(Tensor gate, Tensor up, Activation activation) {
  LMFUSE_CHECK(gate.is_cpu() && up.is_cpu() && same_sizes(gate, up) && same_type(gate, up),
               "x and y must be CPU tensors of one shape and dtype");
  Tensor y = new_like(gate, "x");
  if (y.numel() == 0) return y;

  GatedArgs a{};
  a.gate = as_rows(gate, "x");
  a.up = as_rows(up, "y");
  a.y = as_rows(y, "out");
  a.n = y.dim() ? y.size(y.dim() - 1) : 1;
  a.activation = activation;
  a.stream = bytes(y) >= kStreamBytes;

  const auto kernel = kernels().gated;
  parallel(y.numel() / a.n, a.n, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

Tensor silu_mul(Tensor x, Tensor y) { return gated(x, y, Activation::silu); }

Tensor gelu_mul(Tensor x, Tensor y, bool tanh) {
  return gated(x, y, tanh ? Activation::gelu_tanh : Activation::gelu_erf);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("silu_mul(Tensor x, Tensor y) -> Tensor");
  m.def("gelu_mul(Tensor x, Tensor y, bool tanh) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("gelu_mul", TORCH_BOX(&gelu_mul));
}

}  // namespace lmfuse
