// Attention over chunks of kKeyChunk keys. For each chunk: keys and values are packed once, and
// all rows that see them follow in blocks: scores, e^(s - m) with the largest score m of the chunk,
// weighted values, each from zero. Then the chunk joins what came before it,
//
//   M' = max(M, m),  A' = A e^(M - M') + a e^(m - M'),  L' = L e^(M - M') + l e^(m - M')
//
// which is the same sum, in the same order, whether it happens at once or in attention_join after
// the chunks were spread over threads. One decoded token, a prompt, a piece of a prompt: all are
// computed so.
#include "attention_softmax.h"
#include "gemm_tile.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// A running softmax of one row: the largest score, the sum, and where the weighted values are.
struct Running {
  float largest, sum;
};

struct Factors {
  float old_part, new_part;
};

// Joins m to r; the values are to be multiplied by the factors. No key seen so far: all is zero.
LMFUSE_INLINE Factors join(Running& r, RowSums m) {
  const float largest = r.largest > m.largest ? r.largest : m.largest;
  const float base = largest == kNever ? 0.0f : largest;
  float old_part[kLanes], new_part[kLanes];
  store(old_part, exp(broadcast(r.largest - base)));
  store(new_part, exp(broadcast(m.largest - base)));
  r.sum = r.sum * old_part[0] + m.sum * new_part[0];
  r.largest = largest;
  return {old_part[0], new_part[0]};
}

LMFUSE_INLINE void join_values(float* sum, const float* more, int64_t n, Factors f) {
  const Vec old_part = broadcast(f.old_part), new_part = broadcast(f.new_part);
  map(sum, n, [&](int64_t i, auto l) {
    return fma(load(sum + i, l), old_part, load(more + i, l) * new_part);
  });
}

// out = values / sum, with the sink as one more key of no value. A row that saw no key: zeros.
void finish_row(const AttentionArgs& a, const RowInfo& row, int64_t head, Running r,
                const float* values) {
  float sum = r.sum, factor = a.value_scale;
  if (a.sinks) {
    const Factors f = join(r, {a.sinks[head], 1.0f});
    sum = r.sum;
    factor *= f.old_part;
  }
  const Vec inverse = broadcast(sum == 0.0f ? 0.0f : factor / sum);
  const int64_t at =
      a.sequences[row.seq].out + row.query * a.out_stride_s + head * a.out_stride_h;
  with_type(a.dtype, [&](auto t) {
    map(static_cast<decltype(t)*>(a.out) + at, a.value_dim,
        [&](int64_t i, auto l) { return load(values + i, l) * inverse; });
  });
}

// Carves buffers out of the scratch; with null it only counts.
class Scratch {
 public:
  explicit Scratch(char* at) : at_(at) {}
  template <class T>
  T* take(int64_t count) {
    T* mine = reinterpret_cast<T*>(at_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return mine;
  }
  int64_t used() const { return used_; }

 private:
  char* at_;
  int64_t used_ = 0;
};

template <class Tile>
class Attend {
 public:
  using Input = typename Tile::Input;

  Attend(const AttentionArgs& a, char* scratch)
      : a_(a), width_(key_width<Input>(a.dim)), value_width_(round_up(a.value_dim, kPanel)) {
    Scratch s(scratch);
    queries_ = s.take<Input>(kAttentionRows * width_);
    keys_ = s.take<Input>(kKeyChunk * width_);
    values_ = s.take<Input>(kKeyChunk * value_width_);
    stage_ = s.take<Input>(kPanel * (width_ > value_width_ ? width_ : value_width_));
    scores_ = s.take<float>(kBlock * kKeyChunk);
    weights_ = s.take<Input>(kBlock * kWeightsRow);
    products_ = s.take<float>(kBlock * kPanel);
    sums_ = s.take<float>(kAttentionRows * value_width_);
    running_ = s.take<Running>(kAttentionRows);
    rows_ = s.take<RowInfo>(kAttentionRows);
    key_rows_ = s.take<ChunkRows>(1);
    value_rows_ = s.take<ChunkRows>(1);
    scratch_ = s.used();
  }
  int64_t scratch() const { return scratch_; }

