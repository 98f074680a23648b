// out = post(x W^T + bias) over quantized weights. Few rows: the codes are multiplied as they are
// read, at the speed of memory. Many rows: a stretch of a panel is decoded once for all of them; the
// tiles of gemm_tile.h and woq_*.h multiply it.
//
// The sum of each block is a chain of its own (of fp32: one through all blocks); blocks are scaled
// and added in their order. Neither depends on the number of rows, so a row's bits do not.
#include "gemm_finish.h"
#include "woq_amx.h"
#include "woq_bf16.h"
#include "woq_int8.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// How a level computes: a family of tiles, made for tiles of so many rows.
//
//   kRows      of the largest tile
//   kColumns   of a stretch: what is decoded at once (kBlock: block by block)
//   kBytes     of a decoded code
//   decodes(f, shared)    whether it decodes; shared: several tiles meet a stretch
//   decode(f, block, to)
//   run(s)     adds a stretch to the sums of one tile
constexpr int64_t kBlock = 0;
constexpr int64_t kStretch = 8192;  // as bf16, half of a second-level cache of 1 MB

// Nothing is read ahead of a block that is in the first-level cache.
LMFUSE_INLINE Ahead nothing_ahead(const char* b) { return Ahead::of_next(b, 0, 0, kWhole); }

class F32 {
 public:
  static constexpr int kRows = FmaTile<float>::kRows;
  static constexpr int64_t kColumns = kBlock, kBytes = 4;
  static bool decodes(const WoqFormat&, bool) { return true; }
  static void decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    decode_f32(f, block, reinterpret_cast<float*>(to));
  }

  F32(int64_t rows, const WoqFormat&) : tile_(rows) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const Stretch& s) {
    const WoqArgs& a = s.args;
    const WoqPlace& at = *s.from;
    tile_.run(static_cast<const float*>(a.x) + s.row * a.lda + at.k0, a.lda, s.codes, at.k, s.sum,
              at.index > 0, nothing_ahead(s.codes));
  }

 private:
  FmaTile<float> tile_;
};

class Int8 {
 public:
  static constexpr int kRows = kInt8Rows;
  static constexpr int64_t kColumns = kStretch, kBytes = 1;
  static bool decodes(const WoqFormat& f, bool shared) { return f.nibbles() && shared; }
  static void decode(const WoqFormat&, const WoqBlock& block, char* to) {
    decode_nibbles(block.codes, block.k, to);
  }

  Int8(int64_t rows, const WoqFormat& f) : rows_(rows), nibbles_(f.nibbles()) {}
  TileRows rows() const { return {rows_, rows_, 0}; }
  void run(const Stretch& s) {
    with_count<kRows>(rows_, [&](auto r) LMFUSE_LAMBDA {
      constexpr int kTile = decltype(r)::value;
      if (s.alone) return nibbles_ ? int8_blocks<kTile, Nibbles, true>(s)
                                  : int8_blocks<kTile, SignedBytes, true>(s);
      return nibbles_ ? int8_blocks<kTile, NibbleBytes, false>(s)
                      : int8_blocks<kTile, SignedBytes, false>(s);
    });
  }

 private:
  int64_t rows_;
  bool nibbles_;
};

#if defined(LMFUSE_TILES)

// The block of a stretch, scaled and added, where a tile has left it in memory.
template <class Acc, class Scale>
LMFUSE_INLINE void add_tile(const Stretch& s, const TileRows& rows, float shift, const Acc* acc,
                            Scale x_scale) {
  const WoqFormat& f = s.args.format;
  const int64_t blocks = woq_blocks(f), index = (*s.from).index;
  const WoqScales w = load_scales(f, WoqBlock(*s.from, s.panel), shift);
  with_flag(f.zero == WoqZero::none && shift == 0.0f, [&](auto plain) {
    for (int64_t t = 0; t < rows.count; ++t) {
      const int64_t at = rows.at(t) * kPanel, row = s.row + t;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Acc* from = acc + at + v * kLanes;
        Vec z;
        if constexpr (__is_same(Acc, float)) {
          z = load(from);
        } else {
          z = number(load_words(from));
        }
        float* sum = s.sum + at + v * kLanes;
        store(sum, add_scaled<decltype(plain)::value>(
                       w, v, z, s.args.sums[row * blocks + index], x_scale(row), load(sum)));
      }
    }
  });
}

class AmxInt8 {
 public:
  static constexpr int kRows = AmxInt8Tile::kRows;
  static constexpr int64_t kColumns = kBlock, kBytes = 1;
  static bool decodes(const WoqFormat& f, bool) { return f.nibbles(); }
  static void decode(const WoqFormat&, const WoqBlock& block, char* to) {
    decode_nibbles(block.codes, block.k, to);
  }

