// Attention over chunks of kKeyChunk keys. For each chunk: keys and values are packed once, and
// all rows that see them follow in blocks: scores s in units of log 2, 2^(s - m) with the largest
// score m of the chunk, weighted values, each from zero. Then the chunk joins what came before it,
//
//   M' = max(M, m),  A' = A 2^(M - M') + a 2^(m - M'),  L' = L 2^(M - M') + l 2^(m - M')
//
// and a span of chunks joins the spans before it in the same way: the same sums, in the same order,
// whether it happens at once or in attention_join after the chunks were spread over threads. One
// decoded token, a prompt, a piece of a prompt: all are computed so.
#include "attention_few.h"
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// out = values / sum, with the sink as one more key of no value. A row that saw no key: zeros.
void finish_row(const AttentionArgs& a, const RowInfo& row, int64_t head, float largest, float sum,
                const float* values) {
  float factor = a.value_scale;
  if (a.sinks) {
    float sink = a.sinks[head] * kLog2E, one = 1.0f, old_part, new_part;
    join({&largest, &sum}, {&sink, &one}, 1, &old_part, &new_part);
    factor *= old_part;
  }
  const Vec inverse = broadcast(sum == 0.0f ? 0.0f : factor / sum);
  const int64_t at = a.sequences[row.seq].out + row.query * a.out_stride_s + head * a.out_stride_h;
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
  using Packed = typename PackedAs<Input>::Type;

  Attend(const AttentionArgs& a, char* scratch)
      : a_(a),
        width_(key_width<Input>(a.dim)),
        query_row_(query_row<Input>(width_)),
        value_width_(round_up(a.value_dim, kPanel)),
        together_(heads_together(a)) {
    Scratch s(scratch);
    queries_ = s.take<Input>(kAttentionRows * query_row_);
    placed_ = s.take<Input>(together_ * kFewRows * query_row_);
    keys_ = s.take<Packed>(kKeyChunk * width_);
    values_ = s.take<Packed>(kKeyChunk * value_width_);
    stage_ = s.take<Packed>(kPanel * (width_ > value_width_ ? width_ : value_width_));
    turned_ = s.take<Packed>(kPanel * width_);
    const int64_t rows = kBlock > together_ * kFewRows ? kBlock : together_ * kFewRows;
    scores_ = s.take<float>(rows * kKeyChunk);
    weights_ = s.take<Input>(rows * kWeightsRow);
    products_ = s.take<float>(rows * value_width_);
    sums_ = s.take<float>(kAttentionRows * value_width_);
    totals_ = s.take<float>(kAttentionRows * value_width_);
    running_ = {s.take<float>(kAttentionRows), s.take<float>(kAttentionRows)};
    total_ = {s.take<float>(kAttentionRows), s.take<float>(kAttentionRows)};
    rows_ = s.take<RowInfo>(kAttentionRows);
    const auto found = [&] {
      Found* to = s.take<Found>(1);
      float* of_keys = s.take<float>(a.key.scale ? together_ * kKeyChunk : 0);
      float* of_values = s.take<float>(a.value.scale ? together_ * kKeyChunk : 0);
      if (!scratch) return to;
      to->seq = nullptr;
      to->keys.scale = a.key.scale ? of_keys : nullptr;
      to->values.scale = a.value.scale ? of_values : nullptr;
      return to;
    };
    now_ = found();
    next_ = found();
    scratch_ = s.used();
  }
  int64_t scratch() const { return scratch_; }

  // KV heads of a unit that are computed together.
  struct Work {
    const AttentionUnit* unit;
    int64_t kv_head, heads;
  };

  // What is first of the items [begin, end); of none, a unit of null.
  Work work(int64_t begin, int64_t end) const {
    if (begin == end) return {nullptr, 0, 0};
    const AttentionUnit& u = a_.units[begin / a_.kv_heads];
    const int64_t kv_head = begin % a_.kv_heads;
    const int64_t most = u.seq_count * u.row_count > kFewRows ? 1 : together_;
    return {&u, kv_head, smaller(most, smaller(end - begin, a_.kv_heads - kv_head))};
  }

  // next: whose first keys are fetched already.
  void run(const Work& work, const Work& next) {
    const AttentionUnit& u = *work.unit;
    const int64_t kv_head = work.kv_head, heads = work.heads;
    const int64_t count = u.seq_count * u.row_count, group = a_.heads / a_.kv_heads;
    first_head_ = kv_head * group;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < count; ++r) {
        RowInfo& row = rows_[h * count + r];
        row = row_info(a_, u, r);
        row.head += h * group;
        load_query(row, queries_ + r * query_row_);
      }
      if (count > kFewRows) continue;
      for (int64_t i = count * query_row_; i < kFewRows * query_row_; ++i) queries_[i] = Input{};
      place_queries(queries_, query_row_, placed_ + h * kFewRows * query_row_);
    }
    const int64_t rows = heads * count, last = u.chunk + u.chunk_count;
    const bool whole = a_.sequences[u.seq].partial < 0;
    clear(running_, rows);
    clear_values(sums_, rows * value_width_);
    clear(total_, rows);
    clear_values(totals_, rows * value_width_);
    for (int64_t c = u.chunk, first = c; c < last; ++c) {
      Found* found = next_;
      next_ = now_;
      now_ = found;
      if (c + 1 < last) {
        look_ahead(work, c + 1);
      } else if (next.unit) {
        look_ahead(next, next.unit->chunk);
      } else {
        next_->seq = nullptr;
        next_->keys.count = next_->values.count = 0;
      }
      chunk(work, c);
      // Only what begins a span can be joined to before it is left.
      const bool ends = c + 1 == last || (c + 1) % kSpan == 0;
      if (!ends && (whole || first % kSpan == 0)) continue;
      for (int64_t h = 0; h < heads && !whole; ++h)
        for (int64_t r = 0; r < count; ++r)
          leave(u, first, c + 1 - first, h * count + r, kv_head + h);
      if (whole) join_span(rows);
      clear(running_, rows);
      clear_values(sums_, rows * value_width_);
      first = c + 1;
    }
    for (int64_t r = 0; r < rows && whole; ++r)
      finish_row(a_, rows_[r], first_head_ + rows_[r].head, total_.largest[r], total_.sum[r],
                 totals_ + r * value_width_);
  }

 private:
  // Rows that share one pass over the packed chunk: some tiles, so that it is worth reading.
  static constexpr int64_t kBlock =
      Tile::kRows >= 24 ? Tile::kRows : 24 / Tile::kRows * Tile::kRows;
  static constexpr int64_t kWeightsRow = kKeyChunk + 32;  // apart in the first-level cache

  int64_t key_bytes() const { return a_.dim * kv_bytes(a_.key.type); }
  int64_t value_bytes() const { return a_.value_dim * kv_bytes(a_.value.type); }

  void load_query(const RowInfo& row, Input* to) {
    const int64_t head = first_head_ + row.head;
    const int64_t at = a_.sequences[row.seq].query + row.query * a_.q_stride_s +
                       head / a_.q_group * a_.q_stride_group + head % a_.q_group * a_.q_stride_h;
    with_type(a_.dtype, [&](auto t) {
      const auto* from = static_cast<const decltype(t)*>(a_.query) + at;
      const auto widen = [&](auto* row) {
        map(row, a_.dim, [&](int64_t i, auto l) { return load(from + i, l); });
        for (int64_t i = a_.dim; i < width_; ++i) row[i] = {};
      };
      if constexpr (__is_same(Input, split_t)) {
        widen(scores_);
        split_row(width_, scores_, to, query_row_);
      } else {
        widen(to);
      }
    });
  }

  // The last position that one of the rows sees, at most limit.
  int64_t last_seen(int64_t first, int64_t count, int64_t limit) const {
    int64_t end = 0;
    for (int64_t r = first; r < first + count; ++r)
      if (rows_[r].end > rows_[r].begin && rows_[r].end > end) end = rows_[r].end;
    return end < limit ? end : limit;
  }

  // Where the keys and values of a chunk are.
  struct Found {
    const AttentionSequence* seq;
    int64_t kv_head, begin;
    ChunkRows keys, values;
  };

  void find(Found& to, const Work& work, int64_t begin, int64_t end) {
    const AttentionSequence& s = a_.sequences[work.unit->seq];
    to.seq = &s;
    to.kv_head = work.kv_head;
    to.begin = begin;
    find_rows(a_, s, a_.key, s.key, s.key_scale, work.kv_head, work.heads, begin, end, to.keys);
    find_rows(a_, s, a_.value, s.value, s.value_scale, work.kv_head, work.heads, begin, end,
              to.values);
  }

  void look_ahead(const Work& work, int64_t c) {
    const int64_t begin = c * kKeyChunk, length = a_.sequences[work.unit->seq].kv_len;
    const int64_t end = smaller(length, begin + kKeyChunk);
    if (end > begin) {
      find(*next_, work, begin, end);
    } else {
      next_->seq = nullptr;
      next_->keys.count = next_->values.count = 0;
    }
  }

  // The rows kPanelsAhead panels on, which may be those of the next chunk: far enough to reach over
  // the products between two chunks.
  RowsAhead ahead(int64_t panel, int64_t panels, bool keys) const {
    constexpr int64_t kPanelsAhead = 2;
    const int64_t p = panel + kPanelsAhead;
    const Found& from = p < panels ? *now_ : *next_;
    const ChunkRows& rows = keys ? from.keys : from.values;
    const int64_t first = (p < panels ? p : p - panels) * kPanel;
    return {rows.row + first, rows.count - first, keys ? key_bytes() : value_bytes()};
  }

  void chunk(const Work& work, int64_t c) {
    const AttentionUnit& u = *work.unit;
    const int64_t count = u.seq_count * u.row_count;
    const int64_t begin = c * kKeyChunk, end = last_seen(0, count, begin + kKeyChunk);
    if (end <= begin) return;
    if (now_->seq == &a_.sequences[u.seq] && now_->kv_head == work.kv_head &&
        now_->begin == begin) {
      now_->keys.shorten(end - begin, work.heads);
      now_->values.shorten(end - begin, work.heads);
    } else {
      find(*now_, work, begin, end);
    }
    if (count <= kFewRows) return few(begin, count, work.heads);
    const int64_t panels = (end - begin + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p) {
      pack_keys(a_.key.type, now_->keys, p, a_.dim, stage_, keys_ + p * kPanel * width_,
                ahead(p, panels, true));
      pack_values(a_.value.type, now_->values, p * kPanel, a_.value_dim, stage_, values_,
                  kKeyChunk * kPanel, ahead(p, panels, false));
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
  void multiply(Tile& tile, const Place& place, const Input* x, int64_t lda, const Packed* b,
                int64_t panel_stride, int64_t panels, int64_t k, float* acc, int64_t acc_stride) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t t = 0; t < place.tiles; ++t) {
        const char* panel = reinterpret_cast<const char*>(b + p * panel_stride);
        tile.run(x + place.first(t) * lda, lda, panel, k,
                 acc + p * acc_stride + t * Tile::kRows * kPanel, false,
                 Ahead::of_next(panel, 0, 0, kWhole));  // all is in the caches
      }
  }

  // The weights of row r of the unit, which sees head h of its values.
  void weigh(int64_t begin, int64_t h, int64_t r, const Scores& scores, Input* weights,
             Softmax to) {
    const RowInfo& row = rows_[r];
    const RowSums sums = softmax_row(a_, row, first_head_ + row.head, begin, now_->values.scales(h),
                                     scores, Weights<Input>(weights, kWeightsRow));
    *to.largest = sums.largest;
    *to.sum = sums.sum;
  }

  FewPart few_part(const ChunkRows& rows, int64_t heads, const KvSource& from, int64_t dim) const {
    constexpr int64_t kFirstLevel = 32768;
    const int64_t size = kv_bytes(from.type);
    return {&rows, heads, dim * size, from.stride.head * size,
            from.stride.token * size * kPanel > kFirstLevel};
  }

  // All rows of some heads of the unit, which are few, over the chunk as it lies.
  void few(int64_t begin, int64_t count, int64_t heads) {
    constexpr int64_t kMost = kMostTogether * kFewRows;
    alignas(64) float largest[kMost], sum[kMost], old_part[kMost], new_part[kMost];
    const FewPart keys = few_part(now_->keys, heads, a_.key, a_.dim);
    const FewPart values = few_part(now_->values, heads, a_.value, a_.value_dim);
    const int64_t rows = heads * count, padded = round_up(now_->keys.count, kPanel);
    typename FewRows<Tile>::Ahead ahead(keys, values, next_->keys);
    FewRows<Tile>::scores(a_.key.type, keys, width_, placed_, count, stage_, turned_, scores_,
                          ahead);
    for (int64_t h = 0, r = 0; h < heads; ++h)
      for (int64_t i = 0; i < count; ++i, ++r) {
        float* scores = scores_ + h * kFewRows * kKeyChunk + i * kPanel;
        weigh(begin, h, r, {scores, kFewRows * kPanel, padded}, weights_ + r * kWeightsRow,
              {largest + r, sum + r});
        ahead.of_weights(rows);
      }
    join(running_, {largest, sum}, rows, old_part, new_part);
    FewRows<Tile>::values(a_.value.type, values, value_width_, weights_, kWeightsRow, count, stage_,
                          values_, products_, ahead);
    for (int64_t h = 0, r = 0; h < heads; ++h)
      for (int64_t i = 0; i < count; ++i, ++r)
        for (int64_t d = 0; d < value_width_; d += kPanel)
          join_values(sums_ + r * value_width_ + d,
                      products_ + (h * value_width_ + d) * count + i * kPanel, kPanel, old_part[r],
                      new_part[r]);
  }

  // Rows [first, first + count) over the packed chunk.
  void block(int64_t begin, int64_t first, int64_t count) {
    const int64_t seen = last_seen(first, count, begin + kKeyChunk) - begin;
    if (seen <= 0) return;
    const int64_t panels = (seen + kPanel - 1) / kPanel, keys = panels * kPanel;
    const int64_t panel_rows = kBlock * kPanel;  // of scores
    const Place place(count);
    Tile tile(place.height);
    multiply(tile, place, queries_ + first * query_row_, query_row_, keys_, kPanel * width_, panels,
             width_, scores_, panel_rows);

    alignas(64) float largest[kBlock], sum[kBlock], old_part[kBlock], new_part[kBlock];
    for (int64_t r = 0; r < count; ++r) {
      const Scores scores{scores_ + place.at(r, tile.rows()) * kPanel, panel_rows, keys};
      if (now_->keys.scale) scores.multiply(now_->keys.scale);
      weigh(begin, 0, first + r, scores, weights_ + r * kWeightsRow, {largest + r, sum + r});
    }
    join({running_.largest + first, running_.sum + first}, {largest, sum}, count, old_part,
         new_part);

    for (int64_t d = 0; d < value_width_; d += kPanel) {
      multiply(tile, place, weights_, kWeightsRow, values_ + d * kKeyChunk, 0, 1, keys, products_,
               0);
      for (int64_t r = 0; r < count; ++r)
        join_values(sums_ + (first + r) * value_width_ + d,
                    products_ + place.at(r, tile.rows()) * kPanel, kPanel, old_part[r],
                    new_part[r]);
    }
  }

  // The sums of `rows` rows over a span to those over the spans before it.
  void join_span(int64_t rows) {
    alignas(64) float old_part[kAttentionRows], new_part[kAttentionRows];
    join(total_, running_, rows, old_part, new_part);
    for (int64_t r = 0; r < rows; ++r)
      join_values(totals_ + r * value_width_, sums_ + r * value_width_, value_width_, old_part[r],
                  new_part[r]);
  }

  // The sums of a row over `count` chunks, for attention_join.
  void leave(const AttentionUnit& u, int64_t chunk, int64_t count, int64_t r, int64_t kv_head) {
    const AttentionSequence& s = a_.sequences[rows_[r].seq];
    const float* values = sums_ + r * value_width_;
    const int64_t rows = s.q_len * (a_.heads / a_.kv_heads), row = u.row + r % u.row_count;
    const int64_t entry =
        s.partial + ((chunk - s.first_chunk) * a_.kv_heads + kv_head) * rows + row;
    float* to = a_.partials + entry * attention_entry(a_.value_dim);
    to[0] = running_.largest[r];
    to[1] = running_.sum[r];
    to[2] = static_cast<float>(count);
    map(to + 16, value_width_, [&](int64_t i, auto l) { return load(values + i, l); });
  }

  const AttentionArgs& a_;
  const int64_t width_, query_row_, value_width_, together_;
  int64_t scratch_, first_head_ = 0;
  Input *queries_, *placed_, *weights_;
  Packed *keys_, *values_, *stage_, *turned_;
  float *scores_, *products_;
  float *sums_, *totals_;    // of values, over the span so far and over the spans before it
  Softmax running_, total_;  // the same of weights
  RowInfo* rows_;
  Found *now_, *next_;
};

