// Micro-kernels of quantized linear layers: rows of int8 by a panel of 32 channels of int8, in
// int32, which is exact. Declared micro-kernel: this file may name instructions.
//
//   Tile::kRows     rows of the largest tile
//   Tile::kRaised   what the tile adds to each weight
//   run(x, lda, b, k, acc, ahead)   acc[rows][32] = x[rows][k] b[k / 4][32][4]; ahead: b is read
//                                   from memory, and so is what follows it
#pragma once

#include "woq_decode.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

#if defined(__AVX512VNNI__)

// VPDPBUSD takes one unsigned factor: the weights plus 128.
struct Int8Tile {
  static constexpr int kRows = 12;
  static constexpr float kRaised = 128.0f;

  explicit Int8Tile(int64_t rows) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  LMFUSE_INLINE void run(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc,
                         bool ahead) {
    with_count<kRows>(rows_,
                      [&](auto r) { run_rows<decltype(r)::value>(x, lda, b, k, acc, ahead); });
  }

 private:
  int64_t rows_;

  template <int R>
  static void run_rows(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc,
                       bool ahead) {
    const __m512i raise = _mm512_set1_epi8(-128);
    __m512i sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 4, b += 128) {
      if (ahead) fetch_ahead(b);
      const __m512i b0 = _mm512_xor_si512(_mm512_loadu_si512(b), raise);
      const __m512i b1 = _mm512_xor_si512(_mm512_loadu_si512(b + 64), raise);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int four;
        __builtin_memcpy(&four, x + r * lda + i, sizeof(four));
        const __m512i xr = _mm512_set1_epi32(four);
        // As assembler: GCC 12 keeps the sums of the function from immintrin.h in memory.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][0]) : "v"(b0), "v"(xr));
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][1]) : "v"(b1), "v"(xr));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_si512(acc + r * kPanel, sum[r][0]);
      _mm512_storeu_si512(acc + r * kPanel + 16, sum[r][1]);
    }
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
  static constexpr float kRaised = 0.0f;

  explicit Int8Tile(int64_t rows) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  LMFUSE_INLINE void run(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc,
                         bool ahead) {
    with_count<kRows>(rows_,
                      [&](auto r) { run_rows<decltype(r)::value>(x, lda, b, k, acc, ahead); });
  }

 private:
  int64_t rows_;

  template <int R>
  static void run_rows(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc,
                       bool ahead) {
    Ints sum[R][kVecs], even[R], odd[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = same_ints(0);
    for (int64_t i = 0; i < k; i += 4, b += 4 * kPanel) {
      if (ahead) fetch_ahead(b);
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
};

#else

struct Int8Tile {
  static constexpr int kRows = 4;
  static constexpr float kRaised = 0.0f;

  explicit Int8Tile(int64_t rows) : rows_(rows) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  void run(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc, bool) {
    const auto* bytes = reinterpret_cast<const int8_t*>(b);
    for (int64_t r = 0; r < rows_; ++r) {
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

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
