// Keys and values of one chunk, from wherever they lie, in the panels of the linear layers: the
// keys as a weight [keys, dim], the values as a weight [value_dim, keys]. So both products of
// attention are those of gemm_tile.h, and no kernel knows caches or storage types.
//
// Input is float or bf16_t, the type of the products, in both of which fp8 and int8 are exact; or
// split_t, for int8 by integers (attention_ints.h).
#pragma once

#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

LMFUSE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
LMFUSE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A 16-bit integer as 256 high + low, both signed bytes. In rows of them the high bytes of four
// precede the low ones.
struct split_t {
  int8_t bytes[2];
};
// What keys and values are packed as.
template <class Input>
struct PackedAs {
  using Type = Input;
};
template <>
struct PackedAs<split_t> {
  using Type = i8_t;
};

// The rows of the keys, or the values, of one head at count positions, and [heads][kKeyChunk]
// scales of it and those beside it, zeros beyond count (null: none).
struct ChunkRows {
  const char* row[kKeyChunk];
  int64_t count;
  float* scale;

  const float* scales(int64_t head) const { return scale ? scale + head * kKeyChunk : nullptr; }
  void shorten(int64_t to, int64_t heads) {
    for (; scale && count > to; --count)
      for (int64_t h = 0; h < heads; ++h) scale[h * kKeyChunk + count - 1] = 0.0f;
    count = smaller(count, to);
  }
};

LMFUSE_INLINE int64_t kv_bytes(KvType type) {
  return type == KvType::f32 ? 4 : type == KvType::bf16 || type == KvType::f16 ? 2 : 1;
}

// What will be packed some panels later, fetched row by row while others are packed: a burst would
// hold all line buffers at once.
struct RowsAhead {
  const char* const* row;
  int64_t count, bytes;

  // The line at byte `at` of rows [first, first + n) of the panel.
  LMFUSE_INLINE void lines(int64_t first, int64_t n, int64_t at) const {
    if (at < bytes)
      for (int64_t r = first; r < first + n && r < count; ++r)
        __builtin_prefetch(row[r] + at, 0, 2);
  }
  LMFUSE_INLINE void rows(int64_t first, int64_t n) const {
    for (int64_t at = 0; at < bytes; at += 64) lines(first, n, at);
  }
};

// f(i, row, n): rows i and on of those at positions [begin, end) of a sequence, n of them, lie from
// `row` on, stride.token apart.
template <class T, class F>
LMFUSE_INLINE void by_runs(const AttentionArgs& a, const AttentionSequence& s, const T* base,
                           KvSource::Strides stride, int64_t begin, int64_t end, F f) {
  if (a.block == 1) {  // beam indices: 43 for 55 ns/KB of one head
    for (int64_t p = begin; p < end; ++p)
      f(p - begin, base + s.table[p] * stride.block + (a.absolute ? p * stride.token : 0), 1);
    return;
  }
  int64_t block = begin / a.block, in_block = begin - block * a.block;
  for (int64_t p = begin; p < end; ++block, in_block = 0) {
    const int64_t n = smaller(a.block - in_block, end - p);
    const int64_t entry = s.table ? s.table[block] : 0, at = a.absolute ? p : in_block;
    f(p - begin, base + entry * stride.block + at * stride.token, n);
    p += n;
  }
}

// first, scale_first: where the sequence begins in the source.
inline void find_rows(const AttentionArgs& a, const AttentionSequence& s, const KvSource& from,
                      int64_t first, int64_t scale_first, int64_t head, int64_t heads,
                      int64_t begin, int64_t end, ChunkRows& rows) {
  const int64_t size = kv_bytes(from.type), step = from.stride.token * size;
  const char* base = static_cast<const char*>(from.data) + (first + head * from.stride.head) * size;
  by_runs(a, s, base, {from.stride.block * size, step, 0}, begin, end,
          [&](int64_t i, const char* row, int64_t n) LMFUSE_LAMBDA {
            for (int64_t j = 0; j < n; ++j) rows.row[i + j] = row + j * step;
          });
  rows.count = end - begin;
  if (!from.scale) return;
  const KvSource::Strides stride = from.scale_stride;
  by_runs(a, s, from.scale + scale_first + head * stride.head, stride, begin, end,
          [&](int64_t i, const float* row, int64_t n) LMFUSE_LAMBDA {
            float* to = rows.scale + i;
            for (int64_t h = 0; h < heads; ++h, row += stride.head, to += kKeyChunk)
              for (int64_t j = 0; j < n; ++j) to[j] = row[j * stride.token];
          });
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = rows.count; i < kKeyChunk; ++i) rows.scale[h * kKeyChunk + i] = 0.0f;
}

// Calls f with a row of the C++ type that stores it.
template <class F>
LMFUSE_INLINE void with_row(KvType type, const char* row, F f) {
  switch (type) {
    case KvType::f32:
      return f(reinterpret_cast<const float*>(row));
    case KvType::bf16:
      return f(reinterpret_cast<const bf16_t*>(row));
    case KvType::f16:
      return f(reinterpret_cast<const f16_t*>(row));
    case KvType::e5m2:
      return f(reinterpret_cast<const e5m2_t*>(row));
    case KvType::e4m3:
      return f(reinterpret_cast<const e4m3_t*>(row));
    case KvType::i8:
      return f(reinterpret_cast<const i8_t*>(row));
  }
}

