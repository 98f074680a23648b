// Micro-kernels of the linear layers: an accumulator tile of some rows by one panel of 32 channels.
// Declared micro-kernel: this file may name instructions.
//
// Each output is one chain over ascending k (AMX: a sum of such chains over blocks of k, each in
// steps of 32), so that its bits depend neither on the number of rows nor on where rows, panels and
// threads are cut. So a level has one kernel per dtype, for one row as for many.
//
//   Tile::Input       the type of a row of x
//   Tile::kRows       rows of the largest tile
//   Tile::kBlocks     whether there is run_block, for when several tiles share a panel
//   Tile(rows)        a kernel for tiles of so many rows
//   Tile::kPairs      whether there is run_pair, for one row by two panels at once
//   run(x, lda, b, k, acc, resume, ahead)   acc[rows][32] = (resume ? acc : 0) + x[rows][k]
//   b[k][32]
//   rows()            which row of acc holds which row of x
#pragma once

#include "loops.h"
#include "tiles.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kVecs = kPanel / kLanes;
// Row r of x lies in row r of acc, from split on in r + gap.
struct TileRows {
  int64_t count, split, gap;

  int64_t at(int64_t r) const { return r < split ? r : r + gap; }
};

constexpr int64_t kWhole = int64_t{1} << 40;

// What will be read soon is fetched by the 128 bytes, so far ahead of `at`.
template <int kInto, int64_t... kDistances>
LMFUSE_INLINE void fetch_lines(const char* at) {
  ((__builtin_prefetch(at + kDistances, 0, kInto),
    __builtin_prefetch(at + kDistances + 64, 0, kInto)),
   ...);
}

// Weights are fetched into the second-level cache (2), whose misses do not hold the line buffers of
// the first (3); and again and again, for a Zen 4 drops what it has no room for. Of the read
// bandwidth there, whose own loop fetches once: linear layers of 4 rows 97 -> 112 %, int8 by int8
// 91 -> 115, int4 by int8 81 -> 105. A request takes the second-level cache a cycle, so weights
// that lie in it are read at 70 GB/s, not 140.
//
// AMX machines read 10 to 15 % faster into the second level than into the first, but codes, whose
// decoding fills the time between two lines, 12 to 15 % faster 2 KB ahead into the first (1 and 4
// KB: 2 % slower).
#if defined(LMFUSE_TILES)
LMFUSE_INLINE void fetch_ahead(const char* at) { fetch_lines<2, 8192>(at); }
LMFUSE_INLINE void fetch_codes(const char* at) { fetch_lines<3, 2048>(at); }
#else
LMFUSE_INLINE void fetch_ahead(const char* at) {
  fetch_lines<2, 20480, 16384, 12288, 8192, 4096>(at);
}
LMFUSE_INLINE void fetch_codes(const char* at) { fetch_ahead(at); }
// Where arithmetic takes as long as memory, requests must be fewer: int4 by bf16 97 -> 103 %.
LMFUSE_INLINE void fetch_slow_codes(const char* at) {
  fetch_lines<2, 16384, 8192>(at);
  fetch_lines<3, 2048>(at);
}
#endif

// A walk over what will be read next, strictly one line after the other, whatever the order of the
// loads. Where one tile reads a panel: the panel itself and those after it. Where several tiles
// share it: the next panel.
class Ahead {
 public:
  static LMFUSE_INLINE Ahead within(const char* panel) { return {panel, 0}; }
  // The share of one of count tiles, each of which reads the present panel once.
  static LMFUSE_INLINE Ahead of_next(const char* next, int64_t bytes, int64_t tile, int64_t count) {
    return {next + tile * bytes / count, (count + 1) / 2};
  }
  // The same, a line in so many steps.
  static LMFUSE_INLINE Ahead spread(const char* next, int64_t every) { return {next, every}; }

  // Once for each 128 bytes that are read.
  LMFUSE_INLINE void step() {
    if (every_ == 0) {
      fetch_ahead(at_);
      at_ += 128;
    } else if (--wait_ < 0) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      wait_ = every_ - 1;
    }
  }

 private:
  LMFUSE_INLINE Ahead(const char* at, int64_t every) : at_(at), every_(every) {}

  const char* at_;
  int64_t every_;  // a line in so many steps; 0: all that is read
  int64_t wait_ = 0;
};

// fp32 accumulation by fma, on every level: fp32 and fp16 weights, and bf16 where no instruction
// multiplies it (its widening to fp32 is exact).
template <class T>
struct FmaTile {
  using Input = float;
  static constexpr int kRows = kLanes == 16 ? 12 : 3;  // 24 (12) accumulators of 32 (16) registers
  static constexpr bool kBlocks = false, kPairs = false;

  explicit FmaTile(int64_t rows) : rows_(rows) {}

