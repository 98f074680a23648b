// The rows that the products of a decoder layer read, in the form that their kernels want: products
// that want the same share it.
#pragma once

#include <optional>

#include "decoder_layers.h"

namespace lmfuse {

// Rows that lie a multiple of 1 KB apart share few sets of the first-level cache.
inline int64_t row_stride(int64_t width, int64_t rows) {
  const int64_t padded = (width + kDotStep - 1) / kDotStep * kDotStep;
  return rows > 1 ? padded + 32 : padded;
}

inline Matrix rows_matrix(void* data, DType type, int64_t rows, int64_t stride) {
  Matrix m{data, type, {}};
  m.rows.dims = 1;
  m.rows.size[0] = rows;
  m.rows.stride[0] = stride;
  return m;
}

// Zeros from `width` to the end of each row: what lies there is multiplied by zeros.
inline void pad_rows(const Matrix& m, int64_t width) {
  const int64_t element = m.dtype == DType::f32 ? 4 : 2, row = m.rows.stride[0] * element;
  char* at = static_cast<char*>(m.data) + width * element;
  for (int64_t r = 0; width % kDotStep && r < m.rows.size[0]; ++r, at += row)
    std::memset(at, 0, row - width * element);
}

// m rows of x for products with one linear layer, or with more of its form.
class DecoderRows {
 public:
  // joined: for a product of gate and up.
  DecoderRows(const DecoderLinear& l, DType type, int64_t m, bool joined) {
    if (l.quantized) {
      woq_.emplace(l.weight, l.how, m, joined ? 2 : 1);
    } else {
      const GemmFormat format = kernels().gemm_format(type, m);
      as_is_ = format.type == type;
      gemm_.type = format.type;
      gemm_.k = l.k;
      gemm_.lda = row_stride(l.k, m);
      row_bytes_ = m * gemm_.lda * (format.type == DType::f32 ? 4 : 2);
      scratch_bytes_ = format.scratch_rows * kPanel * 2 * 4;
    }
  }

  int64_t bytes() const { return woq_ ? woq_->bytes : row_bytes_; }
  int64_t scratch_bytes() const { return woq_ ? woq_->scratch_bytes : scratch_bytes_; }

  bool serves(const DecoderRows& other) const {
    return woq_ ? other.woq_ && woq_->serves(*other.woq_) : !other.woq_;
  }

  // From x to `to`, which has room for bytes(). padded: beyond k, rows of x have zeros.
  void place(const Matrix& x, bool padded, char* to) {
    if (woq_) {
      woq_->rows.x = x;
      woq_->place(to);
    } else {
      as_is_ = as_is_ && padded;
      gemm_.x = x;
      gemm_.rows = as_is_ ? x.data : to;
      if (as_is_) gemm_.lda = x.rows.stride[0];
    }
  }
  bool as_is() const { return !woq_ && as_is_; }

  void make(int64_t begin, int64_t end, float* scratch) {
    if (woq_) {
      woq_->rows.scratch = scratch;
      kernels().woq_rows(woq_->rows, begin, end);
    } else if (!as_is_) {
      kernels().gemm_rows(gemm_, begin, end);
    }
  }

  // Row r becomes row `at` of `from`, both of a quantized weight.
  void take(int64_t r, const DecoderRows& from, int64_t at) const { woq_->take(r, *from.woq_, at); }

  void tell(WoqArgs& a) const {
    if (woq_) return woq_->tell(a);
    a.x = gemm_.rows;
    a.lda = gemm_.lda;
  }

 private:
  std::optional<WoqForm> woq_;  // of a quantized weight; of a packed one the rest
  GemmRowsArgs gemm_{};
  bool as_is_ = false;
  int64_t row_bytes_ = 0, scratch_bytes_ = 0;
};

struct DecoderProduct : WoqArgs {
  bool quantized;

  DecoderProduct() : WoqArgs{}, quantized(false) {}
  DecoderProduct(const DecoderLinear& l, const DecoderRows& rows, int64_t m) : DecoderProduct() {
    rows.tell(*this);
    weight = l.panels;
    weight_type = l.type;
    bias = l.bias;
    this->m = m;
    n = l.n;
    k = l.k;
    format = l.weight.format;
    quantized = l.quantized;
  }
  void run(int64_t begin, int64_t end) const {
    if (quantized) {
      kernels().woq(*this, begin, end);
    } else {
      kernels().gemm(*this, begin, end);
    }
  }
};

// Some products of the same rows.
struct DecoderProducts {
  static constexpr int kMost = 3;
  DecoderProduct at[kMost];
  int count = 0;
};

}  // namespace lmfuse
