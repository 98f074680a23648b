// out = post(x W^T + bias) over quantized weights. A block of a panel is decoded once for all rows
// that share it, into the first-level cache; the tiles of gemm_tile.h and woq_tile.h multiply it.
//
// The sum of each block is a chain of its own (of fp32: one through all blocks); blocks are scaled
// and added in their order. Neither depends on the number of rows, so a row's bits do not.
#include "gemm_finish.h"
#include "woq_outliers.h"
#include "woq_tile.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// One tile of rows and one block: where both come from, and go to.
struct Step {
  int64_t row;            // the first
  int64_t index, blocks;  // which of how many
  const WoqBlock& block;
  const char* codes;  // decoded
  float* sum;
  bool first_tile;
};

// sum += ((acc - (raised + zero) * x_sum) * scale + offset * x_sum) * x_scale, of one block. What
// the tile raised the weights by is taken off apart, and exactly, so that all tiles give the same.
template <class Acc, class Scale>
LMFUSE_INLINE void add_block(const WoqArgs& a, const TileRows& rows, const Step& s,
                             const WoqScales& w, bool zeros, float raised, const Acc* acc,
                             Scale x_scale) {
  const auto load_acc = [](const Acc* p) LMFUSE_LAMBDA {
    if constexpr (__is_same(Acc, float)) {
      return load(p);
    } else {
      return number(load_words(p));
    }
  };
  with_flag(zeros, [&](auto zero) {
    with_flag(a.format.zero == WoqZero::offset, [&](auto offset) {
      for (int64_t t = 0; t < rows.count; ++t) {
        const int64_t at = rows.at(t) * kPanel, row = s.row + t;
        const float x_sum = a.sums[row * s.blocks + s.index], x_factor = x_scale(row);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          float* sum = s.sum + at + v * kLanes;
          Vec z = load_acc(acc + at + v * kLanes);
          if constexpr (!__is_same(Acc, float)) z = z - broadcast(raised * x_sum);
          if constexpr (decltype(zero)::value) z = z - w.zero[v] * broadcast(x_sum);
          if constexpr (!__is_same(Acc, float)) z = z * broadcast(x_factor);
          z = fma(z, w.scale[v], load(sum));
          if constexpr (decltype(offset)::value)
            z = fma(w.offset[v], broadcast(x_sum * x_factor), z);
          store(sum, z);
        }
      }
    });
  });
}

// Nothing is read ahead of a block that is in the first-level cache.
LMFUSE_INLINE Ahead nothing_ahead(const char* b) { return Ahead::of_next(b, 0, 0, kWhole); }

struct F32 {
  using Tile = FmaTile<float>;
  static constexpr int64_t kBytes = 4;

  static Tile tile(int64_t rows, const WoqFormat&) { return Tile(rows); }

  static const char* decode(const WoqFormat& f, const WoqBlock& block, char* to, bool) {
    decode_f32(f, block, reinterpret_cast<float*>(to));
    return to;
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    const float* x = static_cast<const float*>(a.x) + s.row * a.lda + s.block.k0;
    tile.run(x, a.lda, s.codes, s.block.k, s.sum, s.index > 0, nothing_ahead(s.codes));
  }
};

#if defined(__AVX512BF16__)

LMFUSE_INLINE void add_bf16_block(const WoqArgs& a, const TileRows& rows, const Step& s,
                                  const float* acc) {
  const WoqScales w = load_scales(a.format, s.block, 0.0f);
  add_block(a, rows, s, w, a.format.zero == WoqZero::zero, 0.0f, acc,
            [](int64_t) LMFUSE_LAMBDA { return 1.0f; });
}

struct Bf16 {
#if defined(LMFUSE_TILES)
  using Tile = AmxTile;
#else
  using Tile = DotTile;
#endif
  static constexpr int64_t kBytes = 2;

  static Tile tile(int64_t rows, const WoqFormat&) { return Tile(rows); }
  static const char* decode(const WoqFormat& f, const WoqBlock& block, char* to, bool) {
    with_bf16_decoder(f, [&](const auto& decoder)
                             LMFUSE_LAMBDA { decode_bf16(decoder, block.codes, block.k, to); });
    return to;
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    alignas(64) float acc[Tile::kRows * kPanel];
    const bf16_t* x = static_cast<const bf16_t*>(a.x) + s.row * a.lda + s.block.k0;
    tile.run(x, a.lda, s.codes, s.block.k, acc, false, nothing_ahead(s.codes));
    add_bf16_block(a, tile.rows(), s, acc);
  }
};

#if defined(LMFUSE_TILES)

struct FewBf16 {
  using Tile = AmxFewTile;
  static constexpr int64_t kBytes = 0;

