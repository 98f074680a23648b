// Mixtures of experts: all the experts that some token has chosen, in one parallel region.
#include "experts_steps.h"
#include "kv.h"
#include "linear.h"

namespace lmfuse {
namespace {

// See functional/experts.py.
Tensor experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down,
               std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias, int64_t n,
               int64_t k, int64_t how, int64_t act, double slope, double limit) {
  LMFUSE_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) == k, "x must be a CPU tensor [tokens, ", k,
               "]");
  constexpr int64_t kMost = int64_t{1} << 31;
  LMFUSE_CHECK_VALUE(n > 0 && n <= kMost && k > 0 && k <= kMost, "the experts are ", n, " by ", k,
                     ", but must have features, and at most 2^31");
  LMFUSE_CHECK(index.dim() == 2 && same_sizes(index, weights) && index.size(0) == x.size(0),
               "index and weights must be [tokens, chosen]");
  LMFUSE_CHECK(act >= 0 && act <= static_cast<int64_t>(Activation::clamped_swiglu),
               "act is unknown: ", act);
  LMFUSE_CHECK(gate_up.dim() == down.dim() && down.dim() == (how < 0 ? 2 : 1),
               "gate_up and down must be packed weights [count, bytes], or quantized ones [bytes]");
  int64_t count = down.size(0);
  if (how >= 0) count = open_quantized(down, "down").format.n / (panel_count(k) * kPanel);
  LMFUSE_CHECK_VALUE(how >= 0 || gate_up.size(0) == 2 * count, "gate_up has ", gate_up.size(0),
                     " matrices for ", count, " experts");
  const auto given = [](const std::optional<Tensor>& t) {
    LMFUSE_CHECK(!t || t->dim() == 2, "a bias of experts must have two dimensions");
    return t ? &*t : nullptr;
  };
  const Mixture mixture{{gate_up, given(gate_up_bias), 2 * count, n, k, how, "gate_up"},
                        {down, given(down_bias), count, k, n, how, "down"},
                        static_cast<Activation>(act),
                        static_cast<float>(slope),
                        static_cast<float>(limit)};
  ExpertsCall c{};
  c.type = dtype(x, "x");
  const DType held = mixture.down.type;
  LMFUSE_CHECK_VALUE(
      how >= 0 || (mixture.gate_up.type == held &&
                   (held == c.type || (c.type == DType::f32 && held == DType::bf16))),
      "x must have the dtype of the weights, or be float32 over bfloat16");
  c.tokens = x.size(0);
  c.chosen = index.size(1);
  c.n = n;
  c.k = k;
  Tensor y = new_result(x, k);
  if (!c.rows()) {
    if (c.tokens) std::memset(y.mutable_data_ptr(), 0, c.tokens * k * c.element());
    return y;
  }
  x = torch::stable::contiguous(x);
  c.y = rows_matrix(y.mutable_data_ptr(), c.type, c.tokens, k);
  weights = torch::stable::contiguous(torch::stable::to(weights, ScalarType::Float));
  const auto* first = static_cast<const float*>(weights.const_data_ptr());
  c.weights.assign(first, first + c.rows());
  std::vector<int64_t> chosen(c.rows());
  const Integers asked(index, "index");
  for (int64_t i = 0; i < c.rows(); ++i) {
    chosen[i] = asked[i];
    LMFUSE_CHECK_VALUE(chosen[i] >= 0 && chosen[i] < count, "index has ", chosen[i],
                       ", but there are ", count, " experts");
  }
  c.size(mixture, c.rows());
  const int64_t most = c.rows() * 3 * n * k >> 18;  // 256k products each, or a thread is not worth
  const int64_t threads = std::min(thread_count(), std::max<int64_t>(most, 1));  // waking
  const Buffers buffers([&](Buffers& b) { c.carve(b, threads); });
  c.choose(mixture, chosen.data());
  const Matrix tokens = rows_matrix(const_cast<void*>(x.const_data_ptr()), c.type, c.tokens, k);
  together(threads, [&](Worker& w) { ExpertsWorker(c, w, tokens).run(); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def(
      "experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down,"
      " Tensor? gate_up_bias, Tensor? down_bias, int n, int k, int how, int act, float slope,"
      " float limit) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) { m.impl("experts", TORCH_BOX(&experts)); }

}  // namespace lmfuse
