// Keys and values in tensors: their types and strides, and tensors of integers that come from the
// caller's data.
#pragma once

#include <vector>

#include "common.h"

namespace lmfuse {

inline KvType kv_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return KvType::f32;
    case ScalarType::BFloat16:
      return KvType::bf16;
    case ScalarType::Half:
      return KvType::f16;
    case ScalarType::Float8_e5m2:
      return KvType::e5m2;
    case ScalarType::Float8_e4m3fn:
      return KvType::e4m3;
    case ScalarType::Char:
      return KvType::i8;
    default:
      LMFUSE_CHECK(false, name,
                   " must be float32, bfloat16, float16, float8_e5m2, float8_e4m3fn or int8");
  }
}

// Which dimension counts blocks (-1: none), tokens and heads.
struct KvDims {
  int block, token, head;
};

inline KvSource::Strides kv_strides(const Tensor& t, KvDims d) {
  return {d.block < 0 ? 0 : t.stride(d.block), t.stride(d.token), t.stride(d.head)};
}

// scales: of int8 and of nothing else, with the dimensions of t but for the last.
inline KvSource kv_source(const Tensor& t, const std::optional<Tensor>& scales, KvDims d,
                          const char* name) {
  KvSource s{};
  s.data = t.const_data_ptr();
  s.type = kv_type(t, name);
  s.stride = kv_strides(t, d);
  LMFUSE_CHECK((s.type == KvType::i8) == scales.has_value(), name,
               " needs scales if and only if it is int8");
  if (scales) {
    LMFUSE_CHECK(scales->is_cpu() && scales->scalar_type() == ScalarType::Float &&
                     scales->dim() + 1 == t.dim(),
                 "the scales of ", name, " must be float32, one for each token and head");
    for (int64_t i = 0; i + 1 < t.dim(); ++i)
      LMFUSE_CHECK(scales->size(i) == t.size(i), "the scales of ", name,
                   " must be one for each token and head");
    s.scale = static_cast<const float*>(scales->const_data_ptr());
    s.scale_stride = kv_strides(*scales, d);
  }
  return s;
}

// The elements of a tensor of int32 or int64, in order.
class Integers {
 public:
  Integers(const Tensor& t, const char* name)
      : t_(t.is_contiguous() ? t : torch::stable::contiguous(t)),
        at_(t_.const_data_ptr()),
        wide_(t.scalar_type() == ScalarType::Long) {
    LMFUSE_CHECK(t.is_cpu() && (wide_ || t.scalar_type() == ScalarType::Int), name,
                 " must be a CPU tensor of int32 or int64");
  }
  int64_t count() const { return t_.numel(); }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(at_)[i] : static_cast<const int32_t*>(at_)[i];
  }

 private:
  Tensor t_;
  const void* at_;
  bool wide_;
};

inline std::vector<int64_t> integers(const Tensor& t, const char* name) {
  LMFUSE_CHECK(t.dim() == 1, name, " must have one dimension");
  const Integers from(t, name);
  std::vector<int64_t> values(from.count());
  for (int64_t i = 0; i < from.count(); ++i) values[i] = from[i];
  return values;
}

}  // namespace lmfuse
