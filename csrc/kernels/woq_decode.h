// Blocks of a quantized panel (layout in kernels.h) as fp32, as bf16 or as bytes: what the tiles
// multiply. Declared micro-kernel: this file may name instructions.
#pragma once

#include "gemm_tile.h"

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

constexpr int64_t nibble_shift(int64_t k) { return k % 2 * 16 + k / 2 * 4; }

// Where in a panel a block lies: columns [k0, k0 + k), which share the scales.
struct WoqPlace {
  int64_t index, k0, k, group, scales, codes;
};

// The blocks of a format, one after the other: divisions take longer than small blocks.
class WoqBlocks {
 public:
  LMFUSE_INLINE explicit WoqBlocks(const WoqFormat& f)
      : columns_(woq_block(f)),
        group_(f.group),
        width_(f.packed_k()),
        scale_bytes_(f.scale_bytes()),
        code_bytes_(f.code_bytes(columns_)),
        at_{0, 0, columns_ < f.k ? columns_ : width_, 0, 0, scale_bytes_} {}

  LMFUSE_INLINE explicit operator bool() const { return at_.k0 < width_; }
  LMFUSE_INLINE const WoqPlace& operator*() const { return at_; }
  LMFUSE_INLINE void operator++() {
    ++at_.index;
    at_.k0 += columns_;
    at_.codes += code_bytes_;
    if (at_.k0 == (at_.group + 1) * group_) {
      ++at_.group;
      at_.scales = at_.codes;
      at_.codes += scale_bytes_;
    }
    if (width_ - at_.k0 < columns_) at_.k = width_ - at_.k0;
  }

 private:
  int64_t columns_, group_, width_, scale_bytes_, code_bytes_;
  WoqPlace at_;
};

// A block of one panel.
struct WoqBlock {
  int64_t k0, k;
  const char *scales, *codes;

  LMFUSE_INLINE WoqBlock(const WoqPlace& at, const char* panel)
      : k0(at.k0), k(at.k), scales(panel + at.scales), codes(panel + at.codes) {}
};

// value = (code - zero) * scale + offset
struct WoqScales {
  Vec scale[kVecs], zero[kVecs], offset[kVecs];
};

// shift: what the codes were raised by.
LMFUSE_INLINE WoqScales load_scales(const WoqFormat& f, const WoqBlock& block, float shift) {
  WoqScales s;
  with_type(f.scale_type, [&](auto t) LMFUSE_LAMBDA {
    const auto* from = reinterpret_cast<const decltype(t)*>(block.scales);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      s.scale[v] = load(from + v * kLanes);
      s.zero[v] = broadcast(shift);
      s.offset[v] = broadcast(0.0f);
      if (f.zero == WoqZero::zero) s.zero[v] = load(from + kPanel + v * kLanes) + broadcast(shift);
      if (f.zero == WoqZero::offset) s.offset[v] = load(from + kPanel + v * kLanes);
    }
  });
  return s;
}

// The next lines of the panel: strictly one after the other. Where decoding fills the time between
// two lines, AMX machines read 12 to 15 % faster 2 KB ahead than 8 (1 and 4 KB: 2 % slower).
LMFUSE_INLINE void fetch_ahead(const char* codes) {
#if defined(LMFUSE_TILES)
  constexpr int64_t kDistance = 2048;
#else
  constexpr int64_t kDistance = Ahead::kDistance;
#endif
  __builtin_prefetch(codes + kDistance);
  __builtin_prefetch(codes + kDistance + 64);
}

constexpr float middle(const WoqFormat& f) {
  return f.kind == WoqKind::int4 && f.zero == WoqZero::none ? 8.0f : 0.0f;
}

// to[k][32] = f(words, i), code i of each word.
template <int kCodes, class F>
LMFUSE_INLINE void decode_words(const WoqBlock& block, float* to, F f) {
  const char* codes = block.codes;
  for (int64_t k = 0; k < block.k; k += kCodes, codes += 4 * kPanel, to += kCodes * kPanel) {
    fetch_ahead(codes);
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

// Codes as bytes [k / 4][32][4]; of each 8 columns of nibbles, 0, 4, 1, 5 and then 2, 6, 3, 7.
LMFUSE_INLINE const char* decode_int8(const WoqFormat& f, const WoqBlock& block, char* to) {
  if (!f.nibbles()) return block.codes;
  constexpr uint32_t kNibbles = 0x0f0f0f0f;
  const char *codes = block.codes, *begin = to;
  for (int64_t k = 0; k < block.k; k += 8, codes += 4 * kPanel, to += 8 * kPanel) {
    fetch_ahead(codes);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Words words = load_words(codes + 4 * v * kLanes);
      store_words(to + 4 * v * kLanes, words & kNibbles);
      store_words(to + 4 * (kPanel + v * kLanes), words >> 4 & kNibbles);
    }
  }
  return begin;
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
constexpr float kInt4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kInt4Middle[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr Bf16Table kBf16Int4(kInt4), kBf16Int4Middle(kInt4Middle), kBf16Nf4(kNf4);

// Decoders of 8 columns, to pairs of columns as gemm_tile.h takes bf16: codes less the middle,
// exactly (those of nf4 rounded).
struct NibblesToBf16 {
  static constexpr int64_t kBytes = 4 * kPanel;
  __m512i table;

  LMFUSE_INLINE explicit NibblesToBf16(const Bf16Table& values)
      : table(_mm512_load_si512(values.bits)) {}
  LMFUSE_INLINE void operator()(const char* codes, char* to) const {
    fetch_ahead(codes);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m512i words = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        _mm512_storeu_si512(to + 128 * i + 64 * v,
                            _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * i), table));
    }
  }
};

// A byte shifted to the top of a word is 2^24 times its value; as fp32 its lower half is zero, and
// the exponent of its upper half, if it is not zero as a whole, is 24 too large.
struct Int8ToBf16 {
  static constexpr int64_t kBytes = 8 * kPanel;
  __m512i to_top[4];

  LMFUSE_INLINE Int8ToBf16() {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)  // of each 16 bytes: 0, 4, 8, 12, and zeros
      to_top[i] = _mm512_add_epi32(
          _mm512_broadcast_i32x4(_mm_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080)),
          _mm512_set1_epi32(i << 24));
  }
  LMFUSE_INLINE __m512i pair(__m512i words, int first) const {
    const auto wide = [&](int i) LMFUSE_LAMBDA {
      return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(words, to_top[i])));
    };
    const __m512i both = _mm512_or_si512(_mm512_srli_epi32(wide(first), 16), wide(first + 1));
    return _mm512_subs_epu16(both, _mm512_set1_epi16(24 << 7));
  }
  LMFUSE_INLINE void operator()(const char* codes, char* to) const {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k, codes += 128, to += 256) {
      fetch_ahead(codes);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m512i words = _mm512_loadu_si512(codes + 64 * v);
        _mm512_storeu_si512(to + 64 * v, pair(words, 0));
        _mm512_storeu_si512(to + 128 + 64 * v, pair(words, 2));
      }
    }
  }
};

// By way of fp32: four channels of four columns at a time.
struct Fp8ToBf16 {
  static constexpr int64_t kBytes = 8 * kPanel;

  LMFUSE_INLINE void operator()(const char* codes, char* to) const {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k, codes += 128, to += 256) {
      fetch_ahead(codes);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const auto* from = reinterpret_cast<const e4m3_t*>(codes + 64 * v);
        Vec halves[2], first, second;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
          halves[h] = bit_cast<Vec>(_mm512_cvtne2ps_pbh(load(from + 32 * h + 16).v,  //
                                                        load(from + 32 * h).v));
        deinterleave(halves[0], halves[1], first, second);
        store(reinterpret_cast<float*>(to + 64 * v), first);
        store(reinterpret_cast<float*>(to + 128 + 64 * v), second);
      }
    }
  }
};

// Calls f with the decoder of a format.
template <class F>
LMFUSE_INLINE void with_bf16_decoder(const WoqFormat& f, F use) {
  switch (f.kind) {
    case WoqKind::int8:
      return use(Int8ToBf16());
    case WoqKind::fp8:
      return use(Fp8ToBf16());
    case WoqKind::int4:
      return use(NibblesToBf16(middle(f) != 0.0f ? kBf16Int4Middle : kBf16Int4));
    case WoqKind::nf4:
      return use(NibblesToBf16(kBf16Nf4));
  }
}

// Columns in multiples of 8.
template <class Decoder>
LMFUSE_INLINE void decode_bf16(const Decoder& decode, const char* codes, int64_t k, char* to) {
  for (; k > 0; k -= 8, codes += Decoder::kBytes, to += 16 * kPanel) decode(codes, to);
}

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
