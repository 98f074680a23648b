// How far ahead weights are fetched, and what the read bandwidth is measured with.
#pragma once

#include "simd.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// What will be read soon is fetched by the 128 bytes, so far ahead of `at`.
template <int kInto, int64_t... kDistances>
LMFUSE_INLINE void fetch_lines(const char* at) {
  ((__builtin_prefetch(at + kDistances, 0, kInto),
    __builtin_prefetch(at + kDistances + 64, 0, kInto)),
   ...);
}

// Weights are fetched into the second-level cache (2), whose misses do not hold the line buffers of
// the first (3); and again and again, for a Zen 4 drops what it has no room for. Of what a loop
// reads there that fetches once: linear layers of 4 rows 97 -> 112 %, int8 by int8 91 -> 115, int4
// by int8 81 -> 105. A request takes the second-level cache a cycle, so weights that lie in it are
// read at 70 GB/s, not 120 to 180.
//
// AMX machines read 10 to 15 % faster into the second level than into the first, but codes, whose
// decoding fills the time between two lines, 12 to 15 % faster 2 KB ahead into the first (1 and 4
// KB: 2 % slower).
#if defined(LMFUSE_TILES)
LMFUSE_INLINE void fetch_ahead(const char* at) { fetch_lines<2, 8192>(at); }
LMFUSE_INLINE void fetch_codes(const char* at) { fetch_lines<3, 2048>(at); }
#else
LMFUSE_INLINE void fetch_ahead(const char* at) {
  fetch_lines<2, 20480, 16384, 12288, 8192, 4096>(at);
}
LMFUSE_INLINE void fetch_codes(const char* at) { fetch_ahead(at); }
// Where arithmetic takes as long as memory, requests must be fewer: int4 by bf16 97 -> 103 %.
LMFUSE_INLINE void fetch_slow_codes(const char* at) {
  fetch_lines<2, 16384, 8192>(at);
  fetch_lines<3, 2048>(at);
}
#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
