// The products of attention for few rows, as in decoding: keys and values are read as they lie,
// once for all rows, and nothing is packed. Keys change rows for lanes in registers, values of two
// keys are zipped there. The sums are those of gemm_tile.h, bit for bit: chains over ascending k.
#pragma once

#include "attention_pack.h"
#include "gemm_tile.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// The rows of a part of what is read, each of so many bytes.
struct FetchPart {
  const ChunkRows* rows;
  int64_t bytes;
};

// The keys of a chunk, its values, and the first of the next keys, fetched strictly one line after
// the other, kDistance ahead of what is read, and further while weights are computed.
class LinesAhead {
 public:
  LinesAhead(FetchPart keys, FetchPart values, const ChunkRows& next_keys)
      : parts_{keys, values, {&next_keys, keys.bytes}} {
    const int64_t lead = kDistance / keys.bytes, count = keys.rows->count;
    row_ = keys.rows->row + (lead < count ? lead : count);
    last_ = keys.rows->row + count;
  }

  template <int N>
  LMFUSE_INLINE void fetch() {
    if (end_ - at_ < N * 64) return fetch(N);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) __builtin_prefetch(at_ + i * 64, 0, kLocality);
    at_ += N * 64;
  }
  __attribute__((noinline)) void fetch(int64_t lines) {
    for (; lines > 0; --lines, at_ += 64) {
      if (at_ >= end_ && !find_run()) return;
      __builtin_prefetch(at_, 0, kLocality);
    }
  }
  // While the weights of one row of count are computed. Values follow at once, so the last panel of
  // them fetches nothing.
  void of_weights(int64_t count) {
    const FetchPart& values = parts_[1];
    fetch(kPanel * values.bytes / 64 / count);
  }

 private:
  static constexpr int64_t kDistance = 8192;

  // Rows that lie one after the other.
  bool find_run() {
    while (row_ == last_) {
      at_ = end_ = nullptr;
      if (part_ == 2) return false;
      const ChunkRows& next = *parts_[++part_].rows;
      row_ = next.row;
      last_ = row_ + next.count;
    }
    const int64_t bytes = parts_[part_].bytes;
    at_ = *row_++;
    end_ = at_ + bytes;
    for (; row_ != last_ && *row_ == end_; ++row_) end_ += bytes;
    return true;
  }

  FetchPart parts_[3];
  int64_t part_ = 0;
  const char *const *row_, *const *last_;
  const char *at_ = nullptr, *end_ = nullptr;
};

// The rows of a panel of keys or values, which begin at get()[r]: as they lie, or widened to Input.
template <class Input>
class PanelRows {
 public:
  // Of positions [first, first + kPanel). Those beyond count are rows of zeros, for which there is
  // room in stage, as for kPanel rows.
  void find(const ChunkRows& rows, int64_t first, int64_t width, Input* stage) {
    const int64_t left = rows.count - first;
    at_ = rows.row + first;
    if (left >= kPanel) return;
    for (int64_t i = 0; i < width; ++i) stage[i] = Input{};
    for (int64_t r = 0; r < kPanel; ++r)
      own_[r] = r < left ? at_[r] : reinterpret_cast<const char*>(stage);
    at_ = own_;
  }
  // The same by way of stage.
  void widen(KvType type, const ChunkRows& rows, int64_t first, int64_t dim, int64_t width,
             Input* stage, int64_t lines, LinesAhead& ahead) {
    const int64_t left = rows.count - first;
    for (int64_t r = 0; r < kPanel; ++r) {
      Input* to = stage + r * width;
      own_[r] = reinterpret_cast<const char*>(to);
      if (r < left) {
        widen_row(type, rows.row[first + r], dim, width, to);
        ahead.fetch(lines);
      } else {
        for (int64_t i = 0; i < width; ++i) to[i] = Input{};
      }
    }
    at_ = own_;
  }
  const char* const* get() const { return at_; }

 private:
  const char* const* at_;
  const char* own_[kPanel];
};

constexpr int64_t kFewRows = 16;

// Rows of queries, zeros up to kFewRows, word by word: to[words][kFewRows].
template <class Input>
inline void place_queries(const Input* rows, int64_t width, Input* to) {
  const int64_t words = width * sizeof(Input) / 4;
  const auto* from = reinterpret_cast<const float*>(rows);
  auto* words_to = reinterpret_cast<float*>(to);
  for (int64_t r0 = 0; r0 < kFewRows; r0 += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) v[r] = load(from + (r0 + r) * words + w);
      transpose(v);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) store(words_to + (w + r) * kFewRows + r0, v[r]);
    }
}

constexpr int kGroups = 2;  // of kLanes keys, whose chains hide the latency of one another

