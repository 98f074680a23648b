// Attention over int8 keys and values in integers, where VPDPBUSD multiplies bytes: queries and
// weights become integers of 16 bits, with a unit for each row (of weights: for each chunk), in two
// products of bytes. Nothing is widened, and half as many words turn rows to lanes as of bf16. Sums
// of integers are exact, so that a row's bits are those of any of these kernels. Declared
// micro-kernel: this file may name instructions.
//
// A weight is off by at most 2^-16 of the largest one of its chunk, a query by as much of its
// largest element; weights of bf16 are off by 2^-9 of themselves.
#pragma once

#include "attention_few.h"

#if defined(__AVX512VNNI__) && !defined(LMFUSE_TILES)
#define LMFUSE_INTS 1

namespace lmfuse::LMFUSE_ISA {
namespace {

// Products in a sum that int32 holds: 32639 * 128 * 512 < 2^31. kKeyChunk is less.
constexpr int64_t kMostInts = 512;

// The larger magnitudes, NaN being the largest: as integers.
LMFUSE_INLINE Vec larger(Vec most, Vec x) {
  return bit_cast<Vec>(_mm512_max_epi32(bit_cast<__m512i>(most), bit_cast<__m512i>(abs(x))));
}

LMFUSE_INLINE __m512i word_at(const void* p) {
  int bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

// A row x = unit q of integers q, |q| <= 32639. Its last two words are the unit, NaN if some of x
// is not finite, and what corrects a sum of its products with bytes plus 128: -128 times that of q.
constexpr int64_t kUnitAt = -4, kCorrectionAt = -2;

// n numbers, a multiple of 32, of magnitudes up to one of `most`.
template <class F>
LMFUSE_INLINE void split_row(int64_t n, Vec most, F number, split_t* to, int64_t row) {
  constexpr float kLargest = 127 * 256 + 127, kLeast = 0x1p-110f;  // has a finite inverse
  const float top = bit_cast<float>(_mm512_reduce_max_epi32(bit_cast<__m512i>(most)));
  const float size = top < kLeast ? kLeast : top;
  const float unit = size / kLargest + (size - size);
  const Vec inverse = broadcast(kLargest / size), half = broadcast(128.0f);
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
  const __m512i fours = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i low = _mm512_set1_epi64(static_cast<int64_t>(0x8080808000000000));
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    // q + 128: its higher byte is that of q, its lower one has the other sign bit.
    const __m512i a = _mm512_cvtps_epi32(fma(number(i), inverse, half).v);
    const __m512i b = _mm512_cvtps_epi32(fma(number(i + kLanes), inverse, half).v);
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(a, b));
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_packs_epi32(a, b), order);
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_permutexvar_epi64(fours, bytes), low));
  }
  const auto of_raised = static_cast<uint32_t>(_mm512_reduce_add_epi32(sum));
  const uint32_t correction = (static_cast<uint32_t>(128 * n) - of_raised) * 128;  // modulo 2^32
  __builtin_memcpy(to + row + kUnitAt, &unit, sizeof(unit));
  __builtin_memcpy(to + row + kCorrectionAt, &correction, sizeof(correction));
}
inline void split_row(int64_t n, const float* x, split_t* to, int64_t row) {
  Vec most = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) most = larger(most, load(x + i));
  split_row(n, most, [&](int64_t i) LMFUSE_LAMBDA { return load(x + i); }, to, row);
}

