// The products of attention for few rows, as in decoding: keys and values are read as they lie,
// once for all rows, and nothing is packed, but for keys that more rows see than share a pass. Keys
// change rows for lanes in registers, values of two keys are zipped there. The sums are those of
// gemm_tile.h, bit for bit: chains over ascending k.
#pragma once

#include "attention_ahead.h"
#include "bytes.h"
#include "gemm_tile.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// Heads that lie beside each other are computed together: a position's, as in [positions, heads,
// dim], up to a run of kRun bytes (head by head, such a cache gives up a line or two at a stride
// that falls into few sets of the processor's caches), or those of a short block, as in [blocks,
// heads, block, dim]. 1: as they lie, head by head.
constexpr int64_t kMostTogether = 16;
inline int64_t heads_together(const AttentionArgs& a) {
  constexpr int64_t kRun = 2048, kShortBlock = 8192;
  const auto heads = [&](const KvSource& from, int64_t dim) -> int64_t {
    const int64_t bytes = dim * kv_bytes(from.type);
    if (from.stride.token > dim && from.stride.head == dim) return kRun / bytes;
    const bool in_block = from.stride.token == dim && from.stride.head == dim * a.block;
    return in_block && a.block * bytes <= kShortBlock ? kMostTogether : 1;
  };
  const int64_t n = smaller(heads(a.key, a.dim), heads(a.value, a.value_dim));
  const int64_t most = smaller(smaller(n, a.kv_heads), kMostTogether);
  return most > 1 ? most : 1;
}

// The rows of a panel of keys or values of one head: as they lie, or widened to Input.
template <class Input>
class PanelRows {
 public:
  // Where row r begins: at row[r] + offset.
  const char* const* row;
  int64_t offset;

  // Of positions [first, first + kPanel). Those beyond count are rows of zeros, for which there is
  // room in stage, as for kPanel rows.
  void find(const FewPart& part, int64_t first, int64_t head, int64_t width, Input* stage) {
    const int64_t left = part.rows->count - first;
    row = part.rows->row + first;
    offset = head * part.head_step;
    if (left >= kPanel) return;
    for (int64_t i = 0; i < width; ++i) stage[i] = Input{};
    for (int64_t r = 0; r < kPanel; ++r)
      own_[r] = r < left ? row[r] + offset : reinterpret_cast<const char*>(stage);
    row = own_;
    offset = 0;
  }
  // The same, of whole vectors: by way of stage where rows are apart, whose columns would be read
  // from the second-level cache again and again (Zen 4: 58 not 50 % of the bandwidth).
  void gather(const FewPart& part, int64_t first, int64_t head, int64_t width, Input* stage) {
    find(part, first, head, width, stage);
    constexpr int64_t kStep = kLanes * 4;
    if (!part.apart || part.rows->count - first < kPanel) return;
    for (int64_t r = 0; r < kPanel; ++r) {
      char* to = reinterpret_cast<char*>(stage) + r * part.bytes;
      const char* from = row[r] + offset;
      int64_t i = 0;
      for (; i + kStep <= part.bytes; i += kStep) store_words(to + i, load_words(from + i));
      for (; i < part.bytes; ++i) to[i] = from[i];  // half a step of int8
      own_[r] = to;
    }
    row = own_;
    offset = 0;
  }
  // The same by way of stage.
  template <class Ahead>
  void widen(KvType type, const FewPart& part, int64_t first, int64_t head, int64_t width,
             Input* stage, int64_t lines, Ahead& ahead) {
    const int64_t left = part.rows->count - first, dim = part.bytes / kv_bytes(type);
    for (int64_t r = 0; r < kPanel; ++r) {
      Input* to = stage + r * width;
      own_[r] = reinterpret_cast<const char*>(to);
      if (r < left) {
        widen_row(type, part.rows->row[first + r] + head * part.head_step, dim, width, to);
        ahead.fetch(lines);
      } else {
        for (int64_t i = 0; i < width; ++i) to[i] = Input{};
      }
    }
    row = own_;
    offset = 0;
  }

 private:
  const char* own_[kPanel];
};

constexpr int64_t kFewRows = 16;

