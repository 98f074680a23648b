// Rows of int8 by the codes of a panel, in int32, which is exact: the sums of a block stay in
// registers until they are scaled. Declared micro-kernel: this file may name instructions.
//
// Codes::kColumns          in 128 bytes, for all channels of a panel
// Codes::kRaised           what their instruction adds to each
// Codes::multiply(acc, x, b)   acc[rows][32] += x[rows][columns] b[columns][32]
#pragma once

#include "woq_decode.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// Of each 8 bytes of x 0, 4, 1, 5, 2, 6, 3, 7: as the nibbles lie. In multiples of 32.
LMFUSE_INLINE void order_bytes(int8_t* x, int64_t n) {
#if defined(__AVX2__)
  const __m256i order = _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,  //
                                         0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int64_t i = 0; i < n; i += 32) {
    auto* at = reinterpret_cast<__m256i*>(x + i);
    _mm256_storeu_si256(at, _mm256_shuffle_epi8(_mm256_loadu_si256(at), order));
  }
#else
  for (int64_t i = 0; i < n; i += 8) {
    const int8_t* at = x + i;
    const int8_t ordered[8] = {at[0], at[4], at[1], at[5], at[2], at[6], at[3], at[7]};
    __builtin_memcpy(x + i, ordered, sizeof(ordered));
  }
#endif
}

template <int R>
using Int8Sums = Words[R][kVecs];

#if defined(__AVX512VNNI__)

constexpr int kInt8Rows = 12;     // 24 sums of 32 registers
constexpr int kManyInt8Rows = 7;  // with as many of the blocks before

LMFUSE_INLINE Words words(int x) { return {_mm512_set1_epi32(x)}; }

// As assembler: GCC 12 keeps the sums of the function from immintrin.h in memory.
template <int R>
LMFUSE_INLINE void four_columns(Int8Sums<R>& acc, const XRows<R>& x, int64_t column, __m512i b0,
                                __m512i b1) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512i xr = _mm512_set1_epi32(x.four(r, column));
    asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][0].v) : "v"(b0), "v"(xr));
    asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][1].v) : "v"(b1), "v"(xr));
  }
}

// VPDPBUSD takes one unsigned factor: the weights, plus 128 if they are signed.
struct SignedBytes {
  static constexpr int kColumns = 4, kRaised = 128;
  template <int R>
  static LMFUSE_INLINE void multiply(Int8Sums<R>& acc, const XRows<R>& x, const char* b) {
    const __m512i raise = _mm512_set1_epi8(-128);
    four_columns(acc, x, 0, _mm512_xor_si512(_mm512_loadu_si512(b), raise),
                 _mm512_xor_si512(_mm512_loadu_si512(b + 64), raise));
  }
};
struct NibbleBytes {
  static constexpr int kColumns = 4, kRaised = 0;
  template <int R>
  static LMFUSE_INLINE void multiply(Int8Sums<R>& acc, const XRows<R>& x, const char* b) {
    four_columns(acc, x, 0, _mm512_loadu_si512(b), _mm512_loadu_si512(b + 64));
  }
};
struct Nibbles {
  static constexpr int kColumns = 8, kRaised = 0;
  template <int R>
  static LMFUSE_INLINE void multiply(Int8Sums<R>& acc, const XRows<R>& x, const char* b) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
    four_columns(acc, x, 0, _mm512_and_si512(b0, low), _mm512_and_si512(b1, low));
    four_columns(acc, x, 4, _mm512_and_si512(_mm512_srli_epi32(b0, 4), low),
                 _mm512_and_si512(_mm512_srli_epi32(b1, 4), low));
  }
};

#elif defined(__AVX2__)

// VPMADDUBSW takes one unsigned factor: |b| by x with the sign of b. Two products of at most 128 *
// 127 do not saturate 16 bits.
constexpr int kInt8Rows = kLanes == 16 ? 6 : 2, kManyInt8Rows = kInt8Rows;

#if defined(__AVX512BW__)
LMFUSE_INLINE Words words(int x) { return {_mm512_set1_epi32(x)}; }
LMFUSE_INLINE Words magnitudes(Words b) { return {_mm512_abs_epi8(b.v)}; }
LMFUSE_INLINE Words signed_as(Words x, Words b) {
  return {_mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(b.v), _mm512_setzero_si512(), x.v)};
}
LMFUSE_INLINE Words pairs(Words b, Words x) { return {_mm512_maddubs_epi16(b.v, x.v)}; }
LMFUSE_INLINE Words add_pairs(Words a, Words b) { return {_mm512_add_epi16(a.v, b.v)}; }
LMFUSE_INLINE Words add_fours(Words acc, Words a) {
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, _mm512_set1_epi16(1)))};
}
#else
LMFUSE_INLINE Words words(int x) { return {_mm256_set1_epi32(x)}; }
LMFUSE_INLINE Words magnitudes(Words b) { return {_mm256_abs_epi8(b.v)}; }
LMFUSE_INLINE Words signed_as(Words x, Words b) { return {_mm256_sign_epi8(x.v, b.v)}; }
LMFUSE_INLINE Words pairs(Words b, Words x) { return {_mm256_maddubs_epi16(b.v, x.v)}; }
LMFUSE_INLINE Words add_pairs(Words a, Words b) { return {_mm256_add_epi16(a.v, b.v)}; }
LMFUSE_INLINE Words add_fours(Words acc, Words a) {
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(a.v, _mm256_set1_epi16(1)))};
}
#endif