  static Tile tile(int64_t rows, const WoqFormat&) { return Tile(rows); }
  static const char* decode(const WoqFormat&, const WoqBlock& block, char*, bool) {
    return block.codes;
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    alignas(64) float acc[Tile::kRows * kPanel];
    const bf16_t* x = static_cast<const bf16_t*>(a.x) + s.row * a.lda + s.block.k0;
    with_bf16_decoder(a.format, [&](const auto& decoder) LMFUSE_LAMBDA {
      tile.run(x, a.lda, s.codes, s.block.k, acc, decoder);
    });
    add_bf16_block(a, tile.rows(), s, acc);
  }
};

#else
using FewBf16 = Bf16;
#endif

#endif

template <class T>
struct Int8 {
  using Tile = T;
  static constexpr int64_t kBytes = 1;

  static Tile tile(int64_t rows, const WoqFormat& f) { return Tile(rows, f.step()); }

  static const char* decode(const WoqFormat& f, const WoqBlock& block, char* to, bool shared) {
    return Tile::kPacked && !shared ? block.codes : decode_int8(f, block, to);
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    const bool nibbles = a.format.nibbles(), direct = s.codes == s.block.codes;
    const Int8Codes codes{s.codes, nibbles, nibbles && direct, direct && s.first_tile};
    alignas(64) int32_t acc[Tile::kRows * kPanel];
    const int8_t* x = static_cast<const int8_t*>(a.x) + s.row * a.lda + s.block.k0;
    tile.run(x, a.lda, codes, s.block.k, acc);
    const WoqScales w = load_scales(a.format, s.block, middle(a.format));
    const int64_t blocks = a.block_scales ? s.blocks : 1;
    const float* scales = a.scales + (a.block_scales ? s.index : 0);
    add_block(a, tile.rows(), s, w, a.format.zero == WoqZero::zero || middle(a.format) != 0.0f,
              Tile::raised(nibbles), acc,
              [=](int64_t row) LMFUSE_LAMBDA { return scales[row * blocks]; });
  }
};

// For few rows a level may have another tile that gives the same bits.
#if defined(LMFUSE_TILES)
using ManyInt8Tile = AmxInt8Tile;
#else
using ManyInt8Tile = Int8Tile;
#endif

constexpr int kFewInt8Rows = Int8Tile::kRows < 4 ? Int8Tile::kRows : 4;
constexpr int64_t kPanelGroup = 8;  // panels whose accumulators wait together

template <class Family>
void panels(const WoqArgs& a, const RowTiles& rows, int64_t first, int64_t last) {
  using Tile = typename Family::Tile;
  constexpr int64_t kTile = Tile::kRows * kPanel;
  const WoqFormat& f = a.format;
  const char* data[2] = {static_cast<const char*>(a.weight), static_cast<const char*>(a.weight2)};
  const int64_t weights = a.weight2 ? 2 : 1, blocks = woq_blocks(f), bytes = f.panel_bytes();
  const int64_t sums = kTile * rows.count * (last - first);
  __builtin_memset(a.scratch, 0, weights * sums * sizeof(float));
  const auto sum = [&](int64_t w, int64_t p, int64_t t) {
    return a.scratch + w * sums + ((p - first) * rows.count + t) * kTile;
  };
  // A group that is shorter than a step of the tiles is padded to one.
  alignas(64) char decoded[kWoqBlock * kPanel * Family::kBytes + 64];
  Tile tile = Family::tile(rows.height, f);
  for (WoqBlocks at(f); at; ++at)
    for (int64_t p = first; p < last; ++p)
      for (int64_t w = 0; w < weights; ++w) {
        const WoqBlock block(*at, data[w] + p * bytes);
        const char* codes = Family::decode(f, block, decoded, rows.count > 1);
        for (int64_t t = 0; t < rows.count; ++t)
          Family::step(a, tile,
                       {rows.first(t), (*at).index, blocks, block, codes, sum(w, p, t), t == 0});
      }
  for (int64_t p = first; p < last; ++p)
    for (int64_t t = 0; t < rows.count; ++t) {
      for (int64_t w = 0; w < weights && a.compute == WoqCompute::int8; ++w)
        add_outliers(a, tile.rows(), rows.first(t), data[w] + p * bytes, sum(w, p, t));
      finish(a, {tile.rows(), 0, tile.rows().count, rows.first(t), p}, sum(0, p, t),
             sum(weights - 1, p, t));
    }
}