  AmxInt8(int64_t rows, const WoqFormat& f) : tile_(rows, f.step()) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const Stretch& s) {
    const WoqArgs& a = s.args;
    const WoqBlock block(*s.from, s.panel);
    alignas(64) int32_t acc[kRows * kPanel];
    tile_.run(static_cast<const int8_t*>(a.x) + s.row * a.lda + block.k0, a.lda,
              s.codes ? s.codes : block.codes, block.k, acc, s.first && !s.codes);
    const int64_t blocks = a.block_scales ? woq_blocks(a.format) : 1;
    const float* scales = a.scales + (a.block_scales ? (*s.from).index : 0);
    add_tile(s, tile_.rows(), middle(a.format), acc,
             [&](int64_t row) LMFUSE_LAMBDA { return scales[row * blocks]; });
  }

 private:
  AmxInt8Tile tile_;
};
using ManyInt8 = AmxInt8;

class AmxBf16 {
 public:
  static constexpr int kRows = AmxTile::kRows;
  static constexpr int64_t kColumns = kBlock, kBytes = 2;
  static bool decodes(const WoqFormat&, bool) { return true; }
  static void decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    with_bf16_decoder(f, [&](const auto& decoder)
                             LMFUSE_LAMBDA { decode_bf16(decoder, block.codes, block.k, to); });
  }

  AmxBf16(int64_t rows, const WoqFormat&) : tile_(rows) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const Stretch& s) {
    alignas(64) float acc[kRows * kPanel];
    const WoqPlace& at = *s.from;
    const bf16_t* x = static_cast<const bf16_t*>(s.args.x) + s.row * s.args.lda + at.k0;
    tile_.run(x, s.args.lda, s.codes, at.k, acc, false, nothing_ahead(s.codes));
    add_tile(s, tile_.rows(), 0.0f, acc, [](int64_t) LMFUSE_LAMBDA { return 1.0f; });
  }

 private:
  AmxTile tile_;
};

class AmxFewBf16 {
 public:
  static constexpr int kRows = AmxFewTile::kRows;
  static constexpr int64_t kColumns = kBlock, kBytes = 0;
  static bool decodes(const WoqFormat&, bool) { return false; }
  static void decode(const WoqFormat&, const WoqBlock&, char*) {}

  AmxFewBf16(int64_t rows, const WoqFormat&) : tile_(rows) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const Stretch& s) {
    alignas(64) float acc[kRows * kPanel];
    const WoqBlock block(*s.from, s.panel);
    const bf16_t* x = static_cast<const bf16_t*>(s.args.x) + s.row * s.args.lda + block.k0;
    with_bf16_decoder(s.args.format, [&](const auto& decoder) LMFUSE_LAMBDA {
      tile_.run(x, s.args.lda, block.codes, block.k, acc, decoder);
    });
    add_tile(s, tile_.rows(), 0.0f, acc, [](int64_t) LMFUSE_LAMBDA { return 1.0f; });
  }

 private:
  AmxFewTile tile_;
};
using FewBf16 = AmxFewBf16;
using ManyBf16 = AmxBf16;

#else

using ManyInt8 = Int8;

#if defined(__AVX512BF16__)

class FewBf16 {
 public:
  static constexpr int kRows = kFewBf16Rows;
  static constexpr int64_t kColumns = kStretch, kBytes = 0;
  static bool decodes(const WoqFormat&, bool) { return false; }
  static void decode(const WoqFormat&, const WoqBlock&, char*) {}

  FewBf16(int64_t rows, const WoqFormat&) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }
  void run(const Stretch& s) {
    with_bf16_decoder(s.args.format, [&](const auto& decoder) LMFUSE_LAMBDA {
      with_count<kRows>(rows_, [&](auto r) LMFUSE_LAMBDA {
        few_bf16_rows<decltype(r)::value>(s, decoder);
      });
    });
  }

 private:
  int64_t rows_;
};

class ManyBf16 {
 public:
  static constexpr int kRows = kManyBf16Rows;
  static constexpr int64_t kColumns = kStretch, kBytes = 2;
  static bool decodes(const WoqFormat&, bool) { return true; }
  static void decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    with_bf16_decoder(f, [&](const auto& decoder)
                             LMFUSE_LAMBDA { decode_bf16(decoder, block.codes, block.k, to); });
  }

  ManyBf16(int64_t rows, const WoqFormat&) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }
  void run(const Stretch& s) {
    with_count<kRows>(rows_, [&](auto r) LMFUSE_LAMBDA { many_bf16_rows<decltype(r)::value>(s); });
  }

 private:
  int64_t rows_;
};

#endif

#endif

// What a thread needs in memory, in floats: the sums of the tiles of some panels, for each weight, and
// a decoded stretch.
template <class Family>
struct Workspace {
  int64_t panels, sums, decoded;

  Workspace(const WoqFormat& f, int64_t tiles)
      : panels(Family::kColumns == kBlock && tiles > 1 ? 8 : 1),
        sums(tiles * Family::kRows * kPanel * panels),
        decoded(Family::decodes(f, tiles > 1) ? columns(f) * kPanel * Family::kBytes / 4 : 0) {}