// sum += b x, four products in each word. As assembler: see woq_int8.h.
LMFUSE_INLINE void dot_bytes(__m512i& sum, __m512i b, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(x));
}
LMFUSE_INLINE void dot_bytes(__m512i& sum, __m512i b, const float& word) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(word));
}
// Bytes plus 128, as the factor that is unsigned.
LMFUSE_INLINE __m512i raise(__m512i bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
}
// The sum of both products, and the number that it stands for.
LMFUSE_INLINE __m512i join_bytes(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
LMFUSE_INLINE Vec number(__m512i sum, const void* unit) {
  return Vec{_mm512_cvtepi32_ps(sum)} * bit_cast<Vec>(word_at(unit));
}

// 32 bytes of each of four rows in turn, raised.
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
    i8_t* mine = stage + r * width;
    from[r] = direct ? rows.row[first + r] : reinterpret_cast<const char*>(mine);
    if (direct) continue;
    ahead.rows(r, 1);
    if (first + r < rows.count) {
      widen_row(type, rows.row[first + r], dim, width, mine);
    } else {
      for (int64_t i = 0; i < width; ++i) mine[i] = i8_t{};
    }
  }
  for (int64_t r = 0; r < kPanel; r += kLanes)
    for (int64_t i = 0; i < width; i += 4 * kTurned) {
      if (direct && i % 64 == 0) ahead.lines(r, kLanes, i);
      Vec v[kTurned];
      load_turned(from + r, i, v);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kTurned; ++j)
        _mm512_storeu_si512(to + i * kPanel + (j * kPanel + r) * 4, raise(bit_cast<__m512i>(v[j])));
    }
}

// The values of positions [first, first + kDotStep): to[width / 32][kKeyChunk / 4][32][4], raised.
// stage: four rows of round_up(dim, kPanel).
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

// Sums of R rows by 32 columns, the products of the higher and the lower bytes apart.
template <int R>
struct SplitSums {
  __m512i high[R][2], low[R][2];

  // first(r, i): what is added to, corrections or sums of other k.
  template <class F>
  LMFUSE_INLINE explicit SplitSums(F first) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        high[r][i] = _mm512_setzero_si512();
        low[r][i] = first(r, i);
      }
  }
  LMFUSE_INLINE __m512i operator()(int r, int i) const { return join_bytes(high[r][i], low[r][i]); }
  // += x[rows][4] v, x as rows of integers.
  LMFUSE_INLINE void add(const split_t* x, int64_t row, const __m512i (&v)[2]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i upper = word_at(x + r * row), lower = word_at(x + r * row + 2);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) dot_bytes(high[r][i], v[i], upper);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) dot_bytes(low[r][i], v[i], lower);
    }
  }
};

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
  __attribute__((noinline)) static void run_rows(const split_t* x, int64_t lda, const char* b,
                                                 int64_t k, float* acc) {
    const split_t* end = x + lda;
    SplitSums<R> sums([&](int r, int)
                          LMFUSE_LAMBDA { return word_at(end + r * lda + kCorrectionAt); });
    for (int64_t i = 0; i < k; i += 4, b += 128)
      sums.add(x + i, lda, {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 64)});
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        store(acc + r * kPanel + i * kLanes, number(sums(r, i), end + r * lda + kUnitAt));
  }
};

// The same for few rows, from where keys and values lie.
template <>
class FewRows<IntTile> {
 public:
  using Ahead = LinesAhead<false>;  // 68 ns/KB with what is fetched twice, 66 so
  static constexpr int64_t kRows = kFewRows;

  static void scores(KvType type, const FewPart& keys, int64_t width, const split_t* queries,
                     int64_t count, i8_t* stage, i8_t*, float* scores, Ahead& ahead) {
    const bool direct = keys.bytes == width;
    const int64_t height = block_height<kBlock>(count);
    PanelRows<i8_t> rows;
    for (int64_t first = 0; first < keys.rows->count; first += kPanel)
      for (int64_t h = 0; h < keys.heads; ++h) {
        if (direct) {
          rows.gather(keys, first, h, width, stage);
        } else {
          rows.widen(type, keys, first, h, width, stage, lines_of(keys.bytes), ahead);
        }
        by_blocks<kBlock>(count, height, [&](int64_t r, auto n) {
          score<decltype(n)::value>(
              rows, width, queries + h * kRows * query_row<split_t>(width) + 2 * r,
              keys.rows->scales(h) + first, scores + kRows * (h * kKeyChunk + first) + r * kPanel,
              direct && r == 0, ahead);
        });
      }
  }

