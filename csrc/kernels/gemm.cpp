// out = post(x W^T + bias): how rows, panels and k are walked, and what is done to the
// accumulators. The arithmetic itself stands in gemm_tile.h.
//
// Few rows: each panel is read once, straight through, at the speed of memory. Many rows by AMX: in
// blocks of k that fit the first-level cache, with the accumulators of a group of panels waiting in
// the second. While the tiles multiply, vectors finish what they left just before.
#include "gemm_finish.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// One or two weights, read panel by panel in turn.
struct Weights {
  const char* data[2];
  int64_t count, panel;  // how many; bytes of a panel

  explicit Weights(const GemmArgs& a)
      : data{static_cast<const char*>(a.weight), static_cast<const char*>(a.weight2)},
        count(a.weight2 ? 2 : 1),
        panel(panel_bytes(a.weight_type, a.k)) {}
  const char* at(int64_t weight, int64_t p) const { return data[weight] + p * panel; }
  const char* after(int64_t weight, int64_t p) const {
    return weight + 1 < count ? at(weight + 1, p) : at(0, p + 1);
  }
};

// One row by two weights, whose panels are read side by side.
template <class Tile>
void pairs(const GemmArgs& a, int64_t row, int64_t first, int64_t last) {
  const Weights weights(a);
  const auto* x = static_cast<const typename Tile::Input*>(a.x) + row * a.lda;
  const int64_t k = packed_k(a.weight_type, a.k);
  alignas(64) float acc[2][kPanel];
  for (int64_t p = first; p < last; ++p) {
    const char* const b[] = {weights.at(0, p), weights.at(1, p)};
    Ahead ahead[] = {Ahead::within(b[0]), Ahead::within(b[1])};
    Tile::run_pair(x, b, k, {acc[0], acc[1]}, ahead);
    finish(a, {{1, 1, 0}, 0, 1, row, p}, acc[0], acc[1]);
  }
}

// Each tile runs over the whole of k.
template <class Tile>
void straight(const GemmArgs& a, const RowTiles& rows, int64_t first, int64_t last) {
  const Weights weights(a);
  const auto* x = static_cast<const typename Tile::Input*>(a.x);
  const int64_t k = packed_k(a.weight_type, a.k);
  Tile tile(rows.height);
  alignas(64) float acc[2][Tile::kRows * kPanel];
  for (int64_t p = first; p < last; ++p)
    for (int64_t t = 0; t < rows.count; ++t) {
      const int64_t r = rows.first(t);
      for (int64_t w = 0; w < weights.count; ++w) {
        const char* b = weights.at(w, p);
        const Ahead ahead = rows.count == 1
                                ? Ahead::within(b)
                                : Ahead::of_next(weights.after(w, p), weights.panel, t, rows.count);
        tile.run(x + r * a.lda, a.lda, b, k, acc[w], false, ahead);
      }
      finish(a, {tile.rows(), 0, tile.rows().count, r, p}, acc[0], acc[1]);
    }
}

// What the tiles left: the sums of one block of k, to be added to those before and, after the last
// block, finished. Some rows at a time, so that the next tile multiplies meanwhile.
struct Left {
  Part part;  // part.from: how far it is
  float* sums;
  float* acc;         // of the blocks before
  const float* gate;  // the accumulators of the first weight, where sums are of the second
  bool first, last;   // of the blocks of k

  LMFUSE_INLINE void step(const GemmArgs& a, int64_t count) {
    const int64_t rest = part.rows.count - part.from;
    part.to = part.from + (count < rest ? count : rest);
    if (part.from == part.to) return;
    if (!first || !last)
      for (int64_t r = part.from; r < part.to; ++r) {
        const int64_t at = part.rows.at(r) * kPanel;
#pragma GCC unroll 4
        for (int64_t i = at; i < at + kPanel; i += kLanes) {
          const Vec sum = load(sums + i);
          store((last ? sums : acc) + i, first ? sum : load(acc + i) + sum);
        }
      }
    if (last) finish(a, part, gate ? gate : sums, sums);
    part.from = part.to;
  }
};

