// out = post(x W^T + bias) over quantized weights. Few rows: the codes are multiplied as they are
// read, at the speed of memory. Many rows: a panel is decoded once for all of them; the tiles of
// gemm_tile.h and woq_*.h multiply it.
//
// The sum of each block is a chain of its own (of fp32: one through all blocks); blocks are scaled
// and added in their order. Neither depends on the number of rows, so a row's bits do not.
#include "gemm_finish.h"
#include "woq_amx.h"
#include "woq_bf16.h"
#include "woq_int8.h"
#include "woq_outliers.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// How a level computes: a family of tiles, made for tiles of so many rows.
//
//   kRows      of the largest tile
//   kBlocks    whether it takes a block at a time, or a whole panel
//   kBytes     of a decoded code
//   decodes(f, shared)    whether it decodes; shared: several tiles meet a panel
//   decode(f, block, to)
//   run(s)     adds a block, or a panel, to the sums of one tile
constexpr int64_t kMostDecoded = 1 << 16;  // columns: a panel of bf16 takes 4 MB

// Nothing is read ahead of a block that is in the first-level cache.
LMFUSE_INLINE Ahead nothing_ahead(const char* b) { return Ahead::of_next(b, 0, 0, kWhole); }

class F32 {
 public:
  static constexpr int kRows = FmaTile<float>::kRows;
  static constexpr bool kBlocks = true;
  static constexpr int64_t kBytes = 4;
  static bool decodes(const WoqFormat&, bool) { return true; }
  static void decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    decode_f32(f, block, reinterpret_cast<float*>(to));
  }

  F32(int64_t rows, const WoqFormat&) : tile_(rows) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const WoqStep& s) {
    const WoqArgs& a = s.args;
    const WoqPlace& at = *s.at;
    tile_.run(static_cast<const float*>(a.x) + s.row * a.lda + at.k0, a.lda, s.codes, at.k, s.sum,
              at.index > 0, nothing_ahead(s.codes));
  }

 private:
  FmaTile<float> tile_;
};

template <int kTileRows>
class Int8 {
 public:
  static constexpr int kRows = kTileRows;
  static constexpr bool kBlocks = false;
  static constexpr int64_t kBytes = 1;
  static bool decodes(const WoqFormat& f, bool shared) {
    return f.nibbles() && shared && f.k <= kMostDecoded;
  }
  static void decode(const WoqFormat&, const WoqBlock& block, char* to) {
    decode_nibbles(block.codes, block.k, to);
  }

  Int8(int64_t rows, const WoqFormat& f) : rows_(rows), nibbles_(f.nibbles()) {}
  TileRows rows() const { return {rows_, rows_, 0}; }
  void run(const WoqStep& s) {
    with_count<kRows>(rows_, [&](auto r) LMFUSE_LAMBDA {
      constexpr int kTile = decltype(r)::value;
      if (nibbles_ && s.codes) return int8_panel<kTile, NibbleBytes, false>(s);
      if (nibbles_) return int8_panel<kTile, Nibbles, true>(s);
      if (s.alone) return int8_panel<kTile, SignedBytes, true>(s);
      return int8_panel<kTile, SignedBytes, false>(s);
    });
  }

 private:
  int64_t rows_;
  bool nibbles_;
};

using FewInt8 = Int8<kInt8Rows>;

#if defined(LMFUSE_TILES)

// The block of a stretch, scaled and added, where a tile has left it in memory.
template <class Acc, class Scale>
LMFUSE_INLINE void add_tile(const WoqStep& s, const TileRows& rows, float shift, const Acc* acc,
                            Scale x_scale) {
  const WoqFormat& f = s.args.format;
  const float* x_sums = s.x_sums((*s.at).index);
  const WoqScales w = load_scales(f, WoqBlock(*s.at, s.panel), shift);
  with_flag(f.zero == WoqZero::none && shift == 0.0f, [&](auto plain) {
    for (int64_t t = 0; t < rows.count; ++t) {
      const int64_t at = rows.at(t) * kPanel;
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
        store(sum, add_scaled<decltype(plain)::value>(w, v, z, x_sums[t], x_scale(t), load(sum)));
      }
    }
  });
}

class AmxInt8 {
 public:
  static constexpr int kRows = AmxInt8Tile::kRows;
  static constexpr bool kBlocks = true;
  static constexpr int64_t kBytes = 1;
  static bool decodes(const WoqFormat& f, bool) { return f.nibbles(); }
  static void decode(const WoqFormat&, const WoqBlock& block, char* to) {
    decode_nibbles(block.codes, block.k, to);
  }

