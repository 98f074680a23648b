// The vocabulary of simd.h on AVX-512: 16 lanes, tails by mask.
#pragma once

#include <immintrin.h>

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kLanes = 16;

struct Vec {
  __m512 v;
};
using Mask = __mmask16;

struct Lanes {
  __mmask16 mask;
  static LMFUSE_INLINE Lanes all() { return {0xffff}; }
  static LMFUSE_INLINE Lanes first(int64_t n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
};

LMFUSE_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
LMFUSE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// As the hardware has them: the second operand where either is NaN.
LMFUSE_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
LMFUSE_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
LMFUSE_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LMFUSE_INLINE Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
LMFUSE_INLINE uint32_t bits(Mask m) { return m; }
LMFUSE_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
LMFUSE_INLINE Vec keep(Vec a, Lanes l) { return {_mm512_maskz_mov_ps(l.mask, a.v)}; }

// a * 2^n for integral n in [-252, 252]; right also where the result is subnormal.
LMFUSE_INLINE Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

LMFUSE_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
LMFUSE_INLINE float max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Word i to the upper half of lane i, by one permutation; widening and shifting take two steps.
LMFUSE_INLINE Vec widen(__m256i bits, bf16_t) {
  const __m512i upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                         6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, _mm512_castsi256_si512(bits)))};
}
LMFUSE_INLINE Vec widen(__m256i bits, f16_t) { return {_mm512_cvtph_ps(bits)}; }

// Rounds subnormals as torch does. NaN stays NaN.
LMFUSE_INLINE __m256i round_to_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
#if defined(__AVX512BF16__)
// vcvtneps2bf16 takes a third of the time, but would flush subnormals: they go the long way.
__attribute__((noinline, cold)) __m256i round_subnormals(Vec a) { return round_to_bf16(a); }
LMFUSE_INLINE __m256i narrow(Vec a, bf16_t) {
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kSubnormal), 0)) return round_subnormals(a);
  return (__m256i)_mm512_cvtneps_pbh(a.v);
}
#else
LMFUSE_INLINE __m256i narrow(Vec a, bf16_t) { return round_to_bf16(a); }
#endif
LMFUSE_INLINE __m256i narrow(Vec a, f16_t) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LMFUSE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LMFUSE_INLINE Vec load(const float* p, Lanes l) { return {_mm512_maskz_loadu_ps(l.mask, p)}; }
LMFUSE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
LMFUSE_INLINE void store(float* p, Vec a, Lanes l) { _mm512_mask_storeu_ps(p, l.mask, a.v); }

template <class T>
LMFUSE_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
LMFUSE_INLINE Vec load(const T* p, Lanes l) {
  return widen(_mm256_maskz_loadu_epi16(l.mask, p), T{});
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a, Lanes l) {
  _mm256_mask_storeu_epi16(p, l.mask, narrow(a, T{}));
}

// Two vectors to an address that is a multiple of 2 * kLanes elements, around the caches.
LMFUSE_INLINE void stream(float* p, Vec a, Vec b) {
  _mm512_stream_ps(p, a.v);
  _mm512_stream_ps(p + kLanes, b.v);
}
template <class T>
LMFUSE_INLINE void stream(T* p, Vec a, Vec b) {
  _mm512_stream_si512(
      reinterpret_cast<__m512i*>(p),
      _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, T{})), narrow(b, T{}), 1));
}
LMFUSE_INLINE void stream_end() { _mm_sfence(); }

// (a, b) = 2 * kLanes consecutive values -> their even and odd elements, and back.
LMFUSE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  const __m512i index =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = {_mm512_permutex2var_ps(a.v, index, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(index, _mm512_set1_epi32(1)), b.v)};
}
LMFUSE_INLINE void interleave(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = {_mm512_permutex2var_ps(even.v, index, odd.v)};
  b = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(index, _mm512_set1_epi32(8)), odd.v)};
}

// v[i] = the words at row[0 … kLanes - 1] + offset + 4 i.
constexpr int64_t kTurned = kLanes / 2;
LMFUSE_INLINE void load_turned(const char* const* row, int64_t offset, Vec (&v)[kTurned]) {
  __m512 a[kTurned], b[kTurned];
  const auto half = [&](int r) LMFUSE_LAMBDA {
    return _mm256_loadu_pd(reinterpret_cast<const double*>(row[r] + offset));
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // rows i and i + 4, 8 + i and 12 + i
    const int r = i / 4 * 8 + i % 4;
    a[i] = _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(half(r)), half(r + 4), 1));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = {_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88)};
    v[i + 4] = {_mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd)};
  }
}

// 2 * kLanes bf16, taken in pairs -> the first and the second of each pair.
LMFUSE_INLINE void split_pairs(Vec pairs, Vec& first, Vec& second) {
  const __m512i bits = _mm512_castps_si512(pairs.v);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)))};
}
LMFUSE_INLINE void load_pairs(const bf16_t* p, Vec& first, Vec& second) {
  split_pairs({_mm512_loadu_ps(reinterpret_cast<const float*>(p))}, first, second);
}
#if defined(__AVX512BF16__)
LMFUSE_INLINE Vec broadcast_pair(const bf16_t* p) {
  float bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return broadcast(bits);
}
LMFUSE_INLINE Vec dot_pairs(Vec a, Vec b, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, bit_cast<__m512bh>(a.v), bit_cast<__m512bh>(b.v))};
}
#endif

