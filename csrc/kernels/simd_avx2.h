// The vocabulary of simd.h on AVX2, FMA and F16C: 8 lanes. AVX2 masks 32-bit lanes only, so tails
// of 16-bit types go through a small buffer.
#pragma once

#include <immintrin.h>

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kLanes = 8;

struct Vec {
  __m256 v;
};
struct Mask {
  __m256 v;
};

struct Lanes {
  int64_t n;
  static LMFUSE_INLINE Lanes all() { return {kLanes}; }
  static LMFUSE_INLINE Lanes first(int64_t n) { return {n}; }
  LMFUSE_INLINE __m256i mask() const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

LMFUSE_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
LMFUSE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LMFUSE_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
LMFUSE_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
LMFUSE_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
LMFUSE_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LMFUSE_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
LMFUSE_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.v)); }
LMFUSE_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
LMFUSE_INLINE Vec keep(Vec a, Lanes l) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(l.mask()))};
}

// In two halves, so that neither factor leaves the range of exponents.
LMFUSE_INLINE Vec scale2(Vec a, Vec n) {
  const __m256i e = _mm256_cvtps_epi32(n.v);
  const __m256i e1 = _mm256_srai_epi32(e, 1), e2 = _mm256_sub_epi32(e, e1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e1, bias), 23));
  const __m256 f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e2, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, f1), f2)};
}

LMFUSE_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
LMFUSE_INLINE float max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

LMFUSE_INLINE Vec widen(__m128i bits, bf16_t) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
LMFUSE_INLINE Vec widen(__m128i bits, f16_t) { return {_mm256_cvtph_ps(bits)}; }

LMFUSE_INLINE __m128i narrow(Vec a, bf16_t) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
LMFUSE_INLINE __m128i narrow(Vec a, f16_t) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LMFUSE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
LMFUSE_INLINE Vec load(const float* p, Lanes l) { return {_mm256_maskload_ps(p, l.mask())}; }
LMFUSE_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
LMFUSE_INLINE void store(float* p, Vec a, Lanes l) { _mm256_maskstore_ps(p, l.mask(), a.v); }

template <class T>
LMFUSE_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
LMFUSE_INLINE Vec load(const T* p, Lanes l) {
  alignas(16) T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, l.n * sizeof(T));
  return load(buffer);
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a, Lanes l) {
  alignas(16) T buffer[kLanes];
  store(buffer, a);
  __builtin_memcpy(p, buffer, l.n * sizeof(T));
}

LMFUSE_INLINE void stream(float* p, Vec a, Vec b) {
  _mm256_stream_ps(p, a.v);
  _mm256_stream_ps(p + kLanes, b.v);
}
template <class T>
LMFUSE_INLINE void stream(T* p, Vec a, Vec b) {
  _mm256_stream_si256(
      reinterpret_cast<__m256i*>(p),
      _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(a, T{})), narrow(b, T{}), 1));
}
LMFUSE_INLINE void stream_end() { _mm_sfence(); }

LMFUSE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  const __m256 low = _mm256_permute2f128_ps(a.v, b.v, 0x20);   // a0 … a3 b0 … b3
  const __m256 high = _mm256_permute2f128_ps(a.v, b.v, 0x31);  // a4 … a7 b4 … b7
  even = {_mm256_shuffle_ps(low, high, 0x88)};
  odd = {_mm256_shuffle_ps(low, high, 0xdd)};
}
LMFUSE_INLINE void interleave(Vec even, Vec odd, Vec& a, Vec& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v);   // e0 o0 e1 o1 | e4 …
  const __m256 high = _mm256_unpackhi_ps(even.v, odd.v);  // e2 o2 e3 o3 | e6 …
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}

// v[i] = the words at row[0 … kLanes - 1] + offset + 4 i.
constexpr int64_t kTurned = kLanes / 2;
LMFUSE_INLINE void load_turned(const char* const* row, int64_t offset, Vec (&v)[kTurned]) {
  __m256 a[kTurned], b[kTurned];
  const auto half = [&](int r) LMFUSE_LAMBDA {
    return _mm_loadu_ps(reinterpret_cast<const float*>(row[r] + offset));
  };
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
    a[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(half(r)), half(r + 4), 1);
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    v[2 * j] = {_mm256_shuffle_ps(b[j], b[j + 2], 0x44)};
    v[2 * j + 1] = {_mm256_shuffle_ps(b[j], b[j + 2], 0xee)};
  }
}