// sum[g][r] += queries[r] k, with keys in lanes: word i of those of group g in v[g][i].
template <class Stored, int R>
LMFUSE_INLINE void add_words(const float* queries, const Vec (&v)[kGroups][kTurned],
                             Vec (&sum)[kGroups][R]) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTurned; ++i) {
    const auto add = [&](int64_t k, const Vec(&x)[kGroups]) LMFUSE_LAMBDA {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec q = broadcast(queries[k * kFewRows + r]);
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) sum[g][r] = fma(q, x[g], sum[g][r]);
      }
    };
    Vec first[kGroups], second[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g)
      if constexpr (sizeof(Stored) == 4) {
        first[g] = v[g][i];
      } else {
        split_pairs(v[g][i], first[g], second[g]);
      }
    constexpr int64_t kElements = 4 / sizeof(Stored);
    add(i * kElements, first);
    if constexpr (kElements == 2) add(i * kElements + 1, second);
  }
}

// sum[r][i] += weights[r] v over the columns of `keys` rows, which begin at row[k] + offset.
template <class Stored, int R, int V, class F>
LMFUSE_INLINE void add_values(const float* weights, int64_t weights_row, const char* const* row,
                              int64_t offset, int64_t keys, Vec (&sum)[R][V], F fetch) {
  for (int64_t k = 0; k < keys; ++k) {
    fetch(Count<V * kLanes * sizeof(Stored) / 64>{});
    const auto* from = reinterpret_cast<const Stored*>(row[k] + offset);
    Vec v[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) v[i] = load(from + i * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast(weights[r * weights_row + k]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = fma(w, v[i], sum[r][i]);
    }
  }
}

#if defined(__AVX512BF16__)
template <class Stored, int R>
LMFUSE_INLINE void add_words(const bf16_t* queries, const Vec (&v)[kGroups][kTurned],
                             Vec (&sum)[kGroups][R]) {
  constexpr int kPairs = 2 / sizeof(Stored);  // in a word
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTurned; ++i) {
    Vec pair[kPairs][kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g)
      if constexpr (kPairs == 2) {
        widen_bytes(v[g][i], pair[0][g], pair[1][g]);
      } else {
        pair[0][g] = v[g][i];
      }
#pragma GCC unroll 2
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec q = broadcast_pair(queries + 2 * ((i * kPairs + p) * kFewRows + r));
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) sum[g][r] = dot_pairs(q, pair[p][g], sum[g][r]);
      }
  }
}