template <bool kSigned>
struct Bytes {
  static constexpr int kColumns = 4, kRaised = 0;
  template <int R>
  static LMFUSE_INLINE void multiply(Int8Sums<R>& acc, const XRows<R>& x, const char* b) {
    Words xr[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) xr[r] = words(x.four(r, 0));
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Words code = load_words(b + 4 * v * kLanes);
      const Words size = kSigned ? magnitudes(code) : code;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        acc[r][v] = add_fours(acc[r][v], pairs(size, kSigned ? signed_as(xr[r], code) : xr[r]));
    }
  }
};
using SignedBytes = Bytes<true>;
using NibbleBytes = Bytes<false>;
struct Nibbles {
  static constexpr int kColumns = 8, kRaised = 0;
  template <int R>
  static LMFUSE_INLINE void multiply(Int8Sums<R>& acc, const XRows<R>& x, const char* b) {
    Words first[R], second[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      first[r] = words(x.four(r, 0));
      second[r] = words(x.four(r, 4));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Words both = load_words(b + 4 * v * kLanes);
      const Words low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        acc[r][v] = add_fours(acc[r][v], add_pairs(pairs(low, first[r]), pairs(high, second[r])));
    }
  }
};

#else

constexpr int kInt8Rows = 4, kManyInt8Rows = kInt8Rows;

LMFUSE_INLINE Words words(int x) {
  Words w;
  for (uint32_t& word : w.v) word = static_cast<uint32_t>(x);
  return w;
}

// Codes of `kBits` bits, at steps of 8 in each word.
template <int kBits, int kCodes>
struct Codes {
  static constexpr int kColumns = kCodes, kRaised = 0;
  template <int R>
  static LMFUSE_INLINE void multiply(Int8Sums<R>& acc, const XRows<R>& x, const char* b) {
    for (int v = 0; v < kVecs; ++v) {
      const Words words = load_words(b + 4 * v * kLanes);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kCodes; ++i) {
          const int four = x.four(r, i / 4 * 4), factor = static_cast<int8_t>(four >> i % 4 * 8);
          for (int l = 0; l < kLanes; ++l) {
            const uint32_t bits = words.v[l] >> (i % 4 * 8 + i / 4 * 4);
            const int code = kBits == 8 ? static_cast<int8_t>(bits) : static_cast<int>(bits & 15);
            acc[r][v].v[l] += static_cast<uint32_t>(code * factor);
          }
        }
    }
  }
};
using SignedBytes = Codes<8, 4>;
using NibbleBytes = Codes<4, 4>;
using Nibbles = Codes<4, 8>;

#endif

// What the sum of x in a block is multiplied by for the sums to begin with: minus what the codes
// are raised by, and the middle of their range.
template <class Codes>
LMFUSE_INLINE int start_factor(const WoqFormat& f) {
  return -(Codes::kRaised + static_cast<int>(middle(f)));
}

// R rows of int8 by the panel of s. kHere: which is read from memory here.
template <int R, class Codes, bool kHere>
void int8_panel(const WoqStep& s) {
  const WoqArgs& a = s.args;
  const char* x0 = static_cast<const char*>(a.x) + s.row * a.lda;
  const int factor = start_factor<Codes>(a.format);
  const char* b = s.codes;
  Ahead ahead = s.ahead;
  WoqSums<R, kLanes == 16 && R <= kManyInt8Rows> sums(s.sum);
  for (WoqBlocks at = s.at; at; ++at) {
    const WoqBlock block(*at, s.panel);
    if (!s.codes) b = block.codes;
    if constexpr (kHere) fetch_codes(b - 128);  // the scales
    const float* x_sums = s.x_sums((*at).index);
    alignas(64) int32_t start[16];
    for (int r = 0; r < R; ++r) start[r] = factor * static_cast<int32_t>(x_sums[r]);
    asm volatile("" ::"r"(start)
                 : "memory");  // to be read from there, not shuffled out of registers
    Int8Sums<R> acc;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = words(start[r]);
    XRows<R> x(x0 + block.k0, a.lda);
    for (int64_t k = block.k; k > 0; k -= Codes::kColumns) {
      if constexpr (kHere) {
        fetch_codes(b);
      } else {
        ahead.step();
      }
      Codes::template multiply<R>(acc, x, b);
      b += 128;
      x.advance(Codes::kColumns);
    }
    with_flag(a.block_scales, [&](auto scaled) LMFUSE_LAMBDA {
      const float* x_scales = a.scales + (*at).index * a.m + s.row;
      add_block<R, !kHere>(
          s, *at, sums, [&](int r, int v) LMFUSE_LAMBDA { return number(acc[r][v]); },
          [&](int r) LMFUSE_LAMBDA { return decltype(scaled)::value ? x_scales[r] : 1.0f; });
    });
  }
  sums.done();
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
