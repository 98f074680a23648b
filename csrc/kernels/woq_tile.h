// Micro-kernels of quantized linear layers: rows of int8 by a panel of 32 channels of int8, in
// int32, which is exact. Declared micro-kernel: this file may name instructions.
//
//   Tile::kRows      rows of the largest tile
//   raised(nibbles)  what the tile adds to each weight
//   Tile::kPacked    whether it takes packed nibbles
//   run(x, lda, b, k, acc)   acc[rows][32] = x[rows][k] b[k]
#pragma once

#include "woq_decode.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// Codes [k / 4][32][4] of a block, or as kernels.h has them.
struct Int8Codes {
  const char* data;
  bool nibbles;  // 0 to 15
  bool packed;   // two in a byte
  bool ahead;    // read from memory: so is what follows
};

#if defined(__AVX512VNNI__)

// VPDPBUSD takes one unsigned factor: the weights, plus 128 if they are signed.
class Int8Tile {
 public:
  static constexpr int kRows = 12;
  static constexpr bool kPacked = true;
  static constexpr float raised(bool nibbles) { return nibbles ? 0.0f : 128.0f; }

  Int8Tile(int64_t rows, int64_t) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  LMFUSE_INLINE void run(const int8_t* x, int64_t lda, const Int8Codes& b, int64_t k,
                         int32_t* acc) {
    with_count<kRows>(rows_, [&](auto r) { multiply<decltype(r)::value>(x, lda, b, k, acc); });
  }
  template <int R>
  static LMFUSE_INLINE void multiply(const int8_t* x, int64_t lda, const Int8Codes& b, int64_t k,
                                     int32_t* acc) {
    if (b.packed) {
      run_nibbles<R>(x, lda, b.data, k, acc);
    } else if (b.nibbles) {
      run_bytes<R, false>(x, lda, b, k, acc);
    } else {
      run_bytes<R, true>(x, lda, b, k, acc);
    }
  }

 private:
  int64_t rows_;

  // As assembler: GCC 12 keeps the sums of the function from immintrin.h in memory.
  template <int R>
  static LMFUSE_INLINE void four_columns(__m512i (&sum)[R][2], const int8_t* x, int64_t lda,
                                         __m512i b0, __m512i b1) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int four;
      __builtin_memcpy(&four, x + r * lda, sizeof(four));
      const __m512i xr = _mm512_set1_epi32(four);
      asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][0]) : "v"(b0), "v"(xr));
      asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][1]) : "v"(b1), "v"(xr));
    }
  }
  template <int R>
  static LMFUSE_INLINE void clear(__m512i (&sum)[R][2]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  }
  template <int R>
  static LMFUSE_INLINE void keep_sums(const __m512i (&sum)[R][2], int32_t* acc) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_si512(acc + r * kPanel, sum[r][0]);
      _mm512_storeu_si512(acc + r * kPanel + 16, sum[r][1]);
    }
  }

  template <int R, bool kRaise>
  static LMFUSE_INLINE void run_bytes(const int8_t* x, int64_t lda, const Int8Codes& codes,
                                      int64_t k, int32_t* acc) {
    const __m512i raise = _mm512_set1_epi8(kRaise ? -128 : 0);
    const char* b = codes.data;
    __m512i sum[R][2];
    clear(sum);
    for (int64_t i = 0; i < k; i += 4, b += 128) {
      if (codes.ahead) fetch_ahead(b);
      four_columns(sum, x + i, lda, _mm512_xor_si512(_mm512_loadu_si512(b), raise),
                   _mm512_xor_si512(_mm512_loadu_si512(b + 64), raise));
    }
    keep_sums(sum, acc);
  }

  // One pass over the nibbles, which are never written out.
  template <int R>
  static LMFUSE_INLINE void run_nibbles(const int8_t* x, int64_t lda, const char* b, int64_t k,
                                        int32_t* acc) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sum[R][2];
    clear(sum);
    for (int64_t i = 0; i < k; i += 8, b += 128) {
      fetch_ahead(b);
      const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
      four_columns(sum, x + i, lda, _mm512_and_si512(b0, low), _mm512_and_si512(b1, low));
      four_columns(sum, x + i + 4, lda, _mm512_and_si512(_mm512_srli_epi32(b0, 4), low),
                   _mm512_and_si512(_mm512_srli_epi32(b1, 4), low));
    }
    keep_sums(sum, acc);
  }
};

