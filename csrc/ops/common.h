// What every op needs between torch and a kernel: checks, views of tensors as rows, outputs,
// threads. libtorch's stable ABI only (2.10), so that one binary serves every torch from there on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>

#include "../kernels/kernels.h"

namespace lmfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The last net below the checks in Python, which name the argument. What only the data can tell (a
// position outside of a table) is found here; "[value]" makes functional/ raise it as a ValueError.
#define LMFUSE_CHECK(condition, ...) STD_TORCH_CHECK(condition, "lmfuse: ", __VA_ARGS__)
#define LMFUSE_CHECK_VALUE(condition, ...) \
  STD_TORCH_CHECK(condition, "lmfuse: [value]", __VA_ARGS__)

// torch's own number of a dtype. Tensor::scalar_type() looks each one up anew, 40 ns a call.
inline int32_t type_code(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}
inline bool same_type(const Tensor& a, const Tensor& b) { return type_code(a) == type_code(b); }

inline DType dtype(const Tensor& t, const char* name) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  const int32_t code = type_code(t);
  LMFUSE_CHECK(code == f32 || code == bf16 || code == f16, name,
               " must be float32, bfloat16 or float16");
  return code == f32 ? DType::f32 : code == bf16 ? DType::bf16 : DType::f16;
}

inline int64_t element_bytes(const Tensor& t) { return dtype(t, "a tensor") == DType::f32 ? 4 : 2; }

inline int64_t bytes(const Tensor& t) { return t.numel() * element_bytes(t); }

constexpr int64_t kMaxDims = 64;  // as in torch's own loops

inline void check_dims(int64_t dim, const char* name) {
  LMFUSE_CHECK_VALUE(dim <= kMaxDims, name, " has ", dim, " dimensions, but may have at most ",
                     kMaxDims);
}

// The sizes of a result: the leading ones of t, and a last one.
struct Sizes {
  int64_t at[kMaxDims + 1];
  int64_t dim;

  Sizes(const Tensor& t, int64_t lead, int64_t last, const char* name) : dim(lead + 1) {
    check_dims(t.dim(), name);
    for (int64_t d = 0; d < lead; ++d) at[d] = t.size(d);
    at[lead] = last;
  }
};

// A new contiguous tensor; like torch's, its memory holds what it held before.
inline Tensor empty(const int64_t* sizes, int64_t dim, const Tensor& like) {
  int64_t strides[kMaxDims];
  for (int64_t d = dim - 1, step = 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t type;
  aoti_torch_get_dtype(like.get(), &type);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& x, const char* name) {
  check_dims(x.dim(), name);
  return empty(x.sizes().data(), x.dim(), x);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// The leading dimensions of t, neighbours joined where one stride serves both. False if more than
// Rows::kMaxDims are left, or the elements of a row are not contiguous.
inline bool collapse(const Tensor& t, Rows& rows) {
  const int64_t dim = t.dim();
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  rows.dims = 0;
  if (t.numel() == 0) return true;  // whose strides may be anything
  if (dim && sizes[dim - 1] > 1 && strides[dim - 1] != 1) return false;
  for (int64_t d = 0; d + 1 < dim; ++d) {
    if (sizes[d] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.stride[last] == sizes[d] * strides[d]) {
      rows.size[last] *= sizes[d];
      rows.stride[last] = strides[d];
      continue;
    }
    if (rows.dims == Rows::kMaxDims) return false;
    rows.size[rows.dims] = sizes[d];
    rows.stride[rows.dims++] = strides[d];
  }
  return true;
}

// t as rows; a tensor that cannot be seen so is copied first, and t then holds the copy.
inline Matrix as_rows(Tensor& t, const char* name) {
  Matrix m;
  if (!collapse(t, m.rows)) {
    t = torch::stable::contiguous(t);
    collapse(t, m.rows);
  }
  m.data = t.data_ptr();
  m.dtype = dtype(t, name);
  return m;
}

inline bool same_place(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || !same_sizes(a, b)) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Whether the stretches of memory from the first to the last elements of a and b meet.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;  // whose strides may be anything
  const auto stretch = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    const char* begin = static_cast<const char*>(t.const_data_ptr());
    return std::pair(begin, begin + (last + 1) * element_bytes(t));
  };
  const auto [a_begin, a_end] = stretch(a);
  const auto [b_begin, b_end] = stretch(b);
  return a_begin < b_end && b_begin < a_end;
}

// A tensor that is written in place, so that a copy would lose the result.
inline Matrix as_rows_in_place(const Tensor& t, const char* name) {
  Matrix m;
  LMFUSE_CHECK_VALUE(collapse(t, m.rows), name,
                     " is written in place, so its last dimension must be ",
                     "contiguous and the others must need at most ", Rows::kMaxDims, " strides");
  m.data = t.mutable_data_ptr();
  m.dtype = dtype(t, name);
  return m;
}

inline Vector as_vector(Tensor& t, int64_t n, const char* name) {
  LMFUSE_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == n, name, " must be a CPU tensor of ", n,
               " elements");
  if (n > 1 && t.stride(0) != 1) t = torch::stable::contiguous(t);
  return {t.const_data_ptr(), dtype(t, name)};
}

// Outputs of this size leave the caches before anybody reads them.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Splits [0, count) over torch's own threads, each with at least 32k elements: below that, waking a
// thread (2 to 5 us) costs more than it saves.
template <class F>
void parallel(int64_t count, int64_t elements_each, const F& f) {
  constexpr int64_t kGrain = 32768;
  const int64_t grain = elements_each > 0 ? (kGrain + elements_each - 1) / elements_each : kGrain;
  if (count <= grain) {
    if (count > 0) f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

}  // namespace lmfuse