  void run(const AttentionUnit& u, int64_t kv_head) {
    const int64_t count = u.seq_count * u.row_count, group = a_.heads / a_.kv_heads;
    first_head_ = kv_head * group;
    for (int64_t r = 0; r < count; ++r) {
      rows_[r] = row_info(a_, u, r);
      running_[r] = {kNever, 0.0f};
      load_query(rows_[r], queries_ + r * width_);
    }
    for (int64_t i = 0; i < count * value_width_; ++i) sums_[i] = 0.0f;
    for (int64_t c = u.chunk; c < u.chunk + u.chunk_count; ++c)
      chunk(a_.sequences[u.seq], c * kKeyChunk, count, kv_head);
    for (int64_t r = 0; r < count; ++r) leave(u, r, kv_head);
  }

 private:
  // Rows that share one pass over the packed chunk: some tiles, so that it is worth reading.
  static constexpr int64_t kBlock = Tile::kRows >= 24 ? Tile::kRows : 24 / Tile::kRows * Tile::kRows;
  static constexpr int64_t kWeightsRow = kKeyChunk + 32;  // apart in the first-level cache

  void load_query(const RowInfo& row, Input* to) {
    const int64_t at = a_.sequences[row.seq].query + row.query * a_.q_stride_s +
                       (first_head_ + row.head) * a_.q_stride_h;
    with_type(a_.dtype, [&](auto t) {
      const auto* from = static_cast<const decltype(t)*>(a_.query) + at;
      map(to, a_.dim, [&](int64_t i, auto l) { return load(from + i, l); });
    });
    for (int64_t i = a_.dim; i < width_; ++i) to[i] = Input{};
  }

  // The last position that one of the rows sees, at most limit.
  int64_t last_seen(int64_t first, int64_t count, int64_t limit) const {
    int64_t end = 0;
    for (int64_t r = first; r < first + count; ++r)
      if (rows_[r].end > rows_[r].begin && rows_[r].end > end) end = rows_[r].end;
    return end < limit ? end : limit;
  }

  void chunk(const AttentionSequence& s, int64_t begin, int64_t count, int64_t kv_head) {
    const int64_t end = last_seen(0, count, begin + kKeyChunk);
    if (end <= begin) return;
    find_rows(a_, s, a_.key, s.key, s.key_scale, kv_head, begin, end, *key_rows_);
    find_rows(a_, s, a_.value, s.value, s.value_scale, kv_head, begin, end, *value_rows_);
    for (int64_t p = 0; p * kPanel < end - begin; ++p) {
      pack_keys(a_.key.type, *key_rows_, p, a_.dim, stage_, keys_ + p * kPanel * width_);
      pack_values(a_.value.type, *value_rows_, p * kPanel, a_.value_dim, stage_, values_,
                  kKeyChunk * kPanel);
    }
    for (int64_t r = 0; r < count; r += kBlock)
      block(begin, r, count - r < kBlock ? count - r : kBlock);
  }

  // Where the rows of a block lie in the tiles' results: the tiles are of equal height, the last
  // overlaps the one before.
  struct Place {
    int64_t tiles, height, rows;

    explicit Place(int64_t n)
        : tiles((n + Tile::kRows - 1) / Tile::kRows), height((n + tiles - 1) / tiles), rows(n) {}
    int64_t first(int64_t t) const { return t + 1 < tiles ? t * height : rows - height; }
    int64_t at(int64_t r, const TileRows& tile) const {
      const int64_t t = r / height, in_tile = r - first(t);
      return t * Tile::kRows + (in_tile < tile.split ? in_tile : in_tile + tile.gap);
    }
  };

