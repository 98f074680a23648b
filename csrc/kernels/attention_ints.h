// The products of attention over int8 keys and values where VPDPBUSD multiplies bytes: queries and
// weights as integers of 16 bits, with a unit for each row, in two products of bytes. Sums of
// integers are exact, so a row's bits are the same whichever of these kernels adds them; int32
// holds 32639 * 128 * 256 (dimensions, or keys of a chunk). Declared micro-kernel: this file may
// name instructions.
#pragma once

#include "attention_few.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

#if defined(__AVX512VNNI__) && !defined(LMFUSE_TILES)
#define LMFUSE_INTS 1

constexpr int64_t kMostInts = 512;  // products in a sum that int32 holds

// Numbers as integers q of at most kLargest: x = unit q. VPDPBUSD takes one unsigned factor, keys
// and values plus 128: what that adds to a sum, 128 times that of q, is in the last word of a row.
template <class F>
LMFUSE_INLINE float split_row(int64_t n, F number, split_t* to, int64_t row) {
  constexpr float kLargest = 127 * 256 + 127;
  Vec top = broadcast(0.0f), odd = top;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = number(i);
    top = max(top, abs(x));
    odd = fma(x, broadcast(0.0f), odd);  // NaN where x is not finite
  }
  const float most = max(top), size = most > 0x1p-110f ? most : 0x1p-110f;
  const Vec inverse = broadcast(kLargest / size);
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
  const __m256i low = _mm256_set1_epi64x(static_cast<int64_t>(0x8080808000000000));
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512i q = _mm512_cvtps_epi32((number(i) * inverse).v);
    total = _mm512_add_epi32(total, q);
    const __m256i raised = _mm512_cvtepi32_epi16(_mm512_add_epi32(q, _mm512_set1_epi32(128)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_xor_si256(_mm256_shuffle_epi8(raised, order), low));
  }
  const int raised = _mm512_reduce_add_epi32(_mm512_slli_epi32(total, 7));
  __builtin_memcpy(to + row - 2, &raised, sizeof(raised));
  return size / kLargest + sum(odd);
}

// sum += b x, four products in each word. As assembler: see woq_int8.h.
LMFUSE_INLINE void dot_bytes(__m512i& sum, __m512i b, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(x));
}
LMFUSE_INLINE void dot_bytes(__m512i& sum, __m512i b, const float& x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(x));
}
LMFUSE_INLINE __m512i raise(__m512i bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
}
LMFUSE_INLINE __m512i word_at(const void* p) {
  int bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return _mm512_set1_epi32(bits);
}
LMFUSE_INLINE __m512i join_bytes(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// 32 bytes of each of four rows, raised, and in turn.
struct ZipBytes {
  __m512i order[2];

  LMFUSE_INLINE ZipBytes() {
    alignas(64) uint8_t first[64];
    for (int i = 0; i < 64; ++i) first[i] = static_cast<uint8_t>(i / 4 + i % 4 * 32);
    order[0] = _mm512_load_si512(first);
    order[1] = _mm512_add_epi8(order[0], _mm512_set1_epi8(16));
  }
  LMFUSE_INLINE void operator()(const char* const* row, int64_t offset, __m512i (&v)[2]) const {
    const auto half = [&](int r) LMFUSE_LAMBDA {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[r] + offset));
    };
    const auto two = [&](int r) LMFUSE_LAMBDA {
      return raise(_mm512_inserti64x4(_mm512_castsi256_si512(half(r)), half(r + 1), 1));
    };
    const __m512i a = two(0), b = two(2);
    v[0] = _mm512_permutex2var_epi8(a, order[0], b);
    v[1] = _mm512_permutex2var_epi8(a, order[1], b);
  }
};

