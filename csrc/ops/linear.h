// What the ops of linear layers share, be their weights plain or quantized.
#pragma once

#include "common.h"

namespace lmfuse {

inline Tensor new_tensor(const int64_t* sizes, int64_t dim, ScalarType type) {
  return torch::stable::empty({sizes, static_cast<size_t>(dim)}, type);
}

inline ScalarType scalar_type(DType type) {
  return type == DType::f32    ? ScalarType::Float
         : type == DType::bf16 ? ScalarType::BFloat16
                               : ScalarType::Half;
}

inline Tensor new_result(const Tensor& x, int64_t n) {
  const Sizes sizes(x, x.dim() - 1, n, "x");
  return empty(sizes.at, sizes.dim, x);
}

inline Matrix operand(std::optional<Tensor>& t, const Tensor& out, const char* name) {
  if (!t) return {};
  LMFUSE_CHECK(t->is_cpu() && same_sizes(*t, out) && same_type(*t, out), name,
               " must have the shape and dtype of the result");
  return as_rows(*t, name);
}

inline uint32_t thread_index() {
  uint32_t index = 0;
  torch_get_thread_idx(&index);
  return index;
}

inline PostOp checked_post(int64_t post, const std::optional<Tensor>& other,
                           const std::optional<Tensor>& other2) {
  LMFUSE_CHECK(post >= 0 && post < static_cast<int64_t>(PostOp::gate_up),
               "post is unknown: ", post);
  const PostOp op = static_cast<PostOp>(post);
  const bool one = op == PostOp::mul || op == PostOp::add || op == PostOp::silu_mul;
  const bool two = op == PostOp::add_add;
  LMFUSE_CHECK(other.has_value() == (one || two) && other2.has_value() == two,
               "post takes another number of operands");
  return op;
}

}  // namespace lmfuse
