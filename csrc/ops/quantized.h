// A quantized weight is a tensor of bytes: a header, which says what follows and is checked against
// the length at every use, the panels (kernels.h), and, where columns of a group do not lie
// together, their order.
#pragma once

#include <algorithm>
#include <cstring>

#include "common.h"

namespace lmfuse {

struct WoqHeader {
  static constexpr char kMagic[8] = {'l', 'm', 'f', 'u', 's', 'e', 'Q', '1'};  // Q, layout 1
  char magic[8];
  int64_t n, k;
  int64_t columns;  // of the panels: k, unless some groups are padded
  int64_t group;    // 0: a scale for each channel
  int32_t kind, zero, scale_type, ordered;
  char rest[8];  // zero
};
static_assert(sizeof(WoqHeader) == 64);

struct Quantized {
  WoqFormat format;
  int64_t k;
  const char* panels;
  const int32_t* order;
};

inline WoqFormat format_of(const WoqHeader& h) {
  return {static_cast<WoqKind>(h.kind),
          static_cast<WoqZero>(h.zero),
          static_cast<DType>(h.scale_type),
          h.n,
          h.columns,
          h.group ? h.group : h.columns};
}

inline bool sound(const WoqHeader& h) {
  constexpr int64_t kMostRows = int64_t{1} << 31, kMostColumns = int64_t{1} << 24;
  const auto in = [](int64_t x, int64_t first, int64_t last) { return x >= first && x <= last; };
  const bool integers = h.kind == static_cast<int32_t>(WoqKind::int8) ||
                        h.kind == static_cast<int32_t>(WoqKind::int4);
  return in(h.n, 1, kMostRows) && in(h.k, 1, kMostColumns) && in(h.columns, h.k, kMostColumns) &&
         in(h.kind, 0, static_cast<int32_t>(WoqKind::fp8)) &&
         in(h.zero, 0, integers ? static_cast<int32_t>(WoqZero::offset) : 0) &&
         in(h.scale_type, 0, static_cast<int32_t>(DType::f16)) && in(h.ordered, 0, 1) &&
         (h.ordered || h.columns == h.k) &&
         (h.group == 0 || (in(h.group, 32, kMostColumns) && !(h.group & (h.group - 1))));
}

inline int64_t quantized_bytes(const WoqHeader& h) {
  return static_cast<int64_t>(sizeof(h)) + panel_count(h.n) * format_of(h).panel_bytes() +
         (h.ordered ? h.columns * static_cast<int64_t>(sizeof(int32_t)) : 0);
}

inline WoqHeader read_header(const Tensor& t, const char* name) {
  LMFUSE_CHECK(
      t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Byte && t.is_contiguous(), name,
      " must be a quantized weight: a contiguous CPU tensor of bytes");
  WoqHeader h;
  LMFUSE_CHECK_VALUE(t.numel() >= static_cast<int64_t>(sizeof(h)), name,
                     " is not a weight that lmfuse quantized: it has ", t.numel(), " bytes");
  std::memcpy(&h, t.const_data_ptr(), sizeof(h));
  LMFUSE_CHECK_VALUE(std::memcmp(h.magic, WoqHeader::kMagic, sizeof(h.magic)) == 0, name,
                     " is not a weight that this version of lmfuse quantized: its header is "
                     "unknown");
  LMFUSE_CHECK_VALUE(sound(h), name, " has a damaged header: ", h.n, " by ", h.k, ", groups of ",
                     h.group, ", kind ", h.kind);
  LMFUSE_CHECK_VALUE(t.numel() == quantized_bytes(h), name, " has ", t.numel(),
                     " bytes, but its header (", h.n, " by ", h.k, ") asks for ",
                     quantized_bytes(h));
  return h;
}

// The only way to the bytes of a quantized weight. The order of its columns is checked where it is
// used: no entry of it reaches outside of a row.
inline Quantized open_quantized(const Tensor& t, const char* name) {
  const WoqHeader h = read_header(t, name);
  const char* panels = static_cast<const char*>(t.const_data_ptr()) + sizeof(h);
  const WoqFormat format = format_of(h);
  const char* order = panels + panel_count(h.n) * format.panel_bytes();
  return {format, h.k, panels, h.ordered ? reinterpret_cast<const int32_t*>(order) : nullptr};
}

// How to multiply, as Python says it.
struct WoqHow {
  WoqCompute compute;
  bool block_scales;
};

inline WoqHow checked_how(const Quantized& w, int64_t compute, bool block_scales) {
  LMFUSE_CHECK(compute >= 0 && compute <= static_cast<int64_t>(WoqCompute::int8),
               "compute is unknown: ", compute);
  const WoqHow how{static_cast<WoqCompute>(compute), block_scales};
  LMFUSE_CHECK_VALUE(how.compute != WoqCompute::int8 || w.format.kind == WoqKind::int8 ||
                         w.format.kind == WoqKind::int4,
                     "compute \"int8\" is for int8 and int4 weights: the values of nf4 and fp8 are "
                     "no multiples of a scale");
  return how;
}

// In which form the kernels of the active level read m rows of x, and what that takes.
struct WoqForm {
  WoqRowsArgs rows{};            // where they go: `place`
  int64_t bytes, scratch_bytes;  // of all rows, of a thread