// Panel p of the keys: to[width / 4][32][4], raised.
inline void pack_keys(KvType type, const ChunkRows& rows, int64_t panel, int64_t dim, i8_t* stage,
                      i8_t* to, RowsAhead ahead) {
  const int64_t width = key_width<split_t>(dim), first = panel * kPanel;
  const bool direct = dim == width && rows.count - first >= kPanel;
  const char* from[kPanel];
  for (int64_t r = 0; r < kPanel; ++r) {
    from[r] = reinterpret_cast<const char*>(stage + r * width);
    if (direct) {
      from[r] = rows.row[first + r];
    } else if (first + r < rows.count) {
      ahead.rows(r, 1);
      widen_row(type, rows.row[first + r], dim, width, stage + r * width);
    } else {
      for (int64_t i = 0; i < width; ++i) stage[r * width + i] = i8_t{};
    }
  }
  for (int64_t r = 0; r < kPanel; r += kLanes)
    for (int64_t i = 0; i < width; i += 4 * kTurned) {
      if (direct && i % 64 == 0) ahead.lines(r, kLanes, i);
      Vec v[kTurned];
      load_turned(from + r, i, v);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTurned; ++j)
        _mm512_storeu_si512(to + i * kPanel + (j * kPanel + r) * 4, raise(bit_cast<__m512i>(v[j])));
    }
}

// The values of positions [first, first + kDotStep): to[width / 32][kKeyChunk / 4][32][4], raised.
inline void pack_values(KvType type, const ChunkRows& rows, int64_t first, int64_t dim, i8_t* stage,
                        i8_t* to, int64_t panel_stride, RowsAhead ahead) {
  const int64_t width = round_up(dim, kPanel);
  const ZipBytes zip;
  for (int64_t k = first; k < first + kDotStep; k += 4) {
    ahead.rows(k - first, 4);
    const char* row[4];
    for (int64_t j = 0; j < 4; ++j) {
      i8_t* mine = stage + j * width;
      row[j] = reinterpret_cast<const char*>(mine);
      if (k + j >= rows.count) {
        for (int64_t i = 0; i < width; ++i) mine[i] = i8_t{};
      } else if (dim == width) {
        row[j] = rows.row[k + j];
      } else {
        widen_row(type, rows.row[k + j], dim, width, mine);
      }
    }
    for (int64_t d = 0; d < width; d += kPanel) {
      __m512i v[2];
      zip(row, d, v);
      i8_t* at = to + d / kPanel * panel_stride + k * kPanel;
      _mm512_storeu_si512(at, v[0]);
      _mm512_storeu_si512(at + 64, v[1]);
    }
  }
}

// acc[rows][32] = x[rows][k] b[k / 4][32][4].
struct IntTile {
  using Input = split_t;
  static constexpr int kRows = 6;  // 24 sums of 32 registers

  explicit IntTile(int64_t rows) : rows_(rows) {}

  LMFUSE_INLINE void run(const split_t* x, int64_t lda, const char* b, int64_t k, float* acc, bool,
                         Ahead) {
    with_count<kRows>(rows_, [&](auto r) { run_rows<decltype(r)::value>(x, lda, b, k, acc); });
  }
  TileRows rows() const { return {rows_, rows_, 0}; }

 private:
  int64_t rows_;

  template <int R>
  static void run_rows(const split_t* x, int64_t lda, const char* b, int64_t k, float* acc) {
    __m512i high[R][2], low[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) high[r][v] = low[r][v] = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 4, b += 128) {
      const __m512i v[2] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 64)};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i upper = word_at(x + r * lda + i), lower = word_at(x + r * lda + i + 2);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) dot_bytes(high[r][j], v[j], upper);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) dot_bytes(low[r][j], v[j], lower);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        _mm512_storeu_ps(
            acc + r * kPanel + j * kLanes,
            _mm512_cvtepi32_ps(_mm512_sub_epi32(join_bytes(high[r][j], low[r][j]),
                                                word_at(x + r * lda + lda - 2))));
  }
};

// As IntTile, for few rows, from where keys and values lie.
template <>
class FewRows<IntTile> {
 public:
  using Ahead = LinesAhead;
  static constexpr int64_t kRows = kFewRows;

  static void scores(KvType, bool, const FewPart& keys, int64_t width, const split_t* queries,
                     int64_t count, i8_t* stage, i8_t* turned, float* scores, LinesAhead& ahead) {
    const bool direct = keys.bytes == width;
    const int64_t height = block_height(count);
    PanelRows<i8_t> rows;
    for (int64_t first = 0; first < keys.rows->count; first += kPanel) {
      if (direct) {
        rows.gather(keys, first, 0, width, stage);
      } else {
        rows.widen(KvType::i8, keys, first, 0, width, stage, (keys.bytes + 63) / 64, ahead);
      }
      for (int64_t r = 0; r < count; r += height)
        with_count<kBlock>(count - r < height ? count - r : height, [&](auto n) {
          score<decltype(n)::value>(rows, width / 4, queries + 2 * r, keys.rows->scale + first,
                                    scores + kRows * first + r * kPanel, direct && r == 0, ahead);
        });
    }
  }

