// Bytes as pairs of bf16, 64 at a time. Declared micro-kernel: this file may name instructions.
#pragma once

#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

#if defined(__AVX512BF16__)

// Both bytes of bf16 for each magnitude of a byte. int8 has 129 of them for 128 places: 0 is not
// looked up, and leaves the first to that of -128.
struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
  constexpr explicit ByteTable(float (*value)(int)) : low{}, high{} {
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, value(i)) >> 16;
      low[i] = static_cast<uint8_t>(bits);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr float int8_size(int i) { return static_cast<float>(i ? i : 128); }
constexpr float e4m3_size(int i) {
  if (i == 0x7f) return __builtin_nanf("");
  if (i < 8) return static_cast<float>(i) * 0x1p-9f;
  return __builtin_bit_cast(float, (i + (120 << 3)) << 20);
}
constexpr ByteTable kInt8Sizes(int8_size), kE4m3Sizes(e4m3_size);

// 64 codes at once: their magnitudes by table, byte by byte, and the signs.
template <bool kInt8>
struct BytesToBf16 {
  static constexpr int kColumns = 4, kPairs = 2;
  __m512i low[2], high[2];

  LMFUSE_INLINE BytesToBf16() {
    const ByteTable& sizes = kInt8 ? kInt8Sizes : kE4m3Sizes;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(sizes.low + 64 * i);
      high[i] = _mm512_load_si512(sizes.high + 64 * i);
    }
  }
  LMFUSE_INLINE void operator()(const char* codes, __m512i (&pairs)[kPairs]) const {
    (*this)(_mm512_loadu_si512(codes), pairs);
  }
  // Of four bytes to a word, the first two and the last two.
  LMFUSE_INLINE void operator()(__m512i words, __m512i (&pairs)[kPairs]) const {
    // In each four words, both bytes of a pair beside each other.
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m512i code = _mm512_shuffle_epi8(words, order);
    const __m512i size = kInt8 ? _mm512_abs_epi8(code) : code;
    const __mmask64 some = kInt8 ? _mm512_test_epi8_mask(code, code) : ~__mmask64{0};
    const __m512i lower = _mm512_permutex2var_epi8(low[0], size, low[1]);
    const __m512i upper = _mm512_ternarylogic_epi32(
        _mm512_maskz_permutex2var_epi8(some, high[0], size, high[1]), code, _mm512_set1_epi8(-128),
        0xf8);  // a | (b & c)
    pairs[0] = _mm512_unpacklo_epi8(lower, upper);
    pairs[1] = _mm512_unpackhi_epi8(lower, upper);
  }
  LMFUSE_INLINE void operator()(Vec words, Vec& first, Vec& second) const {
    __m512i pairs[kPairs];
    (*this)(bit_cast<__m512i>(words), pairs);
    first = bit_cast<Vec>(pairs[0]);
    second = bit_cast<Vec>(pairs[1]);
  }
};

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