// n elements of a row as To (float or bf16_t), zeros up to padded.
template <class To>
LMFUSE_INLINE void widen_row(KvType type, const char* row, int64_t n, int64_t padded, To* to) {
  with_row(type, row, [&](auto* from) LMFUSE_LAMBDA {
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes)
      store_low(to + i, load(from + i), load(from + i + kLanes));
    map(to + i, n - i, [&](int64_t j, auto l) { return load(from + i + j, l); });
  });
  for (int64_t i = n; i < padded; ++i) to[i] = To{};
}

LMFUSE_INLINE void widen_row(KvType /*i8*/, const char* row, int64_t n, int64_t padded, i8_t* to) {
  __builtin_memcpy(to, row, static_cast<uint64_t>(n));
  for (int64_t i = n; i < padded; ++i) to[i] = i8_t{};
}

// True if a row can be read as it lies, in whole vectors.
template <class Input>
LMFUSE_INLINE bool as_it_lies(KvType type, int64_t n, int64_t multiple) {
  return type == (sizeof(Input) == 4 ? KvType::f32 : KvType::bf16) && n % multiple == 0;
}

// Elements of Input in kLanes 32-bit words, to which the keys are padded.
template <class Input>
constexpr int64_t kWords = kLanes * 4 / static_cast<int64_t>(sizeof(Input));

// k of the product q k^T: as packed_k, and whole vectors.
template <class Input>
LMFUSE_INLINE int64_t key_width(int64_t dim) {
  return round_up(dim, sizeof(Input) == 4 ? kLanes : kDotStep);
}

// From query to query: rows of integers end with their unit (attention_ints.h).
template <class Input>
LMFUSE_INLINE int64_t query_row(int64_t width) {
  return __is_same(Input, split_t) ? width + kDotStep : width;
}

// Panel p of the keys: to[width / per word][32] words. stage: 32 rows of width elements.
template <class Input>
void pack_keys(KvType type, const ChunkRows& rows, int64_t panel, int64_t dim, Input* stage,
               Input* to, RowsAhead ahead) {
  const int64_t width = key_width<Input>(dim), words = width * sizeof(Input) / 4;
  const int64_t first = panel * kPanel, left = rows.count - first;
  const int64_t count = left < kPanel ? left : kPanel;
  const bool direct = as_it_lies<Input>(type, dim, width) && count == kPanel;
  if (!direct) {
    for (int64_t r = 0; r < count; ++r) {
      ahead.rows(r, 1);
      widen_row(type, rows.row[first + r], dim, width, stage + r * width);
    }
    for (int64_t i = count * width; i < kPanel * width; ++i) stage[i] = Input{};
  }
  float* words_to = reinterpret_cast<float*>(to);
  for (int64_t r0 = 0; r0 < kPanel; r0 += kLanes) {
    const float* from[kLanes];
    for (int64_t r = 0; r < kLanes; ++r)
      from[r] = reinterpret_cast<const float*>(
          direct ? rows.row[first + r0 + r]
                 : reinterpret_cast<const char*>(stage + (r0 + r) * width));
    for (int64_t w = 0; w < words; w += kLanes) {
      if (direct && w * 4 % 64 == 0) ahead.lines(r0, kLanes, w * 4);
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) v[r] = load(from[r] + w);
      transpose(v);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) store(words_to + (w + r) * kPanel + r0, v[r]);
    }
  }
}

// Keys of a chunk, rounded up to what the second product takes.
LMFUSE_INLINE int64_t value_keys(int64_t count) { return round_up(count, kDotStep); }

// The values of positions [first, first + kDotStep), into panels of panel_stride elements.
// stage: two rows of round_up(dim, kPanel).
inline void pack_values(KvType type, const ChunkRows& rows, int64_t first, int64_t dim,
                        float* stage, float* to, int64_t panel_stride, RowsAhead ahead) {
  const int64_t width = round_up(dim, kPanel);
  for (int64_t k = first; k < first + kDotStep; ++k) {
    ahead.rows(k - first, 1);
    const float* row = stage;
    if (k >= rows.count) {
      for (int64_t i = 0; i < width; ++i) stage[i] = 0.0f;
    } else if (as_it_lies<float>(type, dim, kPanel)) {
      row = reinterpret_cast<const float*>(rows.row[k]);
    } else {
      widen_row(type, rows.row[k], dim, width, stage);
    }
    for (int64_t d = 0; d < width; d += kPanel)
      map(to + d / kPanel * panel_stride + k * kPanel, kPanel,
          [&](int64_t i, auto l) { return load(row + d + i, l); });
  }
}

inline void pack_values(KvType type, const ChunkRows& rows, int64_t first, int64_t dim,
                        bf16_t* stage, bf16_t* to, int64_t panel_stride, RowsAhead ahead) {
  const int64_t width = round_up(dim, kPanel);
  for (int64_t k = first; k < first + kDotStep; k += 2) {
    ahead.rows(k - first, 2);
    const bf16_t* pair[2];
    for (int64_t j = 0; j < 2; ++j) {
      bf16_t* mine = stage + j * width;
      pair[j] = mine;
      if (k + j >= rows.count) {
        for (int64_t i = 0; i < width; ++i) mine[i] = bf16_t{};
      } else if (as_it_lies<bf16_t>(type, dim, kPanel)) {
        pair[j] = reinterpret_cast<const bf16_t*>(rows.row[k + j]);
      } else {
        widen_row(type, rows.row[k + j], dim, width, mine);
      }
    }
    for (int64_t d = 0; d < width; d += 2 * kLanes)
      zip(pair[0] + d, pair[1] + d, to + d / kPanel * panel_stride + k * kPanel + 2 * (d % kPanel));
  }
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