LMFUSE_INLINE void transpose(Vec (&v)[kLanes]) {
  __m512 a[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {  // 2 by 2
    a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
  __m512 b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {  // 4 by 4
    const auto low = [](__m512 x, __m512 y) LMFUSE_LAMBDA {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto high = [](__m512 x, __m512 y) LMFUSE_LAMBDA {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    b[i] = low(a[i], a[i + 2]);
    b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]);
    b[i + 3] = high(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {  // quarters
    const __m512 even0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    v[i] = {_mm512_shuffle_f32x4(even0, even1, 0x88)};
    v[i + 4] = {_mm512_shuffle_f32x4(odd0, odd1, 0x88)};
    v[i + 8] = {_mm512_shuffle_f32x4(even0, even1, 0xdd)};
    v[i + 12] = {_mm512_shuffle_f32x4(odd0, odd1, 0xdd)};
  }
}

LMFUSE_INLINE void zip(const bf16_t* a, const bf16_t* b, Vec& first, Vec& second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  first = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(x, low, y))};
  second = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(x, high, y))};
}

// The same within quarters, by unpacking alone: of columns 8 q to 8 q + 7 the first half to quarter
// q of `first`, the other to that of `second`. order_quarters brings sums of such columns into
// order.
LMFUSE_INLINE void zip_quarters(const bf16_t* a, const bf16_t* b, Vec& first, Vec& second) {
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  first = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y))};
  second = {_mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y))};
}
LMFUSE_INLINE void order_quarters(Vec& first, Vec& second) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 x = first.v, y = second.v;
  first = {_mm512_permutex2var_ps(x, low, y)};
  second = {_mm512_permutex2var_ps(x, high, y)};
}

// fp8 by way of fp16: e5m2 is its upper byte; e4m3, but for NaN, has an exponent 8 lower there.
LMFUSE_INLINE Vec widen(__m128i bytes, i8_t) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
LMFUSE_INLINE Vec widen(__m128i bytes, e5m2_t) {
  return {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8))};
}
LMFUSE_INLINE Vec widen(__m128i bytes, e4m3_t) {
  const __m256i x = _mm256_cvtepi8_epi16(bytes);
  const __m256i rest = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(rest, _mm256_set1_epi16(0x7f));
  const __m256i magnitude =
      _mm256_mask_mov_epi16(_mm256_slli_epi16(rest, 7), nan, _mm256_set1_epi16(0x7e00));
  const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi16(-0x8000));
  return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, magnitude)), _mm512_set1_ps(256.0f))};
}
// int8, which bf16 holds: the upper half of a float that is one.
LMFUSE_INLINE Vec join_halves(Vec first, Vec second) {
  return {
      _mm512_castsi512_ps(_mm512_mask_mov_epi16(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16),
                                                0xaaaaaaaa, _mm512_castps_si512(second.v)))};
}
LMFUSE_INLINE void zip(const i8_t* a, const i8_t* b, Vec& first, Vec& second) {
  const auto wide = [](const i8_t* p) LMFUSE_LAMBDA {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), i8_t{});
  };
  first = join_halves(wide(a), wide(b));
  second = join_halves(wide(a + kLanes), wide(b + kLanes));
}
template <class T>
LMFUSE_INLINE void zip(const T* a, const T* b, bf16_t* to) {
  Vec first, second;
  zip(a, b, first, second);
  _mm512_storeu_ps(to, first.v);
  _mm512_storeu_ps(to + 2 * kLanes, second.v);
}
#define LMFUSE_LOAD_BYTES(T)                                                 \
  LMFUSE_INLINE Vec load(const T* p) {                                       \
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{}); \
  }                                                                          \
  LMFUSE_INLINE Vec load(const T* p, Lanes l) {                              \
    return widen(_mm_maskz_loadu_epi8(l.mask, p), T{});                      \
  }
LMFUSE_LOAD_BYTES(i8_t)
LMFUSE_LOAD_BYTES(e5m2_t)
LMFUSE_LOAD_BYTES(e4m3_t)
#undef LMFUSE_LOAD_BYTES
LMFUSE_INLINE void store(i8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

LMFUSE_INLINE void store_low(float* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}
LMFUSE_INLINE void store_low(bf16_t* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
  store(p, a);
  store(p + kLanes, b);
#endif
}

struct Words {
  __m512i v;
};
LMFUSE_INLINE Words load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
LMFUSE_INLINE void store_words(void* p, Words w) { _mm512_storeu_si512(p, w.v); }
LMFUSE_INLINE Words operator>>(Words w, unsigned bits) { return {_mm512_srli_epi32(w.v, bits)}; }
LMFUSE_INLINE Words operator<<(Words w, int bits) {
  return {_mm512_sll_epi32(w.v, _mm_cvtsi32_si128(bits))};
}
LMFUSE_INLINE Words operator&(Words w, uint32_t mask) {
  return {_mm512_and_si512(w.v, _mm512_set1_epi32(static_cast<int>(mask)))};
}
LMFUSE_INLINE Words byte(Words w, unsigned i) {
  return {_mm512_srai_epi32(_mm512_slli_epi32(w.v, 24 - 8 * i), 24)};
}
LMFUSE_INLINE Words top(Words w, int i) {
  const __m512i first =
      _mm512_broadcast_i32x4(_mm_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080));
  return {_mm512_shuffle_epi8(w.v, _mm512_add_epi32(first, _mm512_set1_epi32(i << 24)))};
}
LMFUSE_INLINE Vec number(Words w) { return {_mm512_cvtepi32_ps(w.v)}; }
LMFUSE_INLINE Vec lookup(const float* table, Words w) {
  return {_mm512_permutexvar_ps(w.v, _mm512_loadu_ps(table))};
}
LMFUSE_INLINE Vec e4m3(Words w) { return widen(_mm512_cvtepi32_epi8(w.v), e4m3_t{}); }

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