  AmxInt8(int64_t rows, const WoqFormat& f) : tile_(rows, f.step()) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const WoqStep& s) {
    const WoqArgs& a = s.args;
    const WoqBlock block(*s.at, s.panel);
    alignas(64) int32_t acc[kRows * kPanel];
    tile_.run(static_cast<const int8_t*>(a.x) + s.row * a.lda + block.k0, a.lda,
              s.codes ? s.codes : block.codes, block.k, acc, s.first && !s.codes);
    const float* x_scales = a.scales + (*s.at).index * a.m + s.row;
    add_tile(s, tile_.rows(), middle(a.format), acc,
             [&](int64_t t) LMFUSE_LAMBDA { return a.block_scales ? x_scales[t] : 1.0f; });
  }

 private:
  AmxInt8Tile tile_;
};
using ManyInt8 = AmxInt8;

class AmxBf16 {
 public:
  static constexpr int kRows = AmxTile::kRows;
  static constexpr bool kBlocks = true;
  static constexpr int64_t kBytes = 2;
  static bool decodes(const WoqFormat&, bool) { return true; }
  static void decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    with_bf16_decoder(f, [&](const auto& decoder)
                             LMFUSE_LAMBDA { decode_bf16(decoder, block.codes, block.k, to); });
  }

  AmxBf16(int64_t rows, const WoqFormat&) : tile_(rows) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const WoqStep& s) {
    alignas(64) float acc[kRows * kPanel];
    const WoqPlace& at = *s.at;
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
  static constexpr bool kBlocks = true;
  static constexpr int64_t kBytes = 0;
  static bool decodes(const WoqFormat&, bool) { return false; }
  static void decode(const WoqFormat&, const WoqBlock&, char*) {}

  AmxFewBf16(int64_t rows, const WoqFormat&) : tile_(rows) {}
  TileRows rows() const { return tile_.rows(); }
  void run(const WoqStep& s) {
    alignas(64) float acc[kRows * kPanel];
    const WoqBlock block(*s.at, s.panel);
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
constexpr int64_t kFewBf16 = AmxFewBf16::kRows;

// A block in the first-level cache serves all tiles, and leaves it only once.
constexpr bool kWholeGroups = false;

#else

using ManyInt8 = Int8<kManyInt8Rows>;

// Integers of a row with one scale add up for as long as those of the weight have one, too: then
// the sums before need no registers, and tiles can be as high as those of few rows.
constexpr bool kWholeGroups = true;

#if defined(__AVX512BF16__)

// Up to how many rows decoding for each tile is faster than decoding once (16 rows: by a fifth).
constexpr int64_t kFewBf16 = 32;

class FewBf16 {
 public:
  static constexpr int kRows = kFewBf16Rows;
  static constexpr bool kBlocks = false;
  static constexpr int64_t kBytes = 0;
  static bool decodes(const WoqFormat&, bool) { return false; }
  static void decode(const WoqFormat&, const WoqBlock&, char*) {}

  FewBf16(int64_t rows, const WoqFormat&) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }
  void run(const WoqStep& s) {
    with_bf16_decoder(s.args.format, [&](const auto& decoder) LMFUSE_LAMBDA {
      with_count<kRows>(
          rows_, [&](auto r) LMFUSE_LAMBDA { few_bf16_rows<decltype(r)::value>(s, decoder); });
    });
  }

 private:
  int64_t rows_;
};

class ManyBf16 {
 public:
  static constexpr int kRows = kManyBf16Rows;
  static constexpr bool kBlocks = false;
  static constexpr int64_t kBytes = 2;
  static bool decodes(const WoqFormat&, bool) { return true; }
  static void decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    with_bf16_decoder(f, [&](const auto& decoder)
                             LMFUSE_LAMBDA { decode_bf16(decoder, block.codes, block.k, to); });
  }

  ManyBf16(int64_t rows, const WoqFormat&) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }
  void run(const WoqStep& s) {
    with_count<kRows>(rows_, [&](auto r) LMFUSE_LAMBDA { many_bf16_rows<decltype(r)::value>(s); });
  }

 private:
  int64_t rows_;
};

#endif

#endif

// How many panels are taken together, and what a thread needs for them in memory, in floats: sums,
// of each weight, and what several tiles share: scales, and decoded panels or a block of one.
template <class Family>
struct Workspace {
  static constexpr int64_t kTile = Family::kRows * kPanel;
  int64_t weights, panels, sums, columns, decoded, scales, shared;

  Workspace(const WoqFormat& f, int64_t block, int64_t tiles, int64_t weight_count)
      : weights(weight_count),
        panels(1),
        sums(kTile),
        columns(Family::kBlocks ? block : f.packed_k()),
        decoded(Family::decodes(f, tiles > 1) ? columns * kPanel * Family::kBytes / 4 : 0),
        scales(!Family::kBlocks && (decoded || tiles > 1) ? f.groups() * wide_scales(f) : 0),
        shared(scales + decoded) {
    constexpr int64_t kMost = 8, kCached = 256 << 10;  // of a second-level cache of 1 MB
    const int64_t bytes = columns * kPanel * (Family::kBytes ? Family::kBytes : 1) * weights;
    if (tiles > 1) panels = Family::kBlocks ? kMost : kCached / bytes;
    if (panels > kMost) panels = kMost;
    if (panels < 1) panels = 1;
    if (Family::kBlocks) {
      sums *= tiles * panels;
    } else {
      shared *= panels * weights;
    }
  }
  int64_t floats() const { return weights * sums + shared; }
};

// Panels as they lie in memory.
struct Weights {
  const char* data[2];
  int64_t count, bytes;  // how many; bytes of a panel

  explicit Weights(const WoqArgs& a)
      : data{static_cast<const char*>(a.weight), static_cast<const char*>(a.weight2)},
        count(a.weight2 ? 2 : 1),
        bytes(a.format.panel_bytes()) {}
  const char* at(int64_t weight, int64_t p) const { return data[weight] + p * bytes; }
};

template <class Family>
void decode_panel(const WoqFormat& f, WoqBlocks at, const char* panel, char* to) {
  for (; at; ++at) {
    const WoqBlock block(*at, panel);
    Family::decode(f, block, to);
    to += block.k * kPanel * Family::kBytes;
  }
}

// The sums of a tile, complete but for the scales and the outliers of its rows; sum2: of the second
// weight.
LMFUSE_INLINE void finish_panel(const WoqArgs& a, const TileRows& rows, int64_t first,
                                const Weights& weights, int64_t p, float* sum, float* sum2) {
  if (a.compute == WoqCompute::int8) {
    finish_int8(a, rows, first, weights.at(0, p), sum);
    if (a.weight2) finish_int8(a, rows, first, weights.at(1, p), sum2);
  }
  finish(a, {rows, 0, rows.count, first, p}, sum, sum2);
}

// The lines that a tile will write, so that its stores need not wait for them.
LMFUSE_INLINE void fetch_out(const WoqArgs& a, int64_t row, int64_t count, int64_t panel) {
  const int64_t size = a.out.dtype == DType::f32 ? 4 : 2;
  for (int64_t r = row; r < row + count; ++r) {
    const char* at =
        static_cast<const char*>(a.out.data) + (offset(a.out.rows, r) + panel * kPanel) * size;
    __builtin_prefetch(at, 1);
    if (size == 4) __builtin_prefetch(at + 64, 1);
  }
}

// Tiles of as equal heights as can be: 16 rows are 6, 5 and 5, none of them computed twice.
struct EvenTiles {
  int64_t row0, low, higher;  // rows of a tile, and how many tiles have one more

  explicit EvenTiles(const RowTiles& rows)
      : row0(rows.row0), low(rows.rows / rows.count), higher(rows.rows % rows.count) {}
  int64_t height(int64_t tile) const { return low + (tile < higher); }
  int64_t first(int64_t tile) const { return row0 + tile * low + (tile < higher ? tile : higher); }
};

// Each tile runs over whole panels: some of them, so that rows of x come from afar less often.
template <class Family>
void straight(const WoqArgs& a, const RowTiles& rows, int64_t first, int64_t last) {
  const Weights weights(a);
  const Workspace<Family> space(a.format, a.block, rows.count, weights.count);
  float* sums[2] = {a.scratch, a.scratch + (weights.count - 1) * space.sums};
  // Each tile fetches its share of the next panels, a line in so many of its steps.
  const int64_t share = weights.bytes / rows.count / 64 * 64;
  const int64_t steps = space.columns * kPanel * Family::kBytes / 128, lines = share / 64;
  const int64_t every = lines && steps > lines ? steps / lines : 1;
  const WoqBlocks at(a.format, a.block);
  const EvenTiles tiles(rows);
  for (; first < last; first += space.panels) {
    const int64_t end = last - first < space.panels ? last : first + space.panels;
    const auto shared = [&](int64_t w, int64_t p) {
      return a.scratch + weights.count * space.sums +
             ((p - first) * weights.count + w) * (space.scales + space.decoded);
    };
    const auto scales = [&](int64_t w, int64_t p) { return space.scales ? shared(w, p) : nullptr; };
    const auto codes = [&](int64_t w, int64_t p) {
      return space.decoded ? reinterpret_cast<char*>(shared(w, p) + space.scales) : nullptr;
    };
    for (int64_t p = first; space.scales && p < end; ++p)
      for (int64_t w = 0; w < weights.count; ++w) {
        widen_scales(a.format, weights.at(w, p), scales(w, p));
        if (space.decoded) decode_panel<Family>(a.format, at, weights.at(w, p), codes(w, p));
      }
    for (int64_t t = 0; t < rows.count; ++t) {
      const int64_t row = tiles.first(t), height = tiles.height(t);
      Family tile(height, a.format);
      for (int64_t p = first; p < end; ++p) {
        if (rows.count > 1) fetch_out(a, row, height, p);
        for (int64_t w = 0; w < weights.count; ++w) {
          __builtin_memset(sums[w], 0, height * kPanel * sizeof(float));
          const char* next = weights.at(w, p + space.panels);
          tile.run({a, row, at, weights.at(w, p), codes(w, p), scales(w, p), sums[w],
                    Ahead::spread(next + t * share, every), rows.count == 1, t == 0});
        }
        finish_panel(a, tile.rows(), row, weights, p, sums[0], sums[1]);
      }
    }
  }
}