  LMFUSE_INLINE void run(const float* x, int64_t lda, const char* b, int64_t k, float* acc,
                         bool resume, Ahead ahead) {
    with_count<kRows>(rows_, [&](auto r) {
      run_rows<decltype(r)::value>(x, lda, reinterpret_cast<const T*>(b), k, acc, resume, ahead);
    });
  }
  TileRows rows() const { return {rows_, rows_, 0}; }

 private:
  int64_t rows_;

  template <int R>
  static void run_rows(const float* x, int64_t lda, const T* b, int64_t k, float* acc, bool resume,
                       Ahead ahead) {
    Vec sum[R][kVecs], row[kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = resume ? load(acc + r * kPanel + v * kLanes) : broadcast(0.0f);

    const auto multiply = [&](const Vec(&w)[kVecs], int64_t i) LMFUSE_LAMBDA {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec xr = broadcast(x[r * lda + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(xr, w[v], sum[r][v]);
      }
    };
    if constexpr (__is_same(T, bf16_t)) {
      Vec second[kVecs];
      for (int64_t i = 0; i < k; i += 2, b += 2 * kPanel) {
        ahead.step();
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) load_pairs(b + 2 * v * kLanes, row[v], second[v]);
        multiply(row, i);
        multiply(second, i + 1);
      }
    } else {
      for (int64_t i = 0; i < k; ++i, b += kPanel) {
        if (sizeof(T) == 4 || i % 2 == 0) ahead.step();
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) row[v] = load(b + v * kLanes);
        multiply(row, i);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(acc + r * kPanel + v * kLanes, sum[r][v]);
  }
};

#if defined(__AVX512BF16__) && !defined(LMFUSE_TILES)

// Pairs of bf16 by VDPBF16PS.
struct DotTile {
  using Input = bf16_t;
  static constexpr int kRows = 12;
  static constexpr bool kBlocks = false, kPairs = true;

  explicit DotTile(int64_t rows) : rows_(rows) {}

  LMFUSE_INLINE void run(const bf16_t* x, int64_t lda, const char* b, int64_t k, float* acc, bool,
                         Ahead ahead) {
    with_count<kRows>(rows_,
                      [&](auto r) { run_rows<decltype(r)::value>(x, lda, b, k, acc, ahead); });
  }
  // acc[w][32] = x[k] b[w][k][32]. Half as many chains end, where memory has nothing to do for a
  // while: all layers of SmolLM2 (gate and up of 576 k) take 5.31 not 5.50 ms on Zen 4 so.
  LMFUSE_INLINE static void run_pair(const bf16_t* x, const char* const (&b)[2], int64_t k,
                                     float* const (&acc)[2], Ahead (&ahead)[2]) {
    __m512 sum[2][2];
    const __m512 zero = _mm512_setzero_ps();
    sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = zero;
    const char *first = b[0], *second = b[1];
    for (int64_t i = 0; i < k; i += 2, first += 128, second += 128) {
      ahead[0].step();
      ahead[1].step();
      int pair;
      __builtin_memcpy(&pair, x + i, sizeof(pair));
      const __m512bh xr = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
      const auto multiply = [&](__m512(&to)[2], const char* from) LMFUSE_LAMBDA {
        to[0] = _mm512_dpbf16_ps(to[0], xr, bit_cast<__m512bh>(_mm512_loadu_si512(from)));
        to[1] = _mm512_dpbf16_ps(to[1], xr, bit_cast<__m512bh>(_mm512_loadu_si512(from + 64)));
      };
      multiply(sum[0], first);
      multiply(sum[1], second);
    }
#pragma GCC unroll 2
    for (int w = 0; w < 2; ++w) {
      _mm512_storeu_ps(acc[w], sum[w][0]);
      _mm512_storeu_ps(acc[w] + 16, sum[w][1]);
    }
  }
  TileRows rows() const { return {rows_, rows_, 0}; }

 private:
  int64_t rows_;

  template <int R>
  static void run_rows(const bf16_t* x, int64_t lda, const char* b, int64_t k, float* acc,
                       Ahead ahead) {
    __m512 sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 2, b += 128) {
      ahead.step();
      const __m512bh b0 = bit_cast<__m512bh>(_mm512_loadu_si512(b));
      const __m512bh b1 = bit_cast<__m512bh>(_mm512_loadu_si512(b + 64));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int pair;
        __builtin_memcpy(&pair, x + r * lda + i, sizeof(pair));
        const __m512bh xr = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], xr, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], xr, b1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(acc + r * kPanel, sum[r][0]);
      _mm512_storeu_ps(acc + r * kPanel + 16, sum[r][1]);
    }
  }
};

#endif

#if defined(LMFUSE_TILES)