  // acc = x b for all tiles, one panel after the other.
  void multiply(Tile& tile, const Place& place, const Input* x, int64_t lda, const Input* b,
                int64_t panel_stride, int64_t panels, int64_t k, float* acc, int64_t acc_stride) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < place.tiles; ++t) {
        const char* panel = reinterpret_cast<const char*>(b + p * panel_stride);
        tile.run(x + place.first(t) * lda, lda, panel, k,
                 acc + p * acc_stride + t * Tile::kRows * kPanel, false,
                 Ahead::of_next(panel, 0, 0, kWhole));  // all is in the caches
      }
  }

  // Rows [first, first + count) over the packed chunk.
  void block(int64_t begin, int64_t first, int64_t count) {
    const int64_t seen = last_seen(first, count, begin + kKeyChunk) - begin;
    if (seen <= 0) return;
    const int64_t panels = (seen + kPanel - 1) / kPanel, keys = panels * kPanel;
    const int64_t panel_rows = kBlock * kPanel;  // of scores
    const Place place(count);
    Tile tile(place.height);
    multiply(tile, place, queries_ + first * width_, width_, keys_, kPanel * width_, panels, width_,
             scores_, panel_rows);

    Factors factors[kBlock];
    for (int64_t r = 0; r < count; ++r) {
      const RowInfo& row = rows_[first + r];
      const Scores scores{scores_ + place.at(r, tile.rows()) * kPanel, panel_rows, keys};
      const RowSums sums =
          softmax_row(a_, row, first_head_ + row.head, begin, *key_rows_, *value_rows_, scores,
                      weights_ + r * kWeightsRow);
      factors[r] = join(running_[first + r], sums);
    }

    for (int64_t d = 0; d < value_width_; d += kPanel) {
      multiply(tile, place, weights_, kWeightsRow, values_ + d * kKeyChunk, 0, 1, keys, products_,
               0);
      for (int64_t r = 0; r < count; ++r)
        join_values(sums_ + (first + r) * value_width_ + d,
                    products_ + place.at(r, tile.rows()) * kPanel, kPanel, factors[r]);
    }
  }

  // The result of a row: finished, or for attention_join.
  void leave(const AttentionUnit& u, int64_t r, int64_t kv_head) {
    const AttentionSequence& s = a_.sequences[rows_[r].seq];
    const float* values = sums_ + r * value_width_;
    if (s.partial < 0) {
      finish_row(a_, rows_[r], first_head_ + rows_[r].head, running_[r], values);
      return;
    }
    const int64_t rows = s.q_len * (a_.heads / a_.kv_heads), row = u.row + r % u.row_count;
    const int64_t entry =
        s.partial + ((u.chunk - s.first_chunk) * a_.kv_heads + kv_head) * rows + row;
    float* to = a_.partials + entry * attention_entry(a_.value_dim);
    to[0] = running_[r].largest;
    to[1] = running_[r].sum;
    map(to + 16, value_width_, [&](int64_t i, auto l) { return load(values + i, l); });
  }

  const AttentionArgs& a_;
  const int64_t width_, value_width_;
  int64_t scratch_, first_head_ = 0;
  Input *queries_, *keys_, *values_, *stage_, *weights_;
  float *scores_, *products_, *sums_;
  Running* running_;
  RowInfo* rows_;
  ChunkRows *key_rows_, *value_rows_;
};

#if defined(LMFUSE_TILES)
using PairTile = AmxTile;
#elif defined(__AVX512BF16__)
using PairTile = DotTile;
#else
using PairTile = FmaTile<float>;  // bf16 widens to it exactly
#endif

// Products of bf16 where the queries are bf16 and the cache is exact in it, else of fp32.
template <class F>
void with_tile(const AttentionArgs& a, F f) {
  const auto exact = [](KvType type) { return type != KvType::f32 && type != KvType::f16; };
  if (a.dtype == DType::bf16 && exact(a.key.type) && exact(a.value.type)) {
    f.template operator()<PairTile>();
  } else {
    f.template operator()<FmaTile<float>>();
  }
}

}  // namespace

int64_t attention_scratch(const AttentionArgs& a) {
  int64_t bytes = 0;
  with_tile(a, [&]<class Tile>() { bytes = Attend<Tile>(a, nullptr).scratch(); });
  return bytes;
}

void attention(const AttentionArgs& a, int64_t begin, int64_t end) {
  with_tile(a, [&]<class Tile>() {
    Attend<Tile> attend(a, a.scratch);
    for (int64_t i = begin; i < end; ++i) attend.run(a.units[i / a.kv_heads], i % a.kv_heads);
  });
}

void attention_join(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t group = a.heads / a.kv_heads, entry = attention_entry(a.value_dim);
  float* values = reinterpret_cast<float*>(a.scratch);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t seq = i / a.kv_heads, kv_head = i % a.kv_heads;
    const AttentionSequence& s = a.sequences[seq];
    if (s.partial < 0) continue;
    const int64_t rows = s.q_len * group;
    const AttentionUnit all{seq, 1, 0, rows, s.first_chunk, s.chunks};
    for (int64_t r = 0; r < rows; ++r) {
      const RowInfo row = row_info(a, all, r);
      Running running{kNever, 0.0f};
      map(values, entry - 16, [](int64_t, auto) { return broadcast(0.0f); });
      for (int64_t c = 0; c < s.chunks; ++c) {
        const float* from = a.partials + (s.partial + (c * a.kv_heads + kv_head) * rows + r) * entry;
        join_values(values, from + 16, entry - 16, join(running, {from[0], from[1]}));
      }
      finish_row(a, row, kv_head * group + row.head, running, values);
    }
  }
}

}  // namespace lmfuse::LMFUSE_ISA
