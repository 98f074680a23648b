// A micro-kernel: the limits of the machine, as the best loops that reach them. What a benchmark
// calls "85 % of the copy bandwidth" is measured with these, in the same process.
#include "fetch.h"
#include "loops.h"
#include "tiles.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lmfuse::LMFUSE_ISA {
namespace {

// A line for each core is on its way from memory for about 100 ns, so that one stream needs
// 4 to 8 KB in flight.
constexpr int64_t kAhead = 8192 / sizeof(float), kLine = 64 / sizeof(float);

// The compiler must assume that somebody looks at the value.
template <class T>
LMFUSE_INLINE void used(const T& value) {
  asm volatile("" ::"m"(value));
}

LMFUSE_INLINE void prefetch_line(const float* x, int64_t at) {
  if (at % kLine == 0) __builtin_prefetch(x + at + kAhead, 0, 3);
}

// As many independent chains as latency x instructions per cycle asks for (4 x 2 for a
// multiply-add, 6 x 2 for vdpbf16ps) and the registers hold.
#if defined(__AVX512F__)
constexpr int kChains = 16;
#elif defined(__AVX2__)
constexpr int kChains = 12;
#else
constexpr int kChains = 4;
#endif

// Every chain starts from a value of its own that the compiler does not know, or it would keep one.
int64_t peak_fp32(int64_t rounds) {
  volatile float start = 1.0f;
  Vec s[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) s[i] = broadcast(start + static_cast<float>(i));
  const Vec factor = broadcast(start * 0.5f), term = broadcast(start);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) s[i] = fma(s[i], factor, term);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) used(s[i]);
  return rounds * kChains * kLanes * 2;
}

#if defined(LMFUSE_TILES)

// Four sums from two tiles of each operand: 4 x 16 cycles a round cover the latency of 52.
template <bool int8>
int64_t peak_dot(int64_t rounds) {
  alignas(64) static const char zeros[kTileRows * kTileBytes] = {};
  Tiles tiles;
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  tiles.load<4>(zeros, kTileBytes);
  tiles.load<5>(zeros, kTileBytes);
  tiles.load<6>(zeros, kTileBytes);
  tiles.load<7>(zeros, kTileBytes);
  for (int64_t r = 0; r < rounds; ++r) {
    if constexpr (int8) {
      tiles.dot_int8<0, 4, 6>();
      tiles.dot_int8<1, 4, 7>();
      tiles.dot_int8<2, 5, 6>();
      tiles.dot_int8<3, 5, 7>();
    } else {
      tiles.dot_bf16<0, 4, 6>();
      tiles.dot_bf16<1, 4, 7>();
      tiles.dot_bf16<2, 5, 6>();
      tiles.dot_bf16<3, 5, 7>();
    }
  }
  constexpr int64_t kDepth = int8 ? kTileBytes : kTileBytes / 2;
  return rounds * 4 * kTileRows * (kTileBytes / 4) * kDepth * 2;
}

#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)

// As assembler: GCC 12 keeps the sums of the functions from immintrin.h in memory, as it does those
// whose address `used` takes; either halves what is measured.
template <bool int8>
int64_t peak_dot(int64_t rounds) {
  const __m512i operand = _mm512_setzero_si512();
  __m512i s[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) s[i] = operand;
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      if constexpr (int8) {
        asm("vpdpbusd %1, %1, %0" : "+v"(s[i]) : "v"(operand));
      } else {
        asm("vdpbf16ps %1, %1, %0" : "+v"(s[i]) : "v"(operand));
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) asm volatile("" ::"v"(s[i]));
  return rounds * kChains * kLanes * (int8 ? 4 : 2) * 2;
}

#else

// No instruction of this level multiplies either type: they are widened, and fp32 counts.
template <bool int8>
int64_t peak_dot(int64_t rounds) {
  return peak_fp32(rounds);
}

#endif

}  // namespace

void limit_read(const ReadArgs& a, int64_t begin, int64_t end) {
  constexpr int kUnroll = 8, kFetched = 128 / sizeof(float);
  Vec s[kUnroll];
#pragma GCC unroll 8
  for (int i = 0; i < kUnroll; ++i) s[i] = broadcast(0.0f);
  for (int64_t at = begin * kPage; at < end * kPage; at += kUnroll * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) {
      if (i * kLanes % kFetched == 0)
        fetch_ahead(reinterpret_cast<const char*>(a.x + at + i * kLanes));
      s[i] = s[i] + load(a.x + at + i * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kUnroll; ++i) used(s[i]);
}

void limit_copy(const CopyArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kStep = 2 * kLanes;
  for (int64_t at = begin * kPage; at < end * kPage; at += kStep) {
    prefetch_line(a.x + at, 0);
    prefetch_line(a.x + at, kLanes);
    const Vec low = load(a.x + at), high = load(a.x + at + kLanes);
    if (a.stream) {
      stream(a.y + at, low, high);
    } else {
      store(a.y + at, low);
      store(a.y + at + kLanes, high);
    }
  }
  if (a.stream) stream_end();
}

void limit_peak(const PeakArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) switch (a.unit) {
      case Unit::fp32:
        a.operations[t] = peak_fp32(a.rounds);
        break;
      case Unit::bf16:
        a.operations[t] = peak_dot<false>(a.rounds);
        break;
      case Unit::int8:
        a.operations[t] = peak_dot<true>(a.rounds);
        break;
    }
}

}  // namespace lmfuse::LMFUSE_ISA