LMFUSE_INLINE void split_pairs(Vec pairs, Vec& first, Vec& second) {
  const __m256i bits = _mm256_castps_si256(pairs.v);
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))};
}
LMFUSE_INLINE void load_pairs(const bf16_t* p, Vec& first, Vec& second) {
  split_pairs(load(reinterpret_cast<const float*>(p)), first, second);
}

LMFUSE_INLINE void transpose(Vec (&v)[kLanes]) {
  __m256 a[kLanes], b[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {  // 2 by 2
    a[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {  // 4 by 4
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {  // halves
    v[i] = {_mm256_permute2f128_ps(b[i], b[i + 4], 0x20)};
    v[i + 4] = {_mm256_permute2f128_ps(b[i], b[i + 4], 0x31)};
  }
}

LMFUSE_INLINE void zip(const bf16_t* a, const bf16_t* b, bf16_t* to) {
  for (int64_t i = 0; i < 2 * kLanes; ++i) {
    to[2 * i] = a[i];
    to[2 * i + 1] = b[i];
  }
}

// fp8 by way of fp16: e5m2 is its upper byte; e4m3, but for NaN, has an exponent 8 lower there.
LMFUSE_INLINE Vec widen(__m128i bytes, i8_t) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
LMFUSE_INLINE Vec widen(__m128i bytes, e5m2_t) {
  return {_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8))};
}
LMFUSE_INLINE Vec widen(__m128i bytes, e4m3_t) {
  const __m128i x = _mm_cvtepi8_epi16(bytes), most = _mm_set1_epi16(0x7f);
  const __m128i rest = _mm_and_si128(x, most);
  const __m128i magnitude =
      _mm_blendv_epi8(_mm_slli_epi16(rest, 7), _mm_set1_epi16(0x7e00), _mm_cmpeq_epi16(rest, most));
  const __m128i sign = _mm_and_si128(x, _mm_set1_epi16(-0x8000));
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, magnitude)), _mm256_set1_ps(256.0f))};
}
#define LMFUSE_LOAD_BYTES(T)                                                 \
  LMFUSE_INLINE Vec load(const T* p) {                                       \
    return widen(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), T{}); \
  }                                                                          \
  LMFUSE_INLINE Vec load(const T* p, Lanes l) {                              \
    T buffer[kLanes] = {};                                                   \
    __builtin_memcpy(buffer, p, l.n * sizeof(T));                            \
    return load(buffer);                                                     \
  }
LMFUSE_LOAD_BYTES(i8_t)
LMFUSE_LOAD_BYTES(e5m2_t)
LMFUSE_LOAD_BYTES(e4m3_t)
#undef LMFUSE_LOAD_BYTES
LMFUSE_INLINE void store(i8_t* p, Vec a) {
  const __m256i words = _mm256_cvtps_epi32(a.v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}

template <class T>
LMFUSE_INLINE void store_low(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

struct Words {
  __m256i v;
};
LMFUSE_INLINE Words load_words(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
LMFUSE_INLINE void store_words(void* p, Words w) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), w.v);
}
LMFUSE_INLINE Words operator>>(Words w, int bits) { return {_mm256_srli_epi32(w.v, bits)}; }
LMFUSE_INLINE Words operator<<(Words w, int bits) {
  return {_mm256_sll_epi32(w.v, _mm_cvtsi32_si128(bits))};
}
LMFUSE_INLINE Words operator&(Words w, uint32_t mask) {
  return {_mm256_and_si256(w.v, _mm256_set1_epi32(static_cast<int>(mask)))};
}
LMFUSE_INLINE Words byte(Words w, int i) {
  return {_mm256_srai_epi32(_mm256_slli_epi32(w.v, 24 - 8 * i), 24)};
}
LMFUSE_INLINE Words top(Words w, int i) {
  const __m256i first =
      _mm256_broadcastsi128_si256(_mm_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080));
  return {_mm256_shuffle_epi8(w.v, _mm256_add_epi32(first, _mm256_set1_epi32(i << 24)))};
}
LMFUSE_INLINE Vec number(Words w) { return {_mm256_cvtepi32_ps(w.v)}; }
LMFUSE_INLINE Vec lookup(const float* table, Words w) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), w.v);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), w.v);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(w.v, 28)))};
}
LMFUSE_INLINE Vec e4m3(Words w) {
  const __m256i bytes = _mm256_shuffle_epi8(
      w.v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                            12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  return widen(
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)),
      e4m3_t{});
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
