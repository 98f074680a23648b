// Where each row is largest, or where several rows together are.
#include <algorithm>
#include <cmath>
#include <vector>

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

using Sum = std::pair<float, int64_t>;  // and where it is

// As torch orders: NaN is larger than all.
bool larger(const Sum& a, const Sum& b) {
  return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
}

// The k largest of n numbers, at(i), of which next(i, v) is the first from i on that is above v or
// NaN. Of equal numbers those are found, and in that order, that torch.topk finds, since they take
// the same steps: std::partial_sort where k is small, of which a heap and what enters it is all
// that counts; else std::nth_element.
template <class At, class Next>
std::vector<Sum> largest(int64_t n, int64_t k, const At& at, const Next& next) {
  const bool few = k * 64 <= n;
  std::vector<Sum> found(few ? k + 1 : n);
  for (int64_t i = 0; i < (few ? k : n); ++i) found[i] = {at(i), i};
  const auto begin = found.begin(), end = begin + k;
  if (!few) {
    std::nth_element(begin, end - 1, found.end(), larger);
    std::sort(begin, end - 1, larger);
    return found;
  }
  std::make_heap(begin, end, larger);
  for (int64_t i = next(k, begin->first); i < n; i = next(i + 1, begin->first)) {
    *end = {at(i), i};
    if (larger(*end, *begin)) std::pop_heap(begin, end + 1, larger);
  }
  std::sort_heap(begin, end, larger);
  return found;
}

std::tuple<Tensor, Tensor> top_sums(Tensor x, Tensor add, int64_t k) {
  LMFUSE_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 3 && add.is_cpu() &&
                   add.scalar_type() == ScalarType::Float && add.dim() == 2 &&
                   add.size(0) == x.size(0) && add.size(1) == x.size(1),
               "x must be float32 [batch, rows, n], and add float32 [batch, rows]");
  const int64_t batch = x.size(0), rows = x.size(1), n = x.size(2);
  LMFUSE_CHECK_VALUE(k >= 1 && k <= rows * n, "k is ", k, ", but must be between 1 and ", rows * n);
  const int64_t sizes[2] = {batch, k};
  Tensor values = new_tensor(sizes, 2, ScalarType::Float);
  Tensor places = new_tensor(sizes, 2, ScalarType::Long);
  x = torch::stable::contiguous(x);
  add = torch::stable::contiguous(add);
  auto* value = static_cast<float*>(values.mutable_data_ptr());
  auto* place = static_cast<int64_t*>(places.mutable_data_ptr());
  const auto kernel = kernels().above;
  parallel(batch, rows * n, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto* from = static_cast<const float*>(x.const_data_ptr()) + b * rows * n;
      const auto* plus = static_cast<const float*>(add.const_data_ptr()) + b * rows;
      const auto at = [&](int64_t i) { return from[i] + plus[i / n]; };
      const auto next = [&](int64_t i, float than) {
        for (int64_t r = i / n, y = i; r < rows; ++r) {
          kernel({from, plus[r], than, &y}, y, (r + 1) * n);
          if (y < (r + 1) * n) return y;
        }
        return rows * n;
      };
      const auto found = largest(rows * n, k, at, next);
      for (int64_t i = 0; i < k; ++i) std::tie(value[b * k + i], place[b * k + i]) = found[i];
    }
  });
  return {values, places};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("argmax(Tensor x) -> Tensor");
  m.def("top_sums(Tensor x, Tensor add, int k) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("argmax", TORCH_BOX(&argmax));
  m.impl("top_sums", TORCH_BOX(&top_sums));
}

}  // namespace lmfuse