 private:
  static int64_t columns(const WoqFormat& f) {
    if (Family::kColumns == kBlock) return woq_block(f);
    return f.packed_k() < Family::kColumns ? f.packed_k() : Family::kColumns;
  }
};

template <class Family>
void decode(const WoqFormat& f, WoqBlocks at, int64_t end, const char* panel, char* to) {
  for (; (*at).k0 < end; ++at) {
    const WoqBlock block(*at, panel);
    Family::decode(f, block, to);
    to += block.k * kPanel * Family::kBytes;
  }
}

template <class Family>
void panels(const WoqArgs& a, const RowTiles& rows, int64_t first, int64_t last) {
  constexpr int64_t kTile = Family::kRows * kPanel;
  const WoqFormat& f = a.format;
  const char* data[2] = {static_cast<const char*>(a.weight), static_cast<const char*>(a.weight2)};
  const int64_t weights = a.weight2 ? 2 : 1, bytes = f.panel_bytes(), width = f.packed_k();
  const Workspace<Family> space(f, rows.count);
  const auto sum = [&](int64_t w, int64_t i, int64_t t) {
    return a.scratch + w * space.sums + (i * rows.count + t) * kTile;
  };
  char* decoded = space.decoded ? reinterpret_cast<char*>(sum(weights, 0, 0)) : nullptr;
  Family tile(rows.height, f);
  for (; first < last; first += space.panels) {
    const int64_t count = last - first < space.panels ? last - first : space.panels;
    __builtin_memset(a.scratch, 0, weights * space.sums * sizeof(float));
    for (WoqBlocks from(f); from;) {
      const int64_t k0 = (*from).k0, rest = width - k0;
      const int64_t columns = Family::kColumns < rest ? Family::kColumns : rest;
      const int64_t end = Family::kColumns == kBlock ? k0 + 1 : k0 + columns;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t w = 0; w < weights; ++w) {
          const char* panel = data[w] + (first + i) * bytes;
          const char* next = w + 1 < weights ? data[w + 1] + (first + i) * bytes
                                             : data[0] + (first + i + 1) * bytes;
          if (decoded) decode<Family>(f, from, end, panel, decoded);
          for (int64_t t = 0; t < rows.count; ++t)
            tile.run({a, rows.first(t), from, end, panel, decoded, sum(w, i, t),
                      Ahead::spread(next, bytes, t, rows.count, columns * Family::kBytes / 4),
                      rows.count == 1, t == 0});
        }
      if (end == width) break;
      while (from && (*from).k0 < end) ++from;
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < rows.count; ++t)
        finish(a, {tile.rows(), 0, tile.rows().count, rows.first(t), first + i}, sum(0, i, t),
               sum(weights - 1, i, t));
  }
}

template <class Family>
void woq_with(const WoqArgs& a, int64_t begin, int64_t end) {
  const int64_t all = panel_count(a.n);
  while (begin < end) {
    const int64_t row0 = begin / all * kRowBlock, first = begin % all;
    const int64_t left = a.m - row0, rest = all - first;
    const RowTiles rows(row0, left < kRowBlock ? left : kRowBlock, Family::kRows);
    const int64_t count = end - begin < rest ? end - begin : rest;
    panels<Family>(a, rows, first, first + count);
    begin += count;
  }
}

template <class Family>
int64_t scratch(const WoqFormat& f, int64_t m, int64_t weights) {
  const RowTiles rows(0, m < kRowBlock ? m : kRowBlock, Family::kRows);
  const Workspace<Family> space(f, rows.count);
  return weights * space.sums + space.decoded;
}

// Calls use with the family that computes m rows; a row's bits are those of any other.
template <class T>
struct Of {
  using Family = T;
};
template <class F>
LMFUSE_INLINE void with_family(WoqCompute compute, int64_t m, F use) {
  switch (compute) {
    case WoqCompute::bf16:
#if defined(__AVX512BF16__)
      if (m <= FewBf16::kRows) return use(Of<FewBf16>{});
      return use(Of<ManyBf16>{});
#endif
    case WoqCompute::f32:
      return use(Of<F32>{});
    case WoqCompute::int8:
      if (m <= Int8::kRows) return use(Of<Int8>{});
      return use(Of<ManyInt8>{});
  }
}

}  // namespace

WoqPlan woq_plan(const WoqFormat& f, WoqCompute compute, int64_t m, int64_t weights) {
#if !defined(__AVX512BF16__)
  if (compute == WoqCompute::bf16) compute = WoqCompute::f32;
#endif
  WoqPlan plan{compute, 0};
  with_family(compute, m, [&](auto of) {
    plan.scratch = scratch<typename decltype(of)::Family>(f, m, weights);
  });
  return plan;
}

void woq(const WoqArgs& a, int64_t begin, int64_t end) {
  with_family(a.compute, a.m, [&](auto of) {
    woq_with<typename decltype(of)::Family>(a, begin, end);
  });
}

}  // namespace lmfuse::LMFUSE_ISA
