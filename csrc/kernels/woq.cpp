// out = post(x W^T + bias) over quantized weights. A block of a panel is decoded once for all rows
// that share it, into the first-level cache; the tiles of gemm_tile.h and woq_tile.h multiply it.
//
// The sum of each block is a chain of its own (of fp32: one through all blocks); blocks are scaled
// and added in their order. Neither depends on the number of rows, so a row's bits do not.
#include "gemm_finish.h"
#include "woq_tile.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// One tile of rows and one block: where both come from, and go to.
struct Step {
  int64_t row, index;  // of the first row and of the block
  const WoqBlock& block;
  const char* codes;  // decoded
  float* sum;
  bool first_tile;
};

// sum += ((acc - zero * x_sum) * scale + offset * x_sum) * x_scale, of one block.
template <class Acc, class Scale>
LMFUSE_INLINE void add_block(const WoqArgs& a, const TileRows& rows, const Step& s,
                             const WoqScales& w, bool raised, const Acc* acc, Scale x_scale) {
  const int64_t blocks = woq_blocks(a.format);
  const auto load_acc = [](const Acc* p) LMFUSE_LAMBDA {
    if constexpr (__is_same(Acc, float)) {
      return load(p);
    } else {
      return number(load_words(p));
    }
  };
  with_flag(raised || a.format.zero == WoqZero::zero, [&](auto zero) {
    with_flag(a.format.zero == WoqZero::offset, [&](auto offset) {
      for (int64_t t = 0; t < rows.count; ++t) {
        const int64_t at = rows.at(t) * kPanel, row = s.row + t;
        const float x_sum = a.sums[row * blocks + s.index], x_factor = x_scale(row);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          float* sum = s.sum + at + v * kLanes;
          Vec z = load_acc(acc + at + v * kLanes);
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

  static const char* decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    decode_f32(f, block, reinterpret_cast<float*>(to));
    return to;
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    const float* x = static_cast<const float*>(a.x) + s.row * a.lda + s.block.k0;
    tile.run(x, a.lda, s.codes, s.block.k, s.sum, s.index > 0, nothing_ahead(s.codes));
  }
};

#if defined(__AVX512BF16__)

struct Bf16 {
#if defined(LMFUSE_TILES)
  using Tile = AmxTile;
#else
  using Tile = DotTile;
#endif
  static constexpr int64_t kBytes = 2;

  static const char* decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    decode_bf16(f, block, to);
    return to;
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    alignas(64) float acc[Tile::kRows * kPanel];
    const bf16_t* x = static_cast<const bf16_t*>(a.x) + s.row * a.lda + s.block.k0;
    tile.run(x, a.lda, s.codes, s.block.k, acc, false, nothing_ahead(s.codes));
    const WoqScales w = load_scales(a.format, s.block, 0.0f);
    add_block(a, tile.rows(), s, w, false, acc, [](int64_t) LMFUSE_LAMBDA { return 1.0f; });
  }
};

#endif

struct Int8 {
  using Tile = Int8Tile;
  static constexpr int64_t kBytes = 1;

  static const char* decode(const WoqFormat& f, const WoqBlock& block, char* to) {
    return decode_int8(f, block, to);
  }
  static void step(const WoqArgs& a, Tile& tile, const Step& s) {
    alignas(64) int32_t acc[Tile::kRows * kPanel];
    const int8_t* x = static_cast<const int8_t*>(a.x) + s.row * a.lda + s.block.k0;
    tile.run(x, a.lda, s.codes, s.block.k, acc, s.first_tile && s.codes == s.block.codes);
    const float raised = middle(a.format) + Tile::kRaised;
    const WoqScales w = load_scales(a.format, s.block, raised);
    const int64_t blocks = a.block_scales ? woq_blocks(a.format) : 1;
    const float* scales = a.scales + (a.block_scales ? s.index : 0);
    add_block(a, tile.rows(), s, w, raised != 0.0f, acc,
              [=](int64_t row) LMFUSE_LAMBDA { return scales[row * blocks]; });
  }
};

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
  alignas(64) char decoded[kWoqBlock * kPanel * Family::kBytes];
  Tile tile(rows.height);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t p = first; p < last; ++p)
      for (int64_t w = 0; w < weights; ++w) {
        const WoqBlock block(f, data[w] + p * bytes, b);
        const char* codes = Family::decode(f, block, decoded);
        for (int64_t t = 0; t < rows.count; ++t)
          Family::step(a, tile, {rows.first(t), b, block, codes, sum(w, p, t), t == 0});
      }
  for (int64_t p = first; p < last; ++p)
    for (int64_t t = 0; t < rows.count; ++t)
      finish(a, {tile.rows(), 0, tile.rows().count, rows.first(t), p}, sum(0, p, t),
             sum(weights - 1, p, t));
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
      if (!a.block_scales) a.scales[r] = quantize(x, width);
      each_block([&](int64_t at, int64_t k0, int64_t n) {
        if (a.block_scales) a.scales[at] = quantize(x + k0, n);
        a.sums[at] = add_up(x + k0, n);
      });
      int8_t* to = static_cast<int8_t*>(a.rows) + r * a.lda;
      const bool nibbles = a.format.nibbles();
      for (int64_t i = 0; i < width; ++i)
        to[i] = static_cast<int8_t>(x[nibbles ? (i & ~int64_t{7}) + kByteOrder[i & 7] : i]);
    }
  }
}

}  // namespace

WoqPlan woq_plan(const WoqFormat&, WoqCompute compute, int64_t m, int64_t weights) {
#if defined(__AVX512BF16__)
  if (compute == WoqCompute::bf16) return {compute, scratch<Bf16>(m, weights)};
#endif
  if (compute == WoqCompute::int8) return {compute, scratch<Int8>(m, weights)};
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
      return woq_with<Bf16>(a, begin, end);
#else
      return;  // woq_plan never asks for it
#endif
    case WoqCompute::int8:
      return woq_with<Int8>(a, begin, end);
  }
}

}  // namespace lmfuse::LMFUSE_ISA
