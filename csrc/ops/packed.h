// A packed weight is a tensor of bytes: a header, which says what follows and is checked against
// the length at every use, and the panels (kernels.h).
#pragma once

#include <cstring>

#include "common.h"

namespace lmfuse {

struct Header {
  static constexpr char kMagic[8] = {'l', 'm', 'f', 'u', 's', 'e', 'W', '1'};  // W, layout 1
  char magic[8];
  int64_t n, k;
  int32_t dtype;
  char rest[36];  // zero
};
static_assert(sizeof(Header) == 64);

struct Packed {
  const char* panels;
  DType dtype;
  int64_t n, k;
};

inline int64_t packed_bytes(DType type, int64_t n, int64_t k) {
  return static_cast<int64_t>(sizeof(Header)) + panel_count(n) * panel_bytes(type, k);
}

// The only way to the bytes of a packed weight: nothing that their number does not bear out.
inline Packed open(const void* data, int64_t size, const char* name) {
  LMFUSE_CHECK_VALUE(size >= static_cast<int64_t>(sizeof(Header)), name,
                     " is not a weight that lmfuse packed: it has ", size, " bytes");
  Header h;
  std::memcpy(&h, data, sizeof(h));
  LMFUSE_CHECK_VALUE(std::memcmp(h.magic, Header::kMagic, sizeof(h.magic)) == 0, name,
                     " is not a weight that this version of lmfuse packed: its header is unknown");
  constexpr int64_t kMost = int64_t{1} << 31;
  LMFUSE_CHECK_VALUE(h.dtype >= 0 && h.dtype <= static_cast<int32_t>(DType::f16) && h.n > 0 &&
                         h.k > 0 && h.n < kMost && h.k < kMost,
                     name, " has a damaged header: ", h.n, " by ", h.k, ", dtype ", h.dtype);
  const DType type = static_cast<DType>(h.dtype);
  LMFUSE_CHECK_VALUE(size == packed_bytes(type, h.n, h.k), name, " has ", size,
                     " bytes, but its header (", h.n, " by ", h.k, ") asks for ",
                     packed_bytes(type, h.n, h.k));
  return {static_cast<const char*>(data) + sizeof(Header), type, h.n, h.k};
}

inline Packed open(const Tensor& t, const char* name) {
  static const int32_t byte = aoti_torch_dtype_uint8();
  LMFUSE_CHECK_VALUE(t.is_cpu() && t.dim() == 1 && type_code(t) == byte && t.is_contiguous(), name,
                     " must be a packed weight: a contiguous CPU tensor of bytes");
  return open(t.const_data_ptr(), t.numel(), name);
}

// Pieces [begin, end) of some products over the same rows, which are counted product by product:
// panels of row blocks, as the kernel counts them.
inline void run_products(const GemmArgs* products, int64_t count, int64_t begin, int64_t end,
                         float* scratch) {
  const auto kernel = kernels().gemm;
  int64_t at = 0;
  for (int64_t p = 0; p < count; ++p) {
    GemmArgs mine = products[p];
    const int64_t work = (mine.m + kRowBlock - 1) / kRowBlock * panel_count(mine.n);
    const int64_t from = begin > at ? begin - at : 0;
    const int64_t to = end - at < work ? end - at : work;
    at += work;
    if (from >= to) continue;
    mine.scratch = scratch;
    kernel(mine, from, to);
  }
}

}  // namespace lmfuse