// A block of a panel is decoded into the first-level cache for all tiles; the sums of some panels
// wait for the next.
template <class Family>
void blocked(const WoqArgs& a, const RowTiles& rows, int64_t first, int64_t last) {
  const Weights weights(a);
  const Workspace<Family> space(a.format, a.block, rows.count, weights.count);
  const auto sum = [&](int64_t w, int64_t i, int64_t t) {
    return a.scratch + w * space.sums + (i * rows.count + t) * space.kTile;
  };
  char* decoded = space.decoded ? reinterpret_cast<char*>(sum(weights.count, 0, 0)) : nullptr;
  Family tile(rows.height, a.format);
  for (; first < last; first += space.panels) {
    const int64_t count = last - first < space.panels ? last - first : space.panels;
    __builtin_memset(a.scratch, 0, weights.count * space.sums * sizeof(float));
    for (WoqBlocks at(a.format, a.block); at; ++at)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t w = 0; w < weights.count; ++w) {
          const char* panel = weights.at(w, first + i);
          if (decoded) Family::decode(a.format, WoqBlock(*at, panel), decoded);
          for (int64_t t = 0; t < rows.count; ++t)
            tile.run({a, rows.first(t), at, panel, decoded, nullptr, sum(w, i, t),
                      nothing_ahead(panel), rows.count == 1, t == 0});
        }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < rows.count; ++t)
        finish_panel(a, tile.rows(), rows.first(t), weights, first + i, sum(0, i, t),
                     sum(weights.count - 1, i, t));
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
    if constexpr (Family::kBlocks) {
      blocked<Family>(a, rows, first, first + count);
    } else {
      straight<Family>(a, rows, first, first + count);
    }
    begin += count;
  }
}

template <class Family>
int64_t scratch(const WoqFormat& f, int64_t block, int64_t m, int64_t weights) {
  const RowTiles rows(0, m < kRowBlock ? m : kRowBlock, Family::kRows);
  return Workspace<Family>(f, block, rows.count, weights).floats();
}

// Calls use with the family that computes m rows; a row's bits are those of any other.
template <class T>
struct Of {
  using Family = T;
};
template <class F>
LMFUSE_INLINE void with_family(const WoqFormat& f, WoqCompute compute, int64_t m, F use) {
  switch (compute) {
    case WoqCompute::bf16:
#if defined(__AVX512BF16__)
      if (m <= kFewBf16 || f.k > kMostDecoded) return use(Of<FewBf16>{});
      return use(Of<ManyBf16>{});
#endif
    case WoqCompute::f32:
      return use(Of<F32>{});
    case WoqCompute::int8:
      if (m <= FewInt8::kRows || (kWholeGroups && f.groups() == 1)) return use(Of<FewInt8>{});
      return use(Of<ManyInt8>{});
  }
}

}  // namespace

WoqPlan woq_plan(const WoqFormat& f, WoqCompute compute, bool block_scales, int64_t m,
                 int64_t weights) {
#if !defined(__AVX512BF16__)
  if (compute == WoqCompute::bf16) compute = WoqCompute::f32;
#endif
  WoqPlan plan{compute, woq_block(f), 0};
  if (kWholeGroups && compute == WoqCompute::int8 && !block_scales) plan.block = woq_whole_group(f);
  with_family(f, compute, m, [&](auto of) {
    plan.scratch = scratch<typename decltype(of)::Family>(f, plan.block, m, weights);
  });
  return plan;
}

void woq(const WoqArgs& a, int64_t begin, int64_t end) {
  with_family(a.format, a.compute, a.m,
              [&](auto of) { woq_with<typename decltype(of)::Family>(a, begin, end); });
}

}  // namespace lmfuse::LMFUSE_ISA
