// Panels of a quantized weight (layout in kernels.h), block by block: where the codes and the
// scales of each lie, and how its sums are scaled and added.
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
  LMFUSE_INLINE WoqBlocks(const WoqFormat& f, int64_t columns)
      : columns_(columns),
        group_(f.group),
        width_(f.packed_k()),
        scale_bytes_(f.scale_bytes()),
        code_bytes_(f.code_bytes(columns_)),
        at_{0, 0, columns_ < f.k ? columns_ : width_, 0, 0, scale_bytes_} {}

  LMFUSE_INLINE explicit operator bool() const { return at_.k0 < width_; }
  LMFUSE_INLINE const WoqPlace& operator*() const { return at_; }
  // Whether so many more are whole.
  LMFUSE_INLINE bool whole(int64_t count) const { return at_.k0 + count * columns_ <= width_; }
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

// shift: what the codes were raised by. kPlain: there is no zero and no offset to load.
template <bool kPlain = false>
LMFUSE_INLINE WoqScales load_scales(WoqZero kind, DType type, const char* scales, float shift) {
  WoqScales s;
  with_type(type, [&](auto t) LMFUSE_LAMBDA {
    const auto* from = reinterpret_cast<const decltype(t)*>(scales);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      s.scale[v] = load(from + v * kLanes);
      if constexpr (!kPlain) {
        s.zero[v] = broadcast(shift);
        s.offset[v] = broadcast(0.0f);
        if (kind == WoqZero::zero) s.zero[v] = load(from + kPanel + v * kLanes) + broadcast(shift);
        if (kind == WoqZero::offset) s.offset[v] = load(from + kPanel + v * kLanes);
      }
    }
  });
  return s;
}
LMFUSE_INLINE WoqScales load_scales(const WoqFormat& f, const WoqBlock& block, float shift) {
  return load_scales(f.zero, f.scale_type, block.scales, shift);
}

// The scales of a panel in fp32, as tiles that share a decoded panel read them: [groups] of 32, and
// of 32 zeros or offsets, if there are any.
constexpr int64_t wide_scales(const WoqFormat& f) {
  return kPanel * (f.zero == WoqZero::none ? 1 : 2);
}
inline void widen_scales(const WoqFormat& f, const char* panel, float* to) {
  const int64_t each = wide_scales(f), group_bytes = f.scale_bytes() + f.code_bytes(f.group);
  with_type(f.scale_type, [&](auto t) LMFUSE_LAMBDA {
    for (int64_t g = 0; g < f.groups(); ++g, panel += group_bytes, to += each)
      for (int64_t i = 0; i < each; i += kLanes)
        store(to + i, load(reinterpret_cast<const decltype(t)*>(panel) + i));
  });
}

constexpr float middle(const WoqFormat& f) {
  return f.kind == WoqKind::int4 && f.zero == WoqZero::none ? 8.0f : 0.0f;
}

// One tile of rows that meets one panel, or a block of it.
struct WoqStep {
  const WoqArgs& args;
  int64_t row;  // the first
  WoqBlocks at;
  const char* panel;
  const char* codes;    // decoded; null: as they lie in the panel
  const float* scales;  // in fp32, likewise
  float* sum;           // [rows of the tile][32], what is added to
  Ahead ahead;          // over what is read next
  bool alone, first;    // of the tiles that meet the panel: the only one, the first

  // Of the rows from the first on, in a block.
  LMFUSE_INLINE const float* x_sums(int64_t index) const {
    return args.sums + index * args.m + row;
  }
};

// sum + (z - zero x_sum) x_scale scale + offset x_sum x_scale: z is the sum of codes times x. Every
// kernel adds a block so, for the same bits.
template <bool kPlain>  // no zero, no offset
LMFUSE_INLINE Vec add_scaled(const WoqScales& w, int v, Vec z, float x_sum, float x_scale,
                             Vec sum) {
  if constexpr (!kPlain) z = fma(w.zero[v], broadcast(-x_sum), z);
  sum = fma(z * broadcast(x_scale), w.scale[v], sum);
  if constexpr (!kPlain) sum = fma(w.offset[v], broadcast(x_sum * x_scale), sum);
  return sum;
}

// The sums of R rows: in memory, or in registers while a tile runs over a panel or some blocks.
template <int R, bool kKept>
class WoqSums {
 public:
  LMFUSE_INLINE explicit WoqSums(float* to, bool = true) : to_(to) {}
  LMFUSE_INLINE Vec get(int r, int v) const { return load(to_ + r * kPanel + v * kLanes); }
  LMFUSE_INLINE void set(int r, int v, Vec sum) { store(to_ + r * kPanel + v * kLanes, sum); }
  // Else GCC 12 loads all sums first, and puts them on the stack.
  LMFUSE_INLINE void row_done() { asm volatile("" ::: "memory"); }
  LMFUSE_INLINE void done() {}

 private:
  float* to_;
};
template <int R>
class WoqSums<R, true> {
 public:
  // begun: whether there are sums to go on from.
  LMFUSE_INLINE explicit WoqSums(float* to, bool begun = false) : to_(to) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sums_[r][v] = begun ? load(to_ + r * kPanel + v * kLanes) : broadcast(0.0f);
  }
  LMFUSE_INLINE Vec get(int r, int v) const { return sums_[r][v]; }
  LMFUSE_INLINE void set(int r, int v, Vec sum) { sums_[r][v] = sum; }
  LMFUSE_INLINE void row_done() {}
  LMFUSE_INLINE void done() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(to_ + r * kPanel + v * kLanes, sums_[r][v]);
  }

 private:
  float* to_;
  Vec sums_[R][kVecs];
};

// Adds a block to the sums of R rows. z(r, v): what the tile has; x_scale(r): of row r of the tile;
// kWide: the scales are those of s, in fp32.
template <int R, bool kWide, class Sums, class Z, class Scale>
LMFUSE_INLINE void add_block(const WoqStep& s, const WoqPlace& at, Sums& sums, Z z, Scale x_scale) {
  const WoqFormat& f = s.args.format;
  const float* x_sums = s.x_sums(at.index);
  with_flag(f.zero == WoqZero::none, [&](auto plain) LMFUSE_LAMBDA {
    constexpr bool kPlain = decltype(plain)::value;
    const char* scales =
        kWide ? reinterpret_cast<const char*>(s.scales + at.group * kPanel * (kPlain ? 1 : 2))
              : s.panel + at.scales;
    const WoqScales w =
        load_scales<kPlain>(f.zero, kWide ? DType::f32 : f.scale_type, scales, 0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sums.set(r, v, add_scaled<kPlain>(w, v, z(r, v), x_sums[r], x_scale(r), sums.get(r, v)));
      sums.row_done();
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
