// A micro-kernel header: the eight tile registers of AMX, each 16 rows of 64 bytes. Like simd.h, it
// names instructions so that kernels need not. Included where LMFUSE_TILES may be used:
//
//   Tiles tiles(rows);               takes the tile unit for this thread until the end of the
//   scope;
//                                    tiles 0 to 5 (c and a) have so many rows, 6 and 7 (b) all 16
//   Tiles tiles(rows, 32);           rows of a have so many bytes, and b as many rows as that takes
//   tiles.zero<0>();
//   tiles.load<4>(a, stride);        rows of 64 bytes, stride bytes apart, any alignment
//   tiles.load<6>(b, stride);
//   tiles.load_past<4>(a, stride);   the same, leaving the first-level cache to others
//   tiles.dot_bf16<0, 4, 6>();       tile 0 += tile 4 * tile 6, see below
//   tiles.store<0>(c, stride);
//
//   dot_bf16<C, A, B>   fp32  c[m][n] += sum over k < 32 of a[m][k] * b[k / 2][2 n + k % 2]
//   dot_int8<C, A, B>   int32 c[m][n] += sum over k < 64 of a[m][k] * b[k / 4][4 n + k % 4], signed
//
// With LMFUSE_SOFT_TILES the same operations in plain C++, bit for bit, so that tile kernels are
// tested on machines without AMX.
#pragma once

#include "simd.h"

#if defined(LMFUSE_SOFT_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__))
#define LMFUSE_TILES 1

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64, kFirstB = 6;

#if defined(LMFUSE_SOFT_TILES)

class Tiles {
 public:
  explicit Tiles(int rows = kTileRows, int depth = kTileBytes) : rows_(rows), depth_(depth) {}
  Tiles(const Tiles&) = delete;

  template <int t>
  void zero() {
    __builtin_memset(data_[t], 0, sizeof(data_[t]));
  }
  template <int t>
  void load(const void* p, int64_t stride) {
    for (int r = 0; r < rows(t); ++r)
      __builtin_memcpy(data_[t][r], static_cast<const char*>(p) + r * stride, kTileBytes);
  }
  template <int t>
  void load_past(const void* p, int64_t stride) {
    load<t>(p, stride);
  }
  template <int t>
  void store(void* p, int64_t stride) {
    for (int r = 0; r < rows(t); ++r)
      __builtin_memcpy(static_cast<char*>(p) + r * stride, data_[t][r], kTileBytes);
  }

  // As the hardware rounds: even and odd k apart, each one chain of fused multiply-adds from zero,
  // then even + odd, then the sum onto c; subnormals count as zero at each step.
  template <int c, int a, int b>
  void dot_bf16() {
    for (int m = 0; m < rows_; ++m)
      for (int n = 0; n < kTileBytes / 4; ++n) {
        float part[2] = {0.0f, 0.0f};
        for (int k = 0; k < depth_ / 2; ++k) {
          const float x = bf16(get<uint16_t>(a, m, k));
          const float y = bf16(get<uint16_t>(b, k / 2, 2 * n + k % 2));
          part[k % 2] = flush(__builtin_fmaf(x, y, part[k % 2]));
        }
        set(c, m, n, flush(flush(get<float>(c, m, n)) + flush(part[0] + part[1])));
      }
  }

  template <int c, int a, int b>
  void dot_int8() {
    for (int m = 0; m < rows_; ++m)
      for (int n = 0; n < kTileBytes / 4; ++n) {
        uint32_t sum = get<uint32_t>(c, m, n);  // wraps around
        for (int k = 0; k < depth_; ++k)
          sum += static_cast<uint32_t>(get<int8_t>(a, m, k) * get<int8_t>(b, k / 4, 4 * n + k % 4));
        set(c, m, n, sum);
      }
  }

 private:
  int rows(int t) const { return t < kFirstB ? rows_ : depth_ / 4; }
  template <class T>
  T get(int t, int r, int i) const {
    T value;
    __builtin_memcpy(&value, data_[t][r] + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void set(int t, int r, int i, T value) {
    __builtin_memcpy(data_[t][r] + i * sizeof(T), &value, sizeof(T));
  }
  static float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0.0f : x; }
  static float bf16(uint16_t bits) {
    return flush(bit_cast<float>(static_cast<uint32_t>(bits) << 16));
  }

  int rows_, depth_;
  char data_[kTiles][kTileRows][kTileBytes];
};

#else

// Written as assembler because the compilers' own functions take the number of a tile as a literal
// only, not as a template argument.
class Tiles {
 public:
  LMFUSE_INLINE explicit Tiles(int rows = kTileRows, int depth = kTileBytes) {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < kTiles; ++t) {
      const bool a = t == kFirstB - 2 || t == kFirstB - 1;
      config.row_bytes[t] = static_cast<uint16_t>(a ? depth : kTileBytes);
      config.rows[t] = static_cast<uint8_t>(t < kFirstB ? rows : depth / 4);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  LMFUSE_INLINE ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int t>
  LMFUSE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  LMFUSE_INLINE void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  LMFUSE_INLINE void load_past(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  LMFUSE_INLINE void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  LMFUSE_INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int c, int a, int b>
  LMFUSE_INLINE void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA

#endif