#if defined(LMFUSE_TILES)
using PairTile = AmxTile;
#elif defined(__AVX512BF16__)
using PairTile = DotTile;
#else
using PairTile = FmaTile<float>;  // bf16 widens to it exactly
#endif

// Products of bf16 where the queries are bf16 and the cache is exact in it, else of fp32. Of
// integers where the cache is int8 and bytes have a product.
template <class F>
void with_tile(const AttentionArgs& a, F f) {
  const auto exact = [](KvType type) { return type != KvType::f32 && type != KvType::f16; };
#if defined(LMFUSE_INTS)
  const auto ints = [](const KvSource& from) { return from.type == KvType::i8 && from.scale; };
  if (a.dtype == DType::bf16 && ints(a.key) && ints(a.value) && a.dim <= kMostInts)
    return f.template operator()<IntTile>();
#endif
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
    for (auto work = attend.work(begin, end); work.unit;) {
      begin += work.heads;
      const auto next = attend.work(begin, end);
      attend.run(work, next);
      work = next;
    }
  });
}

void attention_join(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t group = a.heads / a.kv_heads, entry = attention_entry(a.value_dim);
  float* values = reinterpret_cast<float*>(a.scratch);
  float* of_span = values + entry - 16;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t seq = i / a.kv_heads, kv_head = i % a.kv_heads;
    const AttentionSequence& s = a.sequences[seq];
    if (s.partial < 0) continue;
    const int64_t rows = s.q_len * group;
    const AttentionUnit all{seq, 1, 0, rows, s.first_chunk, s.chunks};
    for (int64_t r = 0; r < rows; ++r) {
      const RowInfo row = row_info(a, all, r);
      float largest = kNever, sum = 0.0f, old_part, new_part;
      clear_values(values, entry - 16);
      for (int64_t c = 0; c < s.chunks;) {
        float span_largest = kNever, span_sum = 0.0f;
        clear_values(of_span, entry - 16);
        do {
          float* from = a.partials + (s.partial + (c * a.kv_heads + kv_head) * rows + r) * entry;
          c += static_cast<int64_t>(from[2]);
          join({&span_largest, &span_sum}, {from, from + 1}, 1, &old_part, &new_part);
          join_values(of_span, from + 16, entry - 16, old_part, new_part);
        } while (c < s.chunks && (s.first_chunk + c) % kSpan != 0);
        join({&largest, &sum}, {&span_largest, &span_sum}, 1, &old_part, &new_part);
        join_values(values, of_span, entry - 16, old_part, new_part);
      }
      finish_row(a, row, kv_head * group + row.head, largest, sum, values);
    }
  }
}

}  // namespace lmfuse::LMFUSE_ISA