  static void values(KvType type, const FewPart& values, int64_t width, const split_t* weights,
                     int64_t weights_row, int64_t count, i8_t* stage, i8_t*, float* products,
                     Ahead& ahead) {
    const bool direct = values.bytes == width;
    const int64_t height = block_height<kBlock>(count);
    PanelRows<i8_t> rows;
    for (int64_t first = 0; first < values.rows->count; first += kPanel) {
      const int64_t left = values.rows->count - first, keys = smaller(left, kPanel);
      const bool last = left <= kPanel;
      for (int64_t h = 0; h < values.heads; ++h) {
        if (direct) {
          rows.gather(values, first, h, width, stage);
        } else {
          rows.widen(type, values, first, h, width, stage, last ? 0 : lines_of(values.bytes),
                     ahead);
        }
        by_blocks<kBlock>(count, height, [&](int64_t r, auto n) {
          weigh<decltype(n)::value>(
              rows, first, keys, width, weights + (h * count + r) * weights_row, weights_row,
              {first == 0, last, direct && r == 0 && !last},
              products + h * width * count + r * kPanel, count * kPanel, ahead);
        });
      }
    }
  }

 private:
  static constexpr int kBlock = IntTile::kRows;

  // By 16 keys: the sums of 32 would leave no registers for their words.
  template <int R>
  __attribute__((noinline)) static void score(const PanelRows<i8_t>& rows, int64_t width,
                                              const split_t* queries, const float* scale, float* to,
                                              bool fetches, Ahead& ahead) {
    const auto* q = reinterpret_cast<const float*>(queries);  // words of kFewRows rows
    const float* end = q + query_row<split_t>(width) / 2 * kFewRows;
    for (int64_t k = 0; k < kPanel; k += kLanes) {
      __m512i high[R], low[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        high[r] = _mm512_setzero_si512();
        low[r] = word_at(end + kCorrectionAt / 2 * kFewRows + r);
      }
      for (int64_t i = 0; i < width; i += 4 * kTurned) {
        Vec v[kTurned];
        load_turned(rows.row + k, rows.offset + i, v);
        const float* at = q + i / 2 * kFewRows;
#pragma GCC unroll 8
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
      for (int r = 0; r < R; ++r)
        store(to + r * kPanel + k,
              number(join_bytes(high[r], low[r]), end + kUnitAt / 2 * kFewRows + r) *
                  load(scale + k));
    }
  }

  // Keys [first, first + keys), which begin at rows.row[0]. to: the sums of kPanel columns of each
  // row, as integers until the last panel, the next columns next_columns further.
  template <int R>
  __attribute__((noinline)) static void weigh(const PanelRows<i8_t>& rows, int64_t first,
                                              int64_t keys, int64_t width, const split_t* weights,
                                              int64_t weights_row, PanelOf panel, float* to,
                                              int64_t next_columns, Ahead& ahead) {
    const ZipBytes zip;
    const split_t* end = weights + weights_row;
    for (int64_t d = 0; d < width; d += kPanel, to += next_columns) {
      const auto at = [&](int r, int i) LMFUSE_LAMBDA { return to + r * kPanel + i * kLanes; };
      SplitSums<R> sums([&](int r, int i) LMFUSE_LAMBDA {
        return panel.first ? word_at(end + r * weights_row + kCorrectionAt)
                           : _mm512_loadu_si512(at(r, i));
      });
      for (int64_t k = 0; k < keys; k += 4) {
        if (panel.fetches) ahead.fetch<2>();
        __m512i v[2];
        zip(rows.row + k, rows.offset + d, v);
        sums.add(weights + first + k, weights_row, v);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m512i sum = sums(r, i);
          store(at(r, i),
                panel.last ? number(sum, end + r * weights_row + kUnitAt) : bit_cast<Vec>(sum));
        }
    }
  }
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA

#endif
