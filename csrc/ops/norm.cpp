#include "common.h"

namespace lmfuse {
namespace {

Tensor norm(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight,
            std::optional<Tensor> bias, double eps, double weight_offset, bool add_back,
            bool center) {
  LMFUSE_CHECK(x.is_cpu() && x.dim() >= 1, "x must be a CPU tensor of at least one dimension");
  const int64_t n = x.size(x.dim() - 1);
  Tensor y = new_like(x, residual ? "x" : "hidden_states");
  if (y.numel() == 0) return y;

  if (residual)
    LMFUSE_CHECK(residual->is_cpu() && same_sizes(*residual, x) && same_type(*residual, x),
                 "residual must have the shape and dtype of x");
  if (add_back) {
    // What is read must not change while the residual is written; one and the same place is fine.
    const auto apart = [&](Tensor& t) {
      if (overlap(t, *residual) && !same_place(t, *residual)) t = torch::stable::clone(t);
    };
    apart(x);
    if (weight) apart(*weight);
    if (bias) apart(*bias);
  }

  NormArgs a{};
  a.x = as_rows(x, "x");
  a.y = as_rows(y, "y");
  if (residual) {
    a.residual =
        add_back ? as_rows_in_place(*residual, "residual") : as_rows(*residual, "residual");
  }
  if (weight) a.weight = as_vector(*weight, n, "weight");
  if (bias) {
    dtype(*bias, "bias");
    // One type for both in the kernel; fp32 holds either exactly.
    if (weight && !same_type(*bias, *weight)) {
      weight = torch::stable::to(*weight, ScalarType::Float);
      bias = torch::stable::to(*bias, ScalarType::Float);
      a.weight = as_vector(*weight, n, "weight");
    }
    a.bias = as_vector(*bias, n, "bias");
    a.weight.dtype = a.bias.dtype;
  }
  a.n = n;
  a.eps = static_cast<float>(eps);
  a.weight_offset = static_cast<float>(weight_offset);
  a.add_back = add_back && residual;
  a.center = center;
  a.stream = bytes(y) >= kStreamBytes;

  const auto kernel = kernels().norm;
  parallel(x.numel() / n, n, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

Tensor rms_norm(Tensor x, std::optional<Tensor> weight, double eps, double weight_offset) {
  return norm(x, {}, weight, {}, eps, weight_offset, false, false);
}

Tensor layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  return norm(x, {}, weight, bias, eps, 0, false, true);
}

Tensor add_rms_norm(Tensor x, Tensor residual, std::optional<Tensor> weight, double eps,
                    double weight_offset) {
  return norm(x, residual, weight, {}, eps, weight_offset, false, false);
}

Tensor add_rms_norm_(Tensor x, Tensor residual, std::optional<Tensor> weight, double eps,
                     double weight_offset) {
  return norm(x, residual, weight, {}, eps, weight_offset, true, false);
}

Tensor add_layer_norm(Tensor x, Tensor residual, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double eps) {
  return norm(x, residual, weight, bias, eps, 0, false, true);
}

Tensor add_layer_norm_(Tensor x, Tensor residual, std::optional<Tensor> weight,
                       std::optional<Tensor> bias, double eps) {
  return norm(x, residual, weight, bias, eps, 0, true, true);
}

}  // namespace

// The ops that end in _ also write x + residual into residual.
STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("rms_norm(Tensor hidden_states, Tensor? weight, float eps, float weight_offset) -> Tensor");
  m.def("layer_norm(Tensor hidden_states, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset)"
      " -> Tensor");
  m.def(
      "add_rms_norm_(Tensor x, Tensor(a!) residual, Tensor? weight, float eps, float weight_offset)"
      " -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
      " -> Tensor");
  m.def(
      "add_layer_norm_(Tensor x, Tensor(a!) residual, Tensor? weight, Tensor? bias, float eps)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_", TORCH_BOX(&add_layer_norm_));
}

}  // namespace lmfuse