// In blocks of k: a panel's block stays in the first-level cache for all tiles.
template <class Tile>
void blocked(const GemmArgs& a, const RowTiles& rows, int64_t first, int64_t last) {
  const Weights weights(a);
  const auto* x = static_cast<const typename Tile::Input*>(a.x);
  const int64_t k = packed_k(a.weight_type, a.k), k_bytes = weights.panel / k;
  const int64_t step = Tile::block(k), acc_tile = Tile::kRows * kPanel;
  Tile tile(rows.height);
  alignas(64) float sums[2][Tile::kRows * kPanel];
  Left left{};
  int now = 0;
  for (int64_t k0 = 0; k0 < k; k0 += step) {
    const int64_t block = k - k0 < step ? k - k0 : step;
    const int64_t share =
        (rows.height * kDotStep + block - 1) / block;  // for each step of the tiles
    for (int64_t p = first; p < last; ++p)
      for (int64_t w = 0; w < weights.count; ++w) {
        const char* b = weights.at(w, p) + k0 * k_bytes;
        const bool more = p + 1 < last || w + 1 < weights.count;
        const char* next = more ? weights.after(w, p) + k0 * k_bytes
                                : weights.at(0, first) + (k0 + block) * k_bytes;
        for (int64_t t = 0; t < rows.count; ++t) {
          const int64_t r = rows.first(t);
          Ahead ahead = Ahead::of_next(next, block * k_bytes, t, rows.count);
          tile.template run_block<true>(x + r * a.lda + k0, a.lda, b, block, sums[now], ahead,
                                        [&]() LMFUSE_LAMBDA { left.step(a, share); });
          left.step(a, rows.height);
          float* acc = a.scratch + ((p - first) * rows.count + t) * weights.count * acc_tile;
          const bool end = k0 + block == k && w + 1 == weights.count;
          left = {{tile.rows(), 0, 0, r, p}, sums[now], acc + w * acc_tile,
                  w ? acc : nullptr,         k0 == 0,   end};
          now = 1 - now;
        }
      }
  }
  left.step(a, rows.height);
}

template <class Tile>
bool in_blocks(int64_t rows) {
  return Tile::kBlocks && rows > Tile::kRows;
}

template <class Tile>
void gemm_with(const GemmArgs& a, int64_t begin, int64_t end) {
  const int64_t panels = panel_count(a.n);
  while (begin < end) {
    const int64_t row0 = begin / panels * kRowBlock, first = begin % panels;
    const int64_t left = a.m - row0, rest = panels - first;
    const RowTiles rows(row0, left < kRowBlock ? left : kRowBlock, Tile::kRows);
    int64_t count = end - begin < rest ? end - begin : rest;
    if constexpr (Tile::kBlocks) {
      if (in_blocks<Tile>(rows.rows)) {
        // As many panels as tiles: the fewer the rows, the nearer together is what is read.
        if (count > rows.count) count = rows.count;
        blocked<Tile>(a, rows, first, first + count);
        begin += count;
        continue;
      }
    }
    if constexpr (Tile::kPairs) {
      if (a.weight2 && rows.rows == 1) {
        pairs<Tile>(a, row0, first, first + count);
        begin += count;
        continue;
      }
    }
    straight<Tile>(a, rows, first, first + count);
    begin += count;
  }
}

#if defined(LMFUSE_TILES)
using Bf16Tile = AmxTile;
#elif defined(__AVX512BF16__)
using Bf16Tile = DotTile;
#else
using Bf16Tile = FmaTile<bf16_t>;
#endif

template <class Tile>
GemmFormat format(int64_t m, int64_t k_multiple) {
  const int64_t block = m < kRowBlock ? m : kRowBlock;
  const int64_t tiles = (block + Tile::kRows - 1) / Tile::kRows;
  return {sizeof(typename Tile::Input) == 4 ? DType::f32 : DType::bf16, k_multiple,
          in_blocks<Tile>(block) ? tiles * tiles * Tile::kRows : 0};
}

}  // namespace

GemmFormat gemm_format(DType weight, int64_t m) {
  return weight == DType::bf16 ? format<Bf16Tile>(m, kDotStep) : format<FmaTile<float>>(m, 1);
}

void gemm_rows(const GemmRowsArgs& a, int64_t begin, int64_t end) {
  with_type(a.x.dtype, [&](auto from) {
    with_type(a.type, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      for (int64_t r = begin; r < end; ++r) {
        const From* x = row<From>(a.x, r);
        To* y = static_cast<To*>(a.rows) + r * a.lda;
        map(y, a.k, [&](int64_t i, auto l) { return load(x + i, l); });
        for (int64_t i = a.k; i < a.lda; ++i) y[i] = To{};
      }
    });
  });
}

void gemm(const GemmArgs& a, int64_t begin, int64_t end) {
  switch (a.weight_type) {
    case DType::f32:
      return gemm_with<FmaTile<float>>(a, begin, end);
    case DType::bf16:
      return gemm_with<Bf16Tile>(a, begin, end);
    case DType::f16:
      return gemm_with<FmaTile<f16_t>>(a, begin, end);
  }
}

}  // namespace lmfuse::LMFUSE_ISA
