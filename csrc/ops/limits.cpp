// The limits of the machine as ops: each does its work once on torch's own threads, Python times
// it.
#include "common.h"
#include "memory.h"

namespace lmfuse {
namespace {

int64_t pages(const Tensor& t, const char* name) {
  LMFUSE_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                   t.numel() % kPage == 0 &&
                   reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 64 == 0,
               name, " must be a contiguous, aligned CPU tensor of float32, a multiple of ", kPage,
               " elements");
  return t.numel() / kPage;
}

// In large pages, like the weights that are compared with it.
Tensor buffer(int64_t elements) {
  LMFUSE_CHECK(elements > 0, "elements must be positive");
  return new_large_pages(elements * static_cast<int64_t>(sizeof(float)));
}

void read(Tensor x) {
  const int64_t count = pages(x, "x");
  const ReadArgs a{static_cast<const float*>(x.const_data_ptr())};
  const auto kernel = kernels().limit_read;
  parallel(count, kPage, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void copy(Tensor x, Tensor y, bool stream) {
  const int64_t count = pages(x, "x");
  LMFUSE_CHECK(pages(y, "y") == count, "x and y must be of one size");
  const CopyArgs a{static_cast<const float*>(x.const_data_ptr()),
                   static_cast<float*>(y.mutable_data_ptr()), stream};
  const auto kernel = kernels().limit_copy;
  parallel(count, kPage, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void peak(Tensor operations, int64_t unit, int64_t rounds) {
  LMFUSE_CHECK(operations.is_cpu() && operations.scalar_type() == ScalarType::Long &&
                   operations.is_contiguous(),
               "operations must be a contiguous CPU tensor of int64");
  LMFUSE_CHECK(unit >= 0 && unit <= 2 && rounds >= 0, "unit must be 0, 1 or 2 and rounds positive");
  const PeakArgs a{static_cast<Unit>(unit), rounds,
                   static_cast<int64_t*>(operations.mutable_data_ptr())};
  const auto kernel = kernels().limit_peak;
  // Each thread is worth waking up.
  torch::stable::parallel_for(0, operations.numel(), 1,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("limit_buffer(int elements) -> Tensor");
  m.def("limit_read(Tensor x) -> ()");
  m.def("limit_copy(Tensor x, Tensor(a!) y, bool stream) -> ()");
  m.def("limit_peak(Tensor(a!) operations, int unit, int rounds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("limit_read", TORCH_BOX(&read));
  m.impl("limit_copy", TORCH_BOX(&copy));
  m.impl("limit_peak", TORCH_BOX(&peak));
}

// No tensor tells it which device it belongs to.
STABLE_TORCH_LIBRARY_IMPL(lmfuse, CompositeExplicitAutograd, m) {
  m.impl("limit_buffer", TORCH_BOX(&buffer));
}

}  // namespace lmfuse
