// The vector vocabulary: fp32 lanes, and loads and stores that convert from and to the three
// storage types. This header, its three siblings and the declared micro-kernels are the only text
// that names an instruction; kernels are written in these words.
//
//   Vec            kLanes fp32 values: + - * /, fma, min, max, sqrt, abs, round, select …
//   a < b          a Mask, for select; bits(m): a bit for each lane, the first lowest
//   Lanes          how many lanes of a step are in use: all() or the first n (a tail)
//   load(p, l)     p is float, bf16_t, f16_t, i8_t, e5m2_t or e4m3_t; lanes beyond l are 0
//   store(p, v, l) rounds to nearest even
//   store_low(p, a, b)   2 * kLanes values, where a subnormal bf16 may become 0
//   load_pairs     2 * kLanes bf16 -> first and second of each pair; split_pairs: of a register
//   interleave, deinterleave   even and odd elements together and apart
//   transpose(v)   kLanes vectors of kLanes 32-bit elements, rows to columns; bits are kept
//   load_turned    kTurned words of each of kLanes rows, rows to lanes
//   zip            2 * kLanes elements of each of two rows, in turn, as bf16
//   sum(v)         one fixed tree, whatever the data
//   Words          kLanes words of 32 bits: load_words, store_words, >>, &, number (to fp32)
//   byte(w, i)     byte i of each word, signed; top(w, i): times 2^24, for an i known late
//   lookup(t, w)   t[w & 15], of a table of 16 fp32 values
//   e4m3(w)        the value of the lowest byte
#pragma once

#include <cstdint>

#include "kernels.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

#define LMFUSE_INLINE inline __attribute__((always_inline))
#define LMFUSE_LAMBDA __attribute__((always_inline))

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};
struct i8_t {  // stores take integers in its range; the fp8 types have loads only
  int8_t bits;
};
struct e5m2_t {
  uint8_t bits;
};
struct e4m3_t {
  uint8_t bits;
};

template <class To, class From>
LMFUSE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif
