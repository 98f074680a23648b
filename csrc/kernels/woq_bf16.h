// Rows of bf16 by the codes of a panel, by VDPBF16PS: the sums of a block stay in registers until
// they are scaled. Declared micro-kernel: this file may name instructions.
#pragma once

#include "woq_decode.h"

#if defined(__AVX512BF16__) && !defined(LMFUSE_TILES)

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int kFewBf16Rows = 8;   // 16 sums, and 8 decoded vectors
constexpr int kManyBf16Rows = 7;  // 14 sums, and as many of the blocks before

template <int R>
using Bf16Sums = __m512[R][2];

template <int R>
LMFUSE_INLINE void pair_of_columns(Bf16Sums<R>& acc, const XRows<R>& x, int64_t column, __m512i b0,
                                   __m512i b1) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512bh xr = bit_cast<__m512bh>(_mm512_set1_epi32(x.four(r, 2 * column)));
    acc[r][0] = _mm512_dpbf16_ps(acc[r][0], xr, bit_cast<__m512bh>(b0));
    acc[r][1] = _mm512_dpbf16_ps(acc[r][1], xr, bit_cast<__m512bh>(b1));
  }
}

template <int R>
LMFUSE_INLINE void clear(Bf16Sums<R>& acc) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
}

template <int R, bool kWide, class Sums>
LMFUSE_INLINE void add_bf16_block(const WoqStep& s, const WoqPlace& at, Sums& sums,
                                  const Bf16Sums<R>& acc) {
  add_block<R, kWide>(
      s, at, sums, [&](int r, int v) LMFUSE_LAMBDA { return Vec{acc[r][v]}; },
      [](int) LMFUSE_LAMBDA { return 1.0f; });
}

LMFUSE_INLINE const char* bf16_rows(const WoqStep& s) {
  return static_cast<const char*>(s.args.x) + s.row * s.args.lda * 2;
}

// 128 bytes of codes, decoded.
template <class Decoder>
struct DecodedBf16 {
  __m512i low[Decoder::kPairs], high[Decoder::kPairs];

  LMFUSE_INLINE void take(const Decoder& decode, const char* codes) {
    decode(codes, low);
    decode(codes + 64, high);
  }
};

// The next kBlocks blocks, of equal length, side by side: a chain of its own for each hides the
// latency of VDPBF16PS. Lines are fetched in their order all the same.
//
// From three rows on, bytes are decoded a step before they are multiplied: the products of some
// rows fill the queues of a Zen 4, and would let no decoding past (4 rows 35.8 -> 38.8 GB/s from
// the second-level cache, 8 rows 19.8 -> 24.7; 2 rows 51.6 -> 46.4).
template <int R, int kBlocks, class Decoder>
LMFUSE_INLINE void bf16_blocks(const WoqStep& s, const Decoder& decode, WoqBlocks& at) {
  constexpr int kPairs = Decoder::kPairs;
  constexpr bool kBefore = R > 2 && kPairs == 2;
  const int64_t first = (*at).index, k0 = (*at).k0, length = (*at).k;
  const int64_t begin = (*at).codes - 64;  // with the scales
  Bf16Sums<R> acc[kBlocks];
  const char* b[kBlocks];
  int64_t scales[kBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks; ++i, ++at) {
    const WoqBlock block(*at, s.panel);
    b[i] = block.codes;
    scales[i] = (*at).scales;
    clear<R>(acc[i]);
  }
  // The last of the blocks is to be read first from afar.
  const int64_t apart = b[kBlocks - 1] - b[0];
  const char* fetched = s.panel + begin + apart;
  XRows<R> x(bf16_rows(s) + 2 * k0, s.args.lda * 2);
  DecodedBf16<Decoder> now, next;
  if (kBefore) now.take(decode, b[0]);
  for (int64_t k = 0; k < length; k += Decoder::kColumns) {
    const bool last = k + Decoder::kColumns >= length;
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      fetch_slow_codes(fetched);
      fetched += 128;
      const char* codes = b[i];
      b[i] += 128;
      if (kBefore) {
        next.take(decode, i + 1 < kBlocks ? b[i + 1] : last ? codes : b[0]);
      } else {
        now.take(decode, codes);
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p)
        pair_of_columns<R>(acc[i], x, i * length + 2 * p, now.low[p], now.high[p]);
      if (kBefore) now = next;
    }
    x.advance(2 * Decoder::kColumns);
  }
  for (; fetched < b[kBlocks - 1] + apart; fetched += 128) fetch_slow_codes(fetched);
  WoqSums<R, (kBlocks > 1)> sums(s.sum, true);
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks; ++i)
    add_bf16_block<R, false>(s, {first + i, 0, 0, 0, scales[i], 0}, sums, acc[i]);
  sums.done();
}

// Few rows: codes are decoded as they are read.
template <int R, class Decoder>
void few_bf16_rows(const WoqStep& s, const Decoder& decoder) {
  // A block of bytes is 8 KB: four of them are too far apart.
  constexpr int kBlocks = R <= 2 && Decoder::kPairs == 4 ? 4 : R <= 4 ? 2 : 1;
  const Decoder decode = decoder;
  WoqBlocks at = s.at;
  while (at.whole(kBlocks)) bf16_blocks<R, kBlocks>(s, decode, at);
  while (at) bf16_blocks<R, 1>(s, decode, at);
}

// Many rows: the codes are decoded already.
template <int R>
void many_bf16_rows(const WoqStep& s) {
  const char* b = s.codes;
  Ahead ahead = s.ahead;
  WoqSums<R, true> sums(s.sum);
  for (WoqBlocks at = s.at; at; ++at) {
    const WoqBlock block(*at, s.panel);
    Bf16Sums<R> acc;
    clear<R>(acc);
    XRows<R> x(bf16_rows(s) + 2 * block.k0, s.args.lda * 2);
    for (int64_t k = block.k; k > 0; k -= 2, b += 128, x.advance(4)) {
      ahead.step();
      pair_of_columns<R>(acc, x, 0, _mm512_loadu_si512(b), _mm512_loadu_si512(b + 64));
    }
    add_bf16_block<R, true>(s, *at, sums, acc);
  }
  sums.done();
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA

#endif