  // weights: 2 for a product of gate and up.
  WoqForm(const Quantized& w, const WoqHow& how, int64_t m, int64_t weights) {
    const WoqFormat& f = w.format;
    const WoqPlan plan = kernels().woq_plan(f, how.compute, how.block_scales, m, weights);
    const int64_t width = f.packed_k();
    element_ = plan.compute == WoqCompute::f32 ? 4 : plan.compute == WoqCompute::bf16 ? 2 : 1;
    rows.format = f;
    rows.compute = plan.compute;
    rows.round = how.compute == WoqCompute::bf16 && plan.compute != how.compute;
    rows.block_scales = how.block_scales;
    rows.block = plan.block;
    rows.order = w.order;
    rows.k = w.k;
    // Rows a multiple of 1 KB apart would crowd into few sets of the first-level cache.
    rows.lda = m > 1 ? width + 64 / element_ : width;
    m_ = m;
    row_bytes_ = lines(m * rows.lda * element_);
    sum_bytes_ = lines(m * woq_blocks(f, plan.block) * 4);
    bytes = row_bytes_ + 2 * sum_bytes_;
    if (plan.compute == WoqCompute::int8)
      bytes += m * kWoqOutliers * static_cast<int64_t>(sizeof(WoqOutlier));
    scratch_bytes = std::max(w.k + width, plan.scratch) * 4;
  }

  // To `to`, which has room for `bytes`.
  void place(char* to) {
    rows.rows = to;
    rows.sums = reinterpret_cast<float*>(to + row_bytes_);
    rows.scales = rows.sums + sum_bytes_ / 4;
    rows.outliers = reinterpret_cast<WoqOutlier*>(rows.scales + sum_bytes_ / 4);
  }

  // The same rows serve both.
  bool serves(const WoqForm& other) const {
    const WoqRowsArgs &a = rows, &b = other.rows;
    return a.format.kind == b.format.kind && a.format.group == b.format.group &&
           a.format.k == b.format.k && a.k == b.k && a.compute == b.compute && a.round == b.round &&
           a.block_scales == b.block_scales && a.block == b.block && a.order == b.order;
  }

  // Row r becomes row `at` of `from`, which serves as well.
  void take(int64_t r, const WoqForm& from, int64_t at) const {
    const WoqRowsArgs &to = rows, &a = from.rows;
    std::memcpy(static_cast<char*>(to.rows) + r * to.lda * element_,
                static_cast<const char*>(a.rows) + at * a.lda * element_,
                to.format.packed_k() * element_);
    if (to.compute == WoqCompute::f32) return;
    const int64_t blocks = woq_blocks(to.format, to.block);
    const auto copy = [&](float* sums, const float* theirs, int64_t count) {
      for (int64_t b = 0; b < count; ++b) sums[b * m_ + r] = theirs[b * from.m_ + at];
    };
    copy(to.sums, a.sums, blocks);
    if (to.compute != WoqCompute::int8) return;
    copy(to.scales, a.scales, to.block_scales ? blocks : 1);
    std::copy_n(a.outliers + at * kWoqOutliers, kWoqOutliers, to.outliers + r * kWoqOutliers);
  }

  // What a product over these rows, once they are ready, is told of them.
  void tell(WoqArgs& a) const {
    a.x = rows.rows;
    a.lda = rows.lda;
    a.sums = rows.sums;
    a.scales = rows.scales;
    a.outliers = rows.outliers;
    a.compute = rows.compute;
    a.block_scales = rows.block_scales;
    a.block = rows.block;
  }

 private:
  static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  int64_t m_, element_, row_bytes_, sum_bytes_;
};

}  // namespace lmfuse