// If the number of keys is odd, a row of zeros follows.
template <class Stored, int R, int V, class F>
LMFUSE_INLINE void add_values(const bf16_t* weights, int64_t weights_row, const char* const* row,
                              int64_t offset, int64_t keys, Vec (&sum)[R][V], F fetch) {
  for (int64_t k = 0; k < keys; k += 2) {
    fetch(Count<2 * V * kLanes * sizeof(Stored) / 64>{});
    const auto* a = reinterpret_cast<const Stored*>(row[k] + offset);
    const auto* b = reinterpret_cast<const Stored*>(row[k + 1] + offset);
    Vec v[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; i += 2) zip(a + i * kLanes, b + i * kLanes, v[i], v[i + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast_pair(weights + r * weights_row + k);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = dot_pairs(w, v[i], sum[r][i]);
    }
  }
}
#endif

// The products of at most kRows rows.
template <class Tile>
class FewRows {
 public:
  using Input = typename Tile::Input;
  using Ahead = LinesAhead;
  static constexpr int64_t kRows = kFewRows;

  // scores[panel][kRows][kPanel] of `count` queries. stage: kPanel rows of width elements.
  static void scores(KvType type, bool scaled, const ChunkRows& keys, int64_t dim, int64_t width,
                     const Input* queries, int64_t count, Input* stage, float* scores,
                     LinesAhead& ahead) {
    with_words(type, dim, width, [&](auto word, auto direct) {
      using Word = decltype(word);
      constexpr int64_t kElements = 4 / sizeof(Word);
      PanelRows<Input> rows;
      for (int64_t first = 0; first < keys.count; first += kPanel, scores += kRows * kPanel) {
        if constexpr (decltype(direct)::value) {
          rows.find(keys, first, width, stage);
        } else {
          rows.widen(type, keys, first, dim, width, stage, lines_of(type, dim), ahead);
        }
        by_blocks(count, [&](int64_t r, auto block) {
          score<Word, decltype(block)::value>(rows.get(), width / kElements,
                                              queries + r * (4 / sizeof(Input)),
                                              scaled ? keys.scale + first : nullptr,
                                              scores + r * kPanel, direct.value && r == 0, ahead);
        });
      }
    });
  }

  // products[panel][count][kPanel] = weights v, a panel for each kPanel columns of v.
  static void values(KvType type, const ChunkRows& values, int64_t dim, int64_t width,
                     const Input* weights, int64_t weights_row, int64_t count, Input* stage, Input*,
                     float* products, LinesAhead& ahead) {
    constexpr int64_t kOnePass = 4 * kLanes;  // columns
    with_words(type, dim, width, [&](auto stored, auto direct) {
      using Stored = decltype(stored);
      PanelRows<Input> rows;
      for (int64_t first = 0; first < values.count; first += kPanel) {
        const int64_t left = values.count - first, keys = left < kPanel ? left : kPanel;
        const bool last = left <= kPanel;
        if constexpr (decltype(direct)::value) {
          rows.find(values, first, width, stage);
        } else {
          rows.widen(type, values, first, dim, width, stage, last ? 0 : lines_of(type, dim), ahead);
        }
        by_blocks(count, [&](int64_t r, auto block) {
          constexpr int R = decltype(block)::value;
          const Input* w = weights + r * weights_row + first;
          float* to = products + r * kPanel;
          int64_t d = 0;
          const bool fetches = direct.value && r == 0 && !last;
          for (; d + kOnePass <= width; d += kOnePass)
            weigh<Stored, R, 4>(rows.get(), d, keys, w, weights_row, first > 0, to + d * count,
                                count * kPanel, fetches, ahead);
          if (d < width)
            weigh<Stored, R, kPanel / kLanes>(rows.get(), d, keys, w, weights_row, first > 0,
                                              to + d * count, count * kPanel, fetches, ahead);
        });
      }
    });
  }

 private:
  // Rows that share one pass: sums of two vectors of keys, or of four of columns, and what they are
  // added from, in 32 registers (16).
  static constexpr int64_t kBlock = kLanes == 16 ? 6 : 3;

  static int64_t lines_of(KvType type, int64_t dim) { return (dim * kv_bytes(type) + 63) / 64; }

  // f(first row, its number) for blocks of about equal height.
  template <class F>
  LMFUSE_INLINE static void by_blocks(int64_t count, F f) {
    const int64_t blocks = (count + kBlock - 1) / kBlock, height = (count + blocks - 1) / blocks;
    for (int64_t r = 0; r < count; r += height)
      with_count<kBlock>(count - r < height ? count - r : height, [&](auto n) { f(r, n); });
  }

  // f(type of the elements in a word, whether rows can be read as they lie): where they fill whole
  // vectors.
  template <class F>
  LMFUSE_INLINE static void with_words(KvType type, int64_t dim, int64_t width, F f) {
    if (dim == width && dim % (2 * kLanes) == 0) {
      if (type == KvType::bf16) return f(bf16_t{}, Flag<true>{});
      if constexpr (sizeof(Input) == 4) {
        if (type == KvType::f32) return f(float{}, Flag<true>{});
      } else {
        if (type == KvType::i8) return f(i8_t{}, Flag<true>{});
      }
    }
    f(Input{}, Flag<false>{});
  }

  template <class Word, int R>
  __attribute__((noinline)) static void score(const char* const* row, int64_t words,
                                              const Input* queries, const float* scale, float* to,
                                              bool fetches, LinesAhead& ahead) {
    for (int64_t k = 0; k < kPanel; k += kGroups * kLanes) {
      Vec sum[kGroups][R];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[g][r] = broadcast(0.0f);
      for (int64_t i = 0; i < words; i += kTurned) {
        Vec v[kGroups][kTurned];
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) load_turned(row + k + g * kLanes, 4 * i, v[g]);
        add_words<Word>(queries + i * kFewRows * (4 / sizeof(Word)), v, sum);
        if (fetches) ahead.fetch<kGroups * kLanes * kTurned * 4 / 64>();
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const int64_t at = k + g * kLanes;
          store(to + r * kPanel + at, scale ? sum[g][r] * load(scale + at) : sum[g][r]);
        }
    }
  }

  // `to`: sums of kPanel columns of each row, the next columns next_columns further.
  template <class Stored, int R, int V>
  __attribute__((noinline)) static void weigh(const char* const* row, int64_t column, int64_t keys,
                                              const Input* weights, int64_t weights_row,
                                              bool resume, float* to, int64_t next_columns,
                                              bool fetches, LinesAhead& ahead) {
    constexpr int kInPanel = kPanel / kLanes;
    const auto at = [&](int r, int i) LMFUSE_LAMBDA {
      return to + i / kInPanel * next_columns + r * kPanel + i % kInPanel * kLanes;
    };
    Vec sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = resume ? load(at(r, i)) : broadcast(0.0f);
    add_values<Stored>(weights, weights_row, row, column * static_cast<int64_t>(sizeof(Stored)),
                       keys, sum, [&](auto lines) LMFUSE_LAMBDA {
                         if (fetches) ahead.fetch<decltype(lines)::value>();
                       });
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) store(at(r, i), sum[r][i]);
  }
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