  static void values(KvType, const FewPart& values, int64_t width, const split_t* weights,
                     int64_t weights_row, int64_t count, i8_t* stage, i8_t*, float* products,
                     LinesAhead& ahead) {
    const bool direct = values.bytes == width;
    const int64_t height = block_height(count);
    PanelRows<i8_t> rows;
    for (int64_t first = 0; first < values.rows->count; first += kPanel) {
      const int64_t left = values.rows->count - first;
      const bool last = left <= kPanel;
      if (direct) {
        rows.find(values, first, 0, width, stage);
      } else {
        rows.widen(KvType::i8, values, first, 0, width, stage,
                   last ? 0 : (values.bytes + 63) / 64, ahead);
      }
      for (int64_t r = 0; r < count; r += height)
        with_count<kBlock>(count - r < height ? count - r : height, [&](auto n) {
          weigh<decltype(n)::value>(rows, smaller(left, kPanel), width, weights + r * weights_row,
                                    first, weights_row,
                                    {first == 0, last, direct && r == 0 && !last},
                                    products + r * kPanel, count * kPanel, ahead);
        });
    }
  }

 private:
  static constexpr int64_t kBlock = 6;

  static int64_t block_height(int64_t count) {
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    return (count + blocks - 1) / blocks;
  }

  template <int R>
  __attribute__((noinline)) static void score(const PanelRows<i8_t>& rows, int64_t words,
                                              const split_t* queries, const float* scale,
                                              float* to, bool fetches, LinesAhead& ahead) {
    const auto* q = reinterpret_cast<const float*>(queries);
    const float* raised = q + (2 * words + 15) * kFewRows;
    for (int64_t k = 0; k < kPanel; k += kLanes) {
      __m512i high[R], low[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
      for (int64_t i = 0; i < words; i += kTurned) {
        Vec v[kTurned];
        load_turned(rows.row + k, rows.offset + 4 * i, v);
        const float* at = q + 2 * i * kFewRows;
#pragma GCC unroll 16
        for (int64_t j = 0; j < kTurned; ++j) {
          const __m512i b = raise(bit_cast<__m512i>(v[j]));
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            dot_bytes(high[r], b, at[2 * j * kFewRows + r]);
            dot_bytes(low[r], b, at[(2 * j + 1) * kFewRows + r]);
          }
        }
        if (fetches) ahead.fetch<kLanes * kTurned * 4 / 64>();
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i sum = _mm512_sub_epi32(join_bytes(high[r], low[r]), word_at(raised + r));
        store(to + r * kPanel + k, Vec{_mm512_cvtepi32_ps(sum)} * load(scale + k));
      }
    }
  }

  template <int R>
  __attribute__((noinline)) static void weigh(const PanelRows<i8_t>& rows, int64_t keys,
                                              int64_t width, const split_t* weights, int64_t first,
                                              int64_t weights_row, PanelOf panel, float* to,
                                              int64_t next_columns, LinesAhead& ahead) {
    const split_t* w = weights + first;
    const split_t* raised = weights + weights_row - 2;
    const ZipBytes zip;
    for (int64_t d = 0; d < width; d += kPanel, to += next_columns) {
      __m512i high[R][2], low[R][2];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) high[r][j] = low[r][j] = _mm512_setzero_si512();
      for (int64_t k = 0; k < keys; k += 4) {
        if (panel.fetches) ahead.fetch<2>();
        __m512i v[2];
        zip(rows.row + k, rows.offset + d, v);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512i upper = word_at(w + r * weights_row + k);
          const __m512i lower = word_at(w + r * weights_row + k + 2);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) dot_bytes(high[r][j], v[j], upper);
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) dot_bytes(low[r][j], v[j], lower);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          float* at = to + r * kPanel + j * kLanes;
          __m512i sum = join_bytes(high[r][j], low[r][j]);
          sum = panel.first ? _mm512_sub_epi32(sum, word_at(raised + r * weights_row))
                            : _mm512_add_epi32(sum, _mm512_loadu_si512(at));
          _mm512_storeu_ps(at, panel.last ? _mm512_cvtepi32_ps(sum) : _mm512_castsi512_ps(sum));
        }
    }
  }
};

#endif

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
