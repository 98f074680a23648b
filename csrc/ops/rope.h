// What RoPE is given besides the heads: tables of angles, and which of their rows.
#pragma once

#include "common.h"

namespace lmfuse {

// Heads of x, [batch, seq, heads, head_dim], or [batch, heads, seq, head_dim] if heads_first.
struct Heads {
  int64_t batch, seq, heads, dim;
  int64_t stride_b, stride_s, stride_h;
};

// What does not depend on x: the table and the positions, all checked against each other. It owns
// the copies that args() makes and points to, so it must outlive the kernel.
struct RopeTable {
  Tensor sin, cos;
  std::optional<Tensor> positions;
  int64_t rotary_dim;
  bool half;

  RopeArgs args(const Heads& g) & {
    RopeArgs a{};
    const int64_t dim = sin.dim(), rows = sin.size(dim - 2), width = sin.size(dim - 1);
    LMFUSE_CHECK(
        sin.is_cpu() && same_sizes(sin, cos) && same_type(sin, cos) && (dim == 2 || dim == 3),
        "sin and cos must be CPU tensors of one shape and dtype, [rows, width] or "
        "[batch, seq, width]");
    LMFUSE_CHECK(
        rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= g.dim && 2 * width >= rotary_dim,
        "rotary_dim ", rotary_dim, " must be even, at most head_dim ", g.dim,
        " and at most twice the width ", width, " of sin and cos");
    if (sin.stride(dim - 1) != 1 && width > 1) sin = torch::stable::contiguous(sin);
    if (cos.stride(dim - 1) != 1 && width > 1) cos = torch::stable::contiguous(cos);
    a.sin = sin.const_data_ptr();
    a.cos = cos.const_data_ptr();
    a.table_dtype = dtype(sin, "sin");
    a.sin_stride_s = sin.stride(dim - 2);
    a.cos_stride_s = cos.stride(dim - 2);
    if (dim == 3) {
      LMFUSE_CHECK(!positions, "position_ids need a table of two dimensions");
      LMFUSE_CHECK((sin.size(0) == 1 || sin.size(0) == g.batch) && rows == g.seq,
                   "sin and cos must have a row for each token");
      a.sin_stride_b = sin.size(0) == 1 ? 0 : sin.stride(0);
      a.cos_stride_b = sin.size(0) == 1 ? 0 : cos.stride(0);
    } else {
      place(a, g, rows);
    }
    a.seq_len = g.seq;
    a.heads = g.heads;
    a.head_dim = g.dim;
    a.rotary_dim = rotary_dim;
    a.half = half;
    return a;
  }

  // Every position is looked at before the first row is touched.
  void place(RopeArgs& a, const Heads& g, int64_t rows) {
    if (!positions) {
      LMFUSE_CHECK_VALUE(g.seq <= rows, "sin and cos have ", rows, " rows, but there are ", g.seq,
                         " tokens");
      return;
    }
    const Tensor& p = *positions;
    LMFUSE_CHECK(p.is_cpu() && p.scalar_type() == ScalarType::Long,
                 "position_ids must be a CPU tensor of int64");
    a.positions = static_cast<const int64_t*>(p.const_data_ptr());
    if (p.numel() == 1) {
      const int64_t first = a.positions[0];
      LMFUSE_CHECK_VALUE(first >= 0 && first <= rows - g.seq, "position_ids start at ", first, ": ",
                         g.seq, " tokens from there do not fit into the ", rows,
                         " rows of sin and cos");
      a.pos_step = 1;
      return;
    }
    LMFUSE_CHECK(p.dim() == 2 && (p.size(0) == 1 || p.size(0) == g.batch) && p.size(1) == g.seq,
                 "position_ids must be [batch, seq], [1, seq] or a single element");
    a.pos_b = p.size(0) == 1 ? 0 : p.stride(0);
    a.pos_s = p.stride(1);
    for (int64_t b = 0; b < p.size(0); ++b)
      for (int64_t s = 0; s < g.seq; ++s) {
        const int64_t at = a.positions[b * a.pos_b + s * a.pos_s];
        LMFUSE_CHECK_VALUE(at >= 0 && at < rows, "position_ids[", b, ", ", s, "] is ", at,
                           ", but sin and cos have ", rows, " rows");
      }
  }
};

}  // namespace lmfuse