#elif defined(__AVX2__)

// Even and odd bytes, widened to 16 bits, by VPMADDWD.
#if defined(__AVX512BW__)
using Ints = __m512i;
LMFUSE_INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
LMFUSE_INLINE void store_ints(void* p, Ints a) { _mm512_storeu_si512(p, a); }
LMFUSE_INLINE Ints same_ints(int x) { return _mm512_set1_epi32(x); }
LMFUSE_INLINE Ints odd_bytes(Ints a) { return _mm512_srai_epi16(a, 8); }
LMFUSE_INLINE Ints even_bytes(Ints a) { return odd_bytes(_mm512_slli_epi16(a, 8)); }
LMFUSE_INLINE Ints add_products(Ints c, Ints a, Ints b) {
  return _mm512_add_epi32(c, _mm512_madd_epi16(a, b));
}
#else
using Ints = __m256i;
LMFUSE_INLINE Ints load_ints(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LMFUSE_INLINE void store_ints(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
LMFUSE_INLINE Ints same_ints(int x) { return _mm256_set1_epi32(x); }
LMFUSE_INLINE Ints odd_bytes(Ints a) { return _mm256_srai_epi16(a, 8); }
LMFUSE_INLINE Ints even_bytes(Ints a) { return odd_bytes(_mm256_slli_epi16(a, 8)); }
LMFUSE_INLINE Ints add_products(Ints c, Ints a, Ints b) {
  return _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
}
#endif

struct Int8Tile {
  static constexpr int kRows = kLanes == 16 ? 6 : 2;
  static constexpr bool kPacked = false;
  static constexpr float raised(bool) { return 0.0f; }

  Int8Tile(int64_t rows, int64_t) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  LMFUSE_INLINE void run(const int8_t* x, int64_t lda, const Int8Codes& b, int64_t k,
                         int32_t* acc) {
    with_count<kRows>(rows_, [&](auto r) { multiply<decltype(r)::value>(x, lda, b, k, acc); });
  }
  template <int R>
  static void multiply(const int8_t* x, int64_t lda, const Int8Codes& codes, int64_t k,
                       int32_t* acc) {
    const char* b = codes.data;
    Ints sum[R][kVecs], even[R], odd[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = same_ints(0);
    for (int64_t i = 0; i < k; i += 4, b += 4 * kPanel) {
      if (codes.ahead) fetch_ahead(b);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int four;
        __builtin_memcpy(&four, x + r * lda + i, sizeof(four));
        even[r] = even_bytes(same_ints(four));
        odd[r] = odd_bytes(same_ints(four));
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Ints bytes = load_ints(b + 4 * v * kLanes);
        const Ints b_even = even_bytes(bytes), b_odd = odd_bytes(bytes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          sum[r][v] = add_products(add_products(sum[r][v], b_even, even[r]), b_odd, odd[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store_ints(acc + r * kPanel + v * kLanes, sum[r][v]);
  }

 private:
  int64_t rows_;
};

#else

struct Int8Tile {
  static constexpr int kRows = 4;
  static constexpr bool kPacked = false;
  static constexpr float raised(bool) { return 0.0f; }

  Int8Tile(int64_t rows, int64_t) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  void run(const int8_t* x, int64_t lda, const Int8Codes& b, int64_t k, int32_t* acc) {
    with_count<kRows>(rows_, [&](auto r) { multiply<decltype(r)::value>(x, lda, b, k, acc); });
  }
  template <int R>
  static void multiply(const int8_t* x, int64_t lda, const Int8Codes& b, int64_t k, int32_t* acc) {
    const auto* bytes = reinterpret_cast<const int8_t*>(b.data);
    for (int64_t r = 0; r < R; ++r) {
      int32_t sum[kPanel] = {};
      for (int64_t i = 0; i < k; i += 4)
        for (int64_t c = 0; c < kPanel; ++c)
          for (int64_t j = 0; j < 4; ++j)
            sum[c] += x[r * lda + i + j] * bytes[i * kPanel + 4 * c + j];
      __builtin_memcpy(acc + r * kPanel, sum, sizeof(sum));
    }
  }

 private:
  int64_t rows_;
};

#endif

#if defined(LMFUSE_TILES)

// Few rows of bf16 by AMX: like AmxTile in gemm_tile.h, to the bit, but a step is decoded while the
// tiles work on the one before, so that neither waits for the other.
class AmxFewTile {
 public:
  using Input = bf16_t;
  static constexpr int kRows = kTileRows;

  explicit AmxFewTile(int64_t rows) : rows_(rows), tiles_(static_cast<int>(rows)) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  template <class Decoder>
  LMFUSE_INLINE void run(const bf16_t* x, int64_t lda, const char* codes, int64_t k, float* acc,
                         const Decoder& decode) {
    constexpr int64_t kRow = kPanel * sizeof(float), kStepBytes = kDotStep / 8 * Decoder::kBytes;
    alignas(64) char steps[2][kDotStep * kPanel * sizeof(bf16_t)];
    tiles_.zero<0>();
    tiles_.zero<1>();
    decode_bf16(decode, codes, kDotStep, steps[0]);
    for (int64_t i = 0, at = 0; i < k; i += kDotStep, at = 1 - at) {
      codes += kStepBytes;
      if (i + kDotStep < k) decode_bf16(decode, codes, kDotStep, steps[1 - at]);
      tiles_.load<4>(x + i, lda * static_cast<int64_t>(sizeof(bf16_t)));
      tiles_.load<6>(steps[at], kRow);
      tiles_.load<7>(steps[at] + 64, kRow);
      tiles_.dot_bf16<0, 4, 6>();
      tiles_.dot_bf16<1, 4, 7>();
    }
    tiles_.store<0>(acc, kRow);
    tiles_.store<1>(acc + 16, kRow);
  }

 private:
  int64_t rows_;
  Tiles tiles_;
};

// Rows of int8 by AMX, as AmxTile: two tiles of rows by two of channels.
class AmxInt8Tile {
 public:
  static constexpr int kRows = 2 * kTileRows;
  static constexpr bool kPacked = false;
  static constexpr float raised(bool) { return 0.0f; }

  // step: what k is a multiple of.
  AmxInt8Tile(int64_t rows, int64_t step)
      : rows_(rows),
        half_(rows <= kTileRows ? rows : (rows + 1) / 2),
        step_(step),
        tiles_(static_cast<int>(half_), static_cast<int>(step)) {}
  TileRows rows() const { return {rows_, half_, rows_ <= kTileRows ? 0 : 2 * half_ - rows_}; }

  LMFUSE_INLINE void run(const int8_t* x, int64_t lda, const Int8Codes& b, int64_t k,
                         int32_t* acc) {
    if (rows_ <= kTileRows) {
      run_tiles<false>(x, lda, b, k, acc);
    } else {
      run_tiles<true>(x, lda, b, k, acc);
    }
  }

 private:
  int64_t rows_, half_, step_;
  Tiles tiles_;

  template <bool kTwo>
  LMFUSE_INLINE void run_tiles(const int8_t* x, int64_t lda, const Int8Codes& codes, int64_t k,
                               int32_t* acc) {
    constexpr int64_t kRow = 4 * kPanel;
    const int8_t* x2 = x + (rows_ - half_) * lda;
    int32_t* acc2 = acc + half_ * kPanel;
    const char* b = codes.data;
    tiles_.zero<0>();
    tiles_.zero<1>();
    if constexpr (kTwo) {
      tiles_.zero<2>();
      tiles_.zero<3>();
    }
    for (int64_t i = 0; i < k; i += step_, b += step_ * kPanel) {
      if (codes.ahead)
        for (int64_t at = 0; at < step_ * kPanel; at += 128) fetch_ahead(b + at);
      tiles_.load<4>(x + i, lda);
      tiles_.load<6>(b, kRow);
      tiles_.load<7>(b + 64, kRow);
      tiles_.dot_int8<0, 4, 6>();
      if constexpr (kTwo) tiles_.load<5>(x2 + i, lda);
      tiles_.dot_int8<1, 4, 7>();
      if constexpr (kTwo) {
        tiles_.dot_int8<2, 5, 6>();
        tiles_.dot_int8<3, 5, 7>();
      }
    }
    tiles_.store<0>(acc, kRow);
    tiles_.store<1>(acc + 16, kRow);
    if constexpr (kTwo) {
      tiles_.store<2>(acc2, kRow);
      tiles_.store<3>(acc2 + 16, kRow);
    }
  }
};

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
