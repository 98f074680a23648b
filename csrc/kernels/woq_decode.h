// Codes of a quantized panel (layout in kernels.h) as fp32, as bf16 or as bytes: what the tiles
// multiply. Declared micro-kernel: this file may name instructions.
#pragma once

#include "bytes.h"
#include "woq_block.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// The values of NormalFloat 4: quantiles of the normal distribution (QLoRA, appendix E).
alignas(64) constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Those of int4: codes, and codes less the middle of their range.
alignas(64) constexpr float kInt4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float kInt4Middle[16] = {-8, -7, -6, -5, -4, -3, -2, -1,
                                               0,  1,  2,  3,  4,  5,  6,  7};

constexpr int64_t nibble_shift(int64_t k) { return k % 2 * 16 + k / 2 * 4; }

// to[k][32] = f(words, i), code i of each word.
template <int kCodes, class F>
LMFUSE_INLINE void decode_words(const WoqBlock& block, float* to, F f) {
  const char* codes = block.codes;
  for (int64_t k = 0; k < block.k; k += kCodes, codes += 4 * kPanel, to += kCodes * kPanel) {
    fetch_codes(codes);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Words words = load_words(codes + 4 * v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCodes; ++i) store(to + i * kPanel + v * kLanes, f(words, i, v));
    }
  }
}

// The values themselves, each rounded once.
LMFUSE_INLINE void decode_f32(const WoqFormat& f, const WoqBlock& block, float* to) {
  const WoqScales s = load_scales(f, block, middle(f));
  const auto value = [&](Vec q, int v) LMFUSE_LAMBDA { return (q - s.zero[v]) * s.scale[v]; };
  const auto shifted = [&](Vec q, int v) LMFUSE_LAMBDA { return fma(q, s.scale[v], s.offset[v]); };
  const auto byte_at = [&](Words w, int i) LMFUSE_LAMBDA { return number(byte(w, i)); };
  const auto nibble_at = [&](Words w, int i)
                             LMFUSE_LAMBDA { return number(w >> nibble_shift(i) & 15u); };
  const bool offset = f.zero == WoqZero::offset;
  switch (f.kind) {
    case WoqKind::int8:
      if (offset)
        return decode_words<4>(block, to,
                               [&](Words w, int i, int v) { return shifted(byte_at(w, i), v); });
      return decode_words<4>(block, to,
                             [&](Words w, int i, int v) { return value(byte_at(w, i), v); });
    case WoqKind::fp8:
      return decode_words<4>(block, to,
                             [&](Words w, int i, int v) { return value(e4m3(w >> 8 * i), v); });
    case WoqKind::int4:
      if (offset)
        return decode_words<8>(block, to,
                               [&](Words w, int i, int v) { return shifted(nibble_at(w, i), v); });
      return decode_words<8>(block, to,
                             [&](Words w, int i, int v) { return value(nibble_at(w, i), v); });
    case WoqKind::nf4:
      return decode_words<8>(block, to, [&](Words w, int i, int v) {
        return value(lookup(kNf4, w >> nibble_shift(i)), v);
      });
  }
}

// Nibbles as bytes [k / 4][32][4]: of each 8 columns 0, 4, 1, 5 and then 2, 6, 3, 7.
LMFUSE_INLINE void decode_nibbles(const char* codes, int64_t k, char* to) {
  constexpr uint32_t kNibbles = 0x0f0f0f0f;
  for (; k > 0; k -= 8, codes += 4 * kPanel, to += 8 * kPanel) {
    fetch_codes(codes);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Words words = load_words(codes + 4 * v * kLanes);
      store_words(to + 4 * v * kLanes, words & kNibbles);
      store_words(to + 4 * (kPanel + v * kLanes), words >> 4 & kNibbles);
    }
  }
}

#if defined(__AVX512BF16__)

// Two indices of five bits into each word: what the fifth says makes no difference.
struct Bf16Table {
  alignas(64) uint16_t bits[32];
  constexpr explicit Bf16Table(const float (&values)[16]) : bits{} {
    for (int i = 0; i < 32; ++i) {
      const uint32_t x = __builtin_bit_cast(uint32_t, values[i % 16]);
      bits[i] = static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
    }
  }
};
constexpr Bf16Table kBf16Int4(kInt4), kBf16Int4Middle(kInt4Middle), kBf16Nf4(kNf4);

// Decoders of 64 bytes, 16 channels, to pairs of columns as gemm_tile.h takes bf16: codes less the
// middle, exactly (those of nf4 rounded). kColumns: of 128 bytes, all channels of a panel.
struct NibblesToBf16 {
  static constexpr int kColumns = 8, kPairs = 4;
  __m512i table;

  LMFUSE_INLINE explicit NibblesToBf16(const Bf16Table& values)
      : table(_mm512_load_si512(values.bits)) {}
  LMFUSE_INLINE void operator()(const char* codes, __m512i (&pairs)[kPairs]) const {
    const __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i)
      pairs[i] = _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * i), table);
  }
};

// Calls f with the decoder of a format.
template <class F>
LMFUSE_INLINE void with_bf16_decoder(const WoqFormat& f, F use) {
  switch (f.kind) {
    case WoqKind::int8:
      return use(BytesToBf16<true>());
    case WoqKind::fp8:
      return use(BytesToBf16<false>());
    case WoqKind::int4:
      return use(NibblesToBf16(middle(f) != 0.0f ? kBf16Int4Middle : kBf16Int4));
    case WoqKind::nf4:
      return use(NibblesToBf16(kBf16Nf4));
  }
}

// Columns in multiples of 8.
template <class Decoder>
LMFUSE_INLINE void decode_bf16(const Decoder& decode, const char* codes, int64_t k, char* to) {
  for (; k > 0; k -= Decoder::kColumns, codes += 128, to += Decoder::kPairs * 128) {
    fetch_codes(codes);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __m512i pairs[Decoder::kPairs];
      decode(codes + 64 * v, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < Decoder::kPairs; ++i)
        _mm512_storeu_si512(to + 128 * i + 64 * v, pairs[i]);
    }
  }
}

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