template <class Family>
void woq_with(const WoqArgs& a, int64_t begin, int64_t end) {
  const int64_t all = panel_count(a.n);
  while (begin < end) {
    const int64_t row0 = begin / all * kRowBlock, first = begin % all;
    const int64_t left = a.m - row0, rest = all - first;
    const RowTiles rows(row0, left < kRowBlock ? left : kRowBlock, Family::Tile::kRows);
    const int64_t most = rows.count == 1 ? 1 : kPanelGroup;
    int64_t count = end - begin < rest ? end - begin : rest;
    if (count > most) count = most;
    panels<Family>(a, rows, first, first + count);
    begin += count;
  }
}

// A few rows of int8: one tile, so all counts are known to the compiler. With groups of 32 the rest
// takes as long as the products.
template <int R, class Scale>
void few_int8_rows(const WoqArgs& a, int64_t first, int64_t last) {
  const WoqFormat& f = a.format;
  const char* data[2] = {static_cast<const char*>(a.weight), static_cast<const char*>(a.weight2)};
  const int64_t weights = a.weight2 ? 2 : 1, blocks = woq_blocks(f), bytes = f.panel_bytes();
  const int64_t scale_stride = a.block_scales ? blocks : 1;
  const bool nibbles = f.nibbles(), offsets = f.zero == WoqZero::offset;
  const bool zeros = f.zero == WoqZero::zero;
  const Int8Codes form{nullptr, nibbles, nibbles && Int8Tile::kPacked, true};
  const float raised = Int8Tile::raised(nibbles);
  const Vec center = broadcast(middle(f));
  alignas(64) float result[2][R * kPanel];
  for (int64_t p = first; p < last; ++p) {
    for (int64_t w = 0; w < weights; ++w) {
      Vec sum[R][kVecs];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = broadcast(0.0f);
      for (WoqBlocks at(f); at; ++at) {
        const WoqBlock block(*at, data[w] + p * bytes);
        const int64_t b = (*at).index;
        alignas(64) int32_t acc[R * kPanel];
        Int8Codes codes = form;
        alignas(64) char decoded[Int8Tile::kPacked ? 64 : kWoqBlock * kPanel];
        codes.data = Int8Tile::kPacked ? block.codes : decode_int8(f, block, decoded);
        Int8Tile::multiply<R>(static_cast<const int8_t*>(a.x) + block.k0, a.lda, codes, block.k,
                              acc);
        const auto* scales = reinterpret_cast<const Scale*>(block.scales);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const Vec scale = load(scales + v * kLanes);
          const Vec zero = zeros ? load(scales + kPanel + v * kLanes) : center;
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const float x_sum = a.sums[r * blocks + b];
            const float x_scale = a.scales[r * scale_stride + (a.block_scales ? b : 0)];
            Vec z = number(load_words(acc + r * kPanel + v * kLanes));
            z = z - broadcast(raised * x_sum);
            z = z - zero * broadcast(x_sum);
            z = z * broadcast(x_scale);
            sum[r][v] = fma(z, scale, sum[r][v]);
            if (offsets)
              sum[r][v] =
                  fma(load(scales + kPanel + v * kLanes), broadcast(x_sum * x_scale), sum[r][v]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(result[w] + r * kPanel + v * kLanes, sum[r][v]);
      add_outliers(a, {R, R, 0}, 0, data[w] + p * bytes, result[w]);
    }
    finish(a, {{R, R, 0}, 0, R, 0, p}, result[0], result[weights - 1]);
  }
}

void few_int8(const WoqArgs& a, int64_t first, int64_t last) {
  with_count<kFewInt8Rows>(a.m, [&](auto r) {
    with_type(a.format.scale_type,
              [&](auto t) { few_int8_rows<decltype(r)::value, decltype(t)>(a, first, last); });
  });
}

template <class Family>
int64_t scratch(int64_t m, int64_t weights) {
  const RowTiles rows(0, m < kRowBlock ? m : kRowBlock, Family::Tile::kRows);
  return weights * rows.count * Family::Tile::kRows * kPanel * (rows.count == 1 ? 1 : kPanelGroup);
}

// x / scale to integers, in fp32, by the bits that it has no room for: rounded to even. Where x is
// not finite, no integer stands for it: the scale is NaN, and so is the result.
float quantize(float* x, int64_t n) {
  Vec most = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) most = max(most, abs(load(x + i)));
  const float bad = sum(n, [&](int64_t i, auto l) { return load(x + i, l) * broadcast(0.0f); });
  const bool finite = bad == 0.0f;
  const float largest = max(most);
  const Vec inverse = broadcast(finite && largest > 0.0f ? 127.0f / largest : 0.0f);
  map(x, n, [&](int64_t i, auto l) {
    return finite ? round(load(x + i, l) * inverse) : broadcast(0.0f);
  });
  return largest / 127.0f + bad;
}

// Of each 8 bytes 0, 4, 1, 5, 2, 6, 3, 7: as decode_int8 orders them.
void order_bytes(int8_t* x, int64_t n) {
  const auto apart = [](uint64_t four) LMFUSE_LAMBDA {
    four = (four | four << 16) & 0x0000ffff0000ffffu;
    return (four | four << 8) & 0x00ff00ff00ff00ffu;
  };
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, x + i, sizeof(eight));
    eight = apart(eight & 0xffffffffu) | apart(eight >> 32) << 8;
    __builtin_memcpy(x + i, &eight, sizeof(eight));
  }
}

// One row of x, already in fp32 and in the order of the panels.
void write_row(const WoqRowsArgs& a, float* x, int64_t r) {
  const int64_t blocks = woq_blocks(a.format), columns = woq_block(a.format);
  const int64_t width = a.format.packed_k();
  const auto each_block = [&](auto f) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t k0 = b * columns;
      f(r * blocks + b, k0, b + 1 < blocks ? columns : width - k0);
    }
  };
  const auto add_up = [&](const auto* from, int64_t n) {
    return sum(n, [&](int64_t i, auto l) { return load(from + i, l); });
  };
  const auto copy = [&](auto* to) {
    map(to, width, [&](int64_t i, auto l) { return load(x + i, l); });
  };
  switch (a.compute) {
    case WoqCompute::f32:
      return copy(static_cast<float*>(a.rows) + r * a.lda);
    case WoqCompute::bf16: {
      bf16_t* to = static_cast<bf16_t*>(a.rows) + r * a.lda;
      copy(to);
      return each_block(
          [&](int64_t at, int64_t k0, int64_t n) { a.sums[at] = add_up(to + k0, n); });
    }
    case WoqCompute::int8: {
      take_outliers(a.format, x, a.outliers + r * kWoqOutliers);
      if (!a.block_scales) a.scales[r] = quantize(x, width);
      each_block([&](int64_t at, int64_t k0, int64_t n) {
        if (a.block_scales) a.scales[at] = quantize(x + k0, n);
        a.sums[at] = add_up(x + k0, n);
      });
      int8_t* to = static_cast<int8_t*>(a.rows) + r * a.lda;
      for (int64_t i = 0; i < width; ++i) to[i] = static_cast<int8_t>(x[i]);
      if (a.format.nibbles()) order_bytes(to, width);
    }
  }
}

}  // namespace

WoqPlan woq_plan(const WoqFormat&, WoqCompute compute, int64_t m, int64_t weights) {
#if defined(__AVX512BF16__)
  if (compute == WoqCompute::bf16)
    return {compute,
            m > FewBf16::Tile::kRows ? scratch<Bf16>(m, weights) : scratch<FewBf16>(m, weights)};
#endif
  if (compute == WoqCompute::int8)
    return {compute, m > Int8Tile::kRows ? scratch<Int8<ManyInt8Tile>>(m, weights)
                                         : scratch<Int8<Int8Tile>>(m, weights)};
  return {WoqCompute::f32, scratch<F32>(m, weights)};
}

void woq_rows(const WoqRowsArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.format.packed_k();
  float *x = a.scratch, *ordered = a.order ? x + a.k : x;
  for (int64_t i = a.format.k; i < width; ++i) ordered[i] = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    with_type(a.x.dtype, [&](auto t) {
      const auto* from = row<decltype(t)>(a.x, r);
      map(x, a.k, [&](int64_t i, auto l) { return load(from + i, l); });
    });
    for (int64_t i = 0; a.order && i < a.format.k; ++i) {
      const int64_t from = a.order[i];
      ordered[i] = from >= 0 && from < a.k ? x[from] : 0.0f;
    }
    if (a.round)
      for (int64_t i = 0; i < width; i += kLanes) {
        bf16_t rounded[kLanes];
        store(rounded, load(ordered + i));
        store(ordered + i, load(rounded));
      }
    write_row(a, ordered, r);
  }
}

void woq(const WoqArgs& a, int64_t begin, int64_t end) {
  switch (a.compute) {
    case WoqCompute::f32:
      return woq_with<F32>(a, begin, end);
    case WoqCompute::bf16:
#if defined(__AVX512BF16__)
      if (a.m > FewBf16::Tile::kRows) return woq_with<Bf16>(a, begin, end);
      return woq_with<FewBf16>(a, begin, end);
#else
      return;  // woq_plan never asks for it
#endif
    case WoqCompute::int8:
      if (a.m <= kFewInt8Rows) return few_int8(a, begin, end);
      if (a.m > Int8Tile::kRows) return woq_with<Int8<ManyInt8Tile>>(a, begin, end);
      return woq_with<Int8<Int8Tile>>(a, begin, end);
  }
}

}  // namespace lmfuse::LMFUSE_ISA
