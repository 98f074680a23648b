// Panels of a quantized weight (layout in kernels.h), block by block: where the codes and the scales
// of each lie, and how its sums are scaled and added.
#pragma once

#include "gemm_tile.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// Where in a panel a block lies: columns [k0, k0 + k), which share the scales.
struct WoqPlace {
  int64_t index, k0, k, group, scales, codes;
};

// The blocks of a format, one after the other: divisions take longer than small blocks.
class WoqBlocks {
 public:
  LMFUSE_INLINE explicit WoqBlocks(const WoqFormat& f)
      : columns_(woq_block(f)),
        group_(f.group),
        width_(f.packed_k()),
        scale_bytes_(f.scale_bytes()),
        code_bytes_(f.code_bytes(columns_)),
        at_{0, 0, columns_ < f.k ? columns_ : width_, 0, 0, scale_bytes_} {}

  LMFUSE_INLINE explicit operator bool() const { return at_.k0 < width_; }
  LMFUSE_INLINE const WoqPlace& operator*() const { return at_; }
  LMFUSE_INLINE void operator++() {
    ++at_.index;
    at_.k0 += columns_;
    at_.codes += code_bytes_;
    if (at_.k0 == (at_.group + 1) * group_) {
      ++at_.group;
      at_.scales = at_.codes;
      at_.codes += scale_bytes_;
    }
    if (width_ - at_.k0 < columns_) at_.k = width_ - at_.k0;
  }

 private:
  int64_t columns_, group_, width_, scale_bytes_, code_bytes_;
  WoqPlace at_;
};

// A block of one panel.
struct WoqBlock {
  int64_t k0, k;
  const char *scales, *codes;

  LMFUSE_INLINE WoqBlock(const WoqPlace& at, const char* panel)
      : k0(at.k0), k(at.k), scales(panel + at.scales), codes(panel + at.codes) {}
};

// value = (code - zero) * scale + offset
struct WoqScales {
  Vec scale[kVecs], zero[kVecs], offset[kVecs];
};

// shift: what the codes were raised by.
LMFUSE_INLINE WoqScales load_scales(const WoqFormat& f, const WoqBlock& block, float shift) {
  WoqScales s;
  with_type(f.scale_type, [&](auto t) LMFUSE_LAMBDA {
    const auto* from = reinterpret_cast<const decltype(t)*>(block.scales);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      s.scale[v] = load(from + v * kLanes);
      s.zero[v] = broadcast(shift);
      s.offset[v] = broadcast(0.0f);
      if (f.zero == WoqZero::zero) s.zero[v] = load(from + kPanel + v * kLanes) + broadcast(shift);
      if (f.zero == WoqZero::offset) s.offset[v] = load(from + kPanel + v * kLanes);
    }
  });
  return s;
}

// The next lines of the panel: strictly one after the other. Where decoding fills the time between
// two lines, AMX machines read 12 to 15 % faster 2 KB ahead than 8 (1 and 4 KB: 2 % slower).
LMFUSE_INLINE void fetch_ahead(const char* codes) {
#if defined(LMFUSE_TILES)
  constexpr int64_t kDistance = 2048;
#else
  constexpr int64_t kDistance = Ahead::kDistance;
#endif
  __builtin_prefetch(codes + kDistance);
  __builtin_prefetch(codes + kDistance + 64);
}

constexpr float middle(const WoqFormat& f) {
  return f.kind == WoqKind::int4 && f.zero == WoqZero::none ? 8.0f : 0.0f;
}

// Blocks of one panel for one tile of rows: those from `from` on that begin before column `end`.
struct Stretch {
  const WoqArgs& args;
  int64_t row;  // the first
  WoqBlocks from;
  int64_t end;
  const char* panel;
  const char* codes;  // decoded, one block after the other; null: as they lie in the panel
  float* sum;         // [rows of the tile][32], what is added to
  Ahead ahead;        // over the panel after it
  bool alone, first;  // of the tiles that meet it: the only one, the first
};

// sum + (z - zero x_sum) x_scale scale + offset x_sum x_scale: z is the sum of codes times x. Every
// kernel adds a block so, for the same bits.
template <bool kPlain>  // no zero, no offset
LMFUSE_INLINE Vec add_scaled(const WoqScales& w, int v, Vec z, float x_sum, float x_scale,
                             Vec sum) {
  if constexpr (!kPlain) z = fma(w.zero[v], broadcast(-x_sum), z);
  sum = fma(z * broadcast(x_scale), w.scale[v], sum);
  return kPlain ? sum : fma(w.offset[v], broadcast(x_sum * x_scale), sum);
}

// Adds block `index` to the sums of R rows. z(r, v): what the tile has; x_scale(r): of row r of the
// tile; shift: what is to be taken off all codes.
template <int R, class Z, class Scale>
LMFUSE_INLINE void add_block(const Stretch& s, const WoqBlock& block, int64_t index, float shift,
                             Z z, Scale x_scale) {
  const WoqFormat& f = s.args.format;
  const int64_t blocks = woq_blocks(f);
  const WoqScales w = load_scales(f, block, shift);
  const float* x_sums = s.args.sums + s.row * blocks + index;
  with_flag(f.zero == WoqZero::none && shift == 0.0f, [&](auto plain) LMFUSE_LAMBDA {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        float* sum = s.sum + r * kPanel + v * kLanes;
        store(sum, add_scaled<decltype(plain)::value>(w, v, z(r, v), x_sums[r * blocks],
                                                      x_scale(r), load(sum)));
      }
  });
}

// The rows of a tile, which the compiler can address by few registers.
template <int R>
class XRows {
 public:
  LMFUSE_INLINE XRows(const char* x, int64_t row_bytes) : row_bytes_(row_bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < kFirst; ++i) at_[i] = x + 3 * i * row_bytes;
  }
  // Four bytes of row r.
  LMFUSE_INLINE int four(int r, int64_t byte) const {
    int bits;
    __builtin_memcpy(&bits, at_[r / 3] + r % 3 * row_bytes_ + byte, sizeof(bits));
    return bits;
  }
  LMFUSE_INLINE void advance(int64_t bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < kFirst; ++i) at_[i] += bytes;
  }

 private:
  static constexpr int kFirst = (R + 2) / 3;
  const char* at_[kFirst];
  int64_t row_bytes_;
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