// Pairs of bf16 by AMX: two tiles of up to 16 rows (the second may overlap the first) by two of 16
// channels.
//
// Long k in blocks, whose sums are added by vectors: taking the accumulators of the block before
// into the tiles again would stall them for 300 cycles. A block of 512 k is 32 KB of the panel,
// which stays in the first-level cache while the rows of x go past it into the tiles.
struct AmxTile {
  using Input = bf16_t;
  static constexpr int kRows = 2 * kTileRows;
  static constexpr bool kBlocks = true, kPairs = false;

  explicit AmxTile(int64_t rows)
      : rows_(rows), half_(rows <= kTileRows ? rows : (rows + 1) / 2), tiles_(half_) {}

  // How k is cut: blocks of equal length, only the last may be shorter.
  static int64_t block(int64_t k) {
    constexpr int64_t kBlock = 512, kRest = 64;  // a short rest joins its neighbour
    const int64_t count = k > kBlock + kRest ? (k - kRest + kBlock - 1) / kBlock : 1;
    return (k + count * kDotStep - 1) / (count * kDotStep) * kDotStep;
  }

  LMFUSE_INLINE void run(const bf16_t* x, int64_t lda, const char* b, int64_t k, float* acc,
                         bool resume, Ahead ahead) {
    alignas(64) float sums[kRows * kPanel];
    const auto nothing = []() LMFUSE_LAMBDA {};
    const int64_t step = block(k);
    for (int64_t k0 = 0; k0 < k; k0 += step) {
      const int64_t size = k - k0 < step ? k - k0 : step;
      const bool add = resume || k0 > 0;
      run_block<false>(x + k0, lda, b + k0 * kKBytes, size, add ? sums : acc, ahead, nothing);
      if (add)
        for (int64_t i = 0; i < stored() * kPanel; i += kLanes)
          store(acc + i, load(acc + i) + load(sums + i));
    }
  }

  // sums[rows][32] = x[rows][k] b[k][32] over one block. beside() runs once for each 32 of k, while
  // the tiles multiply. kPast: the block of the panel is in the first-level cache, and x goes past.
  template <bool kPast, class F>
  LMFUSE_INLINE void run_block(const bf16_t* x, int64_t lda, const char* b, int64_t k, float* sums,
                               Ahead& ahead, F beside) {
    if (rows_ <= kTileRows) {
      run_tiles<false, kPast>(x, lda, b, k, sums, ahead, beside);
    } else {
      run_tiles<true, kPast>(x, lda, b, k, sums, ahead, beside);
    }
  }
  TileRows rows() const { return {rows_, half_, stored() - rows_}; }

 private:
  static constexpr int64_t kKBytes = kPanel * sizeof(bf16_t);
  int64_t rows_, half_;
  Tiles tiles_;

  int64_t stored() const { return rows_ <= kTileRows ? rows_ : 2 * half_; }

  template <int t, bool kPast>
  LMFUSE_INLINE void load_x(const bf16_t* x, int64_t row_bytes) {
    if constexpr (kPast) {
      tiles_.load_past<t>(x, row_bytes);
    } else {
      tiles_.load<t>(x, row_bytes);
    }
  }

  template <bool kTwo, bool kPast, class F>
  LMFUSE_INLINE void run_tiles(const bf16_t* x, int64_t lda, const char* b, int64_t k, float* sums,
                               Ahead& ahead, F beside) {
    constexpr int64_t kRow = kPanel * sizeof(float);
    const int64_t x_row = lda * static_cast<int64_t>(sizeof(bf16_t));
    const bf16_t* x2 = x + (rows_ - half_) * lda;
    tiles_.zero<0>();
    tiles_.zero<1>();
    if constexpr (kTwo) {
      tiles_.zero<2>();
      tiles_.zero<3>();
    }
    for (int64_t i = 0; i < k; i += kDotStep, b += 16 * kRow) {
      load_x<4, kPast>(x + i, x_row);
      tiles_.load<6>(b, kRow);
      for (int s = 0; s < 16; ++s) ahead.step();
      tiles_.load<7>(b + 64, kRow);
      tiles_.dot_bf16<0, 4, 6>();
      if constexpr (kTwo) load_x<5, kPast>(x2 + i, x_row);
      tiles_.dot_bf16<1, 4, 7>();
      beside();
      if constexpr (kTwo) {
        tiles_.dot_bf16<2, 5, 6>();
        tiles_.dot_bf16<3, 5, 7>();
      }
    }
    tiles_.store<0>(sums, kRow);
    tiles_.store<1>(sums + 16, kRow);
    if constexpr (kTwo) {
      tiles_.store<2>(sums + half_ * kPanel, kRow);
      tiles_.store<3>(sums + half_ * kPanel + 16, kRow);
    }
  }
};

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