// Rows of queries, zeros up to kFewRows, word by word: to[words][kFewRows].
template <class Input>
inline void place_queries(const Input* rows, int64_t row, Input* to) {
  const int64_t words = row * sizeof(Input) / 4;
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
  [[maybe_unused]] const BytesToBf16<true> widen;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTurned; ++i) {
    Vec pair[kPairs][kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g)
      if constexpr (kPairs == 2) {
        widen(v[g][i], pair[0][g], pair[1][g]);
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

// Values of bf16 are zipped within quarters: on Zen 4 a panel with 4 rows takes 505 cycles so, not
// 605. So sums are in order only once the last panel is added.
LMFUSE_INLINE void zip_columns(const bf16_t* a, const bf16_t* b, Vec& first, Vec& second) {
  zip_quarters(a, b, first, second);
}
LMFUSE_INLINE void zip_columns(const i8_t* a, const i8_t* b, Vec& first, Vec& second) {
  zip(a, b, first, second);
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
    for (int i = 0; i < V; i += 2) zip_columns(a + i * kLanes, b + i * kLanes, v[i], v[i + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec w = broadcast_pair(weights + r * weights_row + k);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = dot_pairs(w, v[i], sum[r][i]);
    }
  }
}
#endif

// Rows in blocks of about equal height, of at most kBlock, which share a pass.
template <int kBlock>
LMFUSE_INLINE int64_t block_height(int64_t count) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  return (count + blocks - 1) / blocks;
}
// f(first row, its number) for each of them.
template <int kBlock, class F>
LMFUSE_INLINE void by_blocks(int64_t count, int64_t height, F f) {
  for (int64_t r = 0; r < count; r += height)
    with_count<kBlock>(count - r < height ? count - r : height, [&](auto n) { f(r, n); });
}
LMFUSE_INLINE int64_t lines_of(int64_t bytes) { return (bytes + 63) / 64; }

// A panel of values in its chunk.
struct PanelOf {
  bool first, last, fetches;
};

// The products of at most kRows rows.
template <class Tile>
class FewRows {
 public:
  using Input = typename Tile::Input;
  using Ahead = LinesAhead<true>;
  static constexpr int64_t kRows = kFewRows;

  // scores[head][kKeyChunk / kPanel][kRows][kPanel] of `count` queries of each head, which lie
  // [head][words][kRows]. stage and turned: kPanel rows of width elements.
  static void scores(KvType type, const FewPart& keys, int64_t width, const Input* queries,
                     int64_t count, Input* stage, Input* turned, float* scores, Ahead& ahead) {
    with_words(type, keys.bytes, width, [&](auto word, auto direct) {
      using Word = decltype(word);
      constexpr int64_t kElements = 4 / sizeof(Word);
      const int64_t height = block_height<kBlock>(count);
      PanelRows<Input> rows;
      for (int64_t first = 0; first < keys.rows->count; first += kPanel)
        for (int64_t h = 0; h < keys.heads; ++h) {
          const float* scale = keys.rows->scales(h);
          if constexpr (decltype(direct)::value) {
            rows.gather(keys, first, h, width, stage);
          } else {
            rows.widen(type, keys, first, h, width, stage, lines_of(keys.bytes), ahead);
          }
          by_blocks<kBlock>(count, height, [&](int64_t r, auto block) {
            const auto with = [&](auto panel) {
              score<Word, decltype(block)::value, decltype(panel)::value>(
                  rows, width / kElements, queries + h * kRows * width + r * (4 / sizeof(Input)),
                  scale ? scale + first : nullptr,
                  scores + kRows * (h * kKeyChunk + first) + r * kPanel,
                  reinterpret_cast<float*>(turned), direct.value, ahead);
            };
            if (count <= kBlock) return with(Count<kTurn>{});
            r == 0 ? with(Count<kTurnAndKeep>{}) : with(Count<kKept>{});
          });
        }
    });
  }

  // products[head][panel][count][kPanel] = weights v, a panel for each kPanel columns of v.
  // weights: [head][count] rows.
  static void values(KvType type, const FewPart& values, int64_t width, const Input* weights,
                     int64_t weights_row, int64_t count, Input* stage, Input*, float* products,
                     Ahead& ahead) {
    with_words(type, values.bytes, width, [&](auto stored, auto direct) {
      using Stored = decltype(stored);
      const int64_t height = block_height<kBlock>(count);
      PanelRows<Input> rows;
      for (int64_t first = 0; first < values.rows->count; first += kPanel) {
        const int64_t left = values.rows->count - first, keys = smaller(left, kPanel);
        const bool last = left <= kPanel;
        for (int64_t h = 0; h < values.heads; ++h) {
          if constexpr (decltype(direct)::value) {
            rows.find(values, first, h, width, stage);
          } else {
            rows.widen(type, values, first, h, width, stage, last ? 0 : lines_of(values.bytes),
                       ahead);
          }
          by_blocks<kBlock>(count, height, [&](int64_t r, auto block) {
            weigh_columns<Stored, decltype(block)::value>(
                rows, keys, width, weights + (h * count + r) * weights_row + first, weights_row,
                {first == 0, last, direct.value && r == 0 && !last},
                products + h * width * count + r * kPanel, count * kPanel, ahead);
          });
        }
      }
    });
  }

 private:
  // Rows that share one pass: sums of two vectors of keys, or of four of columns, and what they are
  // added from, in 32 registers (16).
  static constexpr int64_t kBlock = kLanes == 16 ? 6 : 3;

  // f(type of the elements in a word, whether rows can be read as they lie): where they fill whole
  // vectors.
  template <class F>
  LMFUSE_INLINE static void with_words(KvType type, int64_t bytes, int64_t width, F f) {
    const int64_t dim = bytes / kv_bytes(type);
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

  // What the first of some blocks turns is kept for the others: turned[word][kPanel].
  static constexpr int kTurn = 0, kTurnAndKeep = 1, kKept = 2;
  template <class Word, int R, int kWords>
  __attribute__((noinline)) static void score(const PanelRows<Input>& rows, int64_t words,
                                              const Input* queries, const float* scale, float* to,
                                              float* turned, bool fetches, Ahead& ahead) {
    for (int64_t k = 0; k < kPanel; k += kGroups * kLanes) {
      Vec sum[kGroups][R];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[g][r] = broadcast(0.0f);
      for (int64_t i = 0; i < words; i += kTurned) {
        Vec v[kGroups][kTurned];
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          float* kept = turned + i * kPanel + k + g * kLanes;
          if constexpr (kWords != kKept)
            load_turned(rows.row + k + g * kLanes, rows.offset + 4 * i, v[g]);
#pragma GCC unroll 16
          for (int64_t j = 0; j < kTurned; ++j) {
            if constexpr (kWords == kTurnAndKeep) store(kept + j * kPanel, v[g][j]);
            if constexpr (kWords == kKept) v[g][j] = load(kept + j * kPanel);
          }
        }
        add_words<Word>(queries + i * kFewRows * (4 / sizeof(Word)), v, sum);
        if constexpr (kWords != kKept)
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
  template <class Stored, int R>
  LMFUSE_INLINE static void weigh_columns(const PanelRows<Input>& rows, int64_t keys, int64_t width,
                                          const Input* weights, int64_t weights_row, PanelOf panel,
                                          float* to, int64_t next_columns, Ahead& ahead) {
    constexpr int kMost = 4, kLeast = kPanel / kLanes;  // vectors
    int64_t d = 0;
    const auto columns = [&](auto v) LMFUSE_LAMBDA {
      constexpr int V = decltype(v)::value;
      weigh<Stored, R, V>(rows.row, rows.offset + d * static_cast<int64_t>(sizeof(Stored)), keys,
                          weights, weights_row, panel, to + d / kPanel * next_columns, next_columns,
                          ahead);
      d += V * kLanes;
    };
    while (d + kMost * kLanes <= width) columns(Count<kMost>{});
    if (d < width) columns(Count<kLeast>{});
  }
  // Of V vectors of columns, which are `offset` into each row.
  template <class Stored, int R, int V>
  __attribute__((noinline)) static void weigh(const char* const* row, int64_t offset, int64_t keys,
                                              const Input* weights, int64_t weights_row,
                                              PanelOf panel, float* to, int64_t next_columns,
                                              Ahead& ahead) {
    constexpr bool kQuarters = sizeof(Input) == 2 && sizeof(Stored) == 2;
    constexpr int kInPanel = kPanel / kLanes;
    const auto at = [&](int r, int i) LMFUSE_LAMBDA {
      return to + i / kInPanel * next_columns + r * kPanel + i % kInPanel * kLanes;
    };
    Vec sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = panel.first ? broadcast(0.0f) : load(at(r, i));
    add_values<Stored>(weights, weights_row, row, offset, keys, sum, [&](auto lines) LMFUSE_LAMBDA {
      if (panel.fetches) ahead.fetch<decltype(lines)::value>();
    });
    if constexpr (kQuarters)
      if (panel.last)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int i = 0; i < V; i += 2) order_quarters(sum[r][i], sum[r][i + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) store(at(r, i), sum[r][i]);
  }
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
