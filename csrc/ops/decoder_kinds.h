// Which positions the layers of each kind see in a call, and their angles.
#pragma once

#include <limits>

#include "decoder_steps.h"
#include "linear.h"
#include "rope.h"

namespace lmfuse {

// The slots of a table, one row for each sequence.
class SlotTable {
 public:
  SlotTable(const Tensor& table, const char* name, int64_t all)
      : name_(name), all_(all), wide_(table.scalar_type() == ScalarType::Long) {
    LMFUSE_CHECK(
        table.is_cpu() && table.dim() == 2 && (wide_ || table.scalar_type() == ScalarType::Int),
        name, " must be a CPU tensor of two dimensions, of int32 or int64");
    LMFUSE_CHECK_VALUE(all <= std::numeric_limits<int32_t>::max(), "the caches have ", all,
                       " slots, but may have at most 2^31 - 1");
    data_ = table.const_data_ptr();
    rows = table.size(0);
    columns = table.size(1);
    stride_ = table.stride(0);
    step_ = table.stride(1);
  }

  int32_t operator()(int64_t row, int64_t column) const {
    const int64_t at = row * stride_ + column * step_;
    const int64_t slot =
        wide_ ? static_cast<const int64_t*>(data_)[at] : static_cast<const int32_t*>(data_)[at];
    LMFUSE_CHECK_VALUE(slot >= 0 && slot < all_, name_, "[", row, ", ", column, "] is ", slot,
                       ", but the caches have ", all_, " slots");
    return static_cast<int32_t>(slot);
  }

  int64_t rows, columns;

 private:
  const char* name_;
  int64_t all_;
  bool wide_;
  const void* data_;
  int64_t stride_, step_;
};

// Where the keys of each sequence are, and how many of them.
struct Tables {
  std::vector<int64_t> slots, first;
  std::vector<int32_t> own;
  int64_t width;

  // Each sequence has its row of block_tables.
  Tables(const Tensor& new_slots, const Tensor& tables, const Tensor& cu_lens, const DecoderCall& c,
         int64_t all)
      : slots(integers(new_slots, "slots")), first(integers(cu_lens, "cu_seqlens")) {
    LMFUSE_CHECK_VALUE(static_cast<int64_t>(slots.size()) == c.rows(), "slots has ",
                       static_cast<int64_t>(slots.size()), " elements for ", c.rows(), " tokens");
    for (int64_t slot : slots)
      LMFUSE_CHECK_VALUE(slot >= 0 && slot < all, "slots has ", slot, ", but the caches have ", all,
                         " slots");
    const SlotTable table(tables, "block_tables", all);
    LMFUSE_CHECK_VALUE(
        table.rows == c.batch && static_cast<int64_t>(first.size()) == c.batch + 1 && first[0] == 0,
        "block_tables and cu_seqlens must be for ", c.batch, " sequences");
    width = table.columns;
    for (int64_t b = 0; b < c.batch; ++b)
      LMFUSE_CHECK_VALUE(length(b) >= 0 && length(b) <= width, "the length of sequence ", b, " is ",
                         length(b), ", but its row of block_tables has ", width);
    read(table, [](int64_t) { return 0; });
  }

  // Sequence b sees the columns [begin[b], end) of its row; the last are those of the new tokens.
  Tables(const Tensor& tables, int64_t end, const int64_t* begin, const DecoderCall& c, int64_t all)
      : first(c.batch + 1), width(0) {
    const SlotTable table(tables, "tables", all);
    LMFUSE_CHECK_VALUE(table.rows == c.batch, "tables must be for ", c.batch, " sequences");
    LMFUSE_CHECK_VALUE(end >= c.tokens && end <= table.columns, "columns end at ", end,
                       ", but there are ", c.tokens, " tokens, and ", table.columns,
                       " columns of tables");
    for (int64_t b = 0; b < c.batch; ++b) {
      LMFUSE_CHECK_VALUE(begin[b] >= 0 && begin[b] <= end, "columns of sequence ", b, " begin at ",
                         begin[b], ", but end at ", end);
      first[b + 1] = first[b] + end - begin[b];
      width = std::max(width, end - begin[b]);
    }
    read(table, [&](int64_t b) { return begin[b]; });
    for (int64_t r = 0; r < c.rows(); ++r)
      slots.push_back(table(r / c.tokens, end - c.tokens + r % c.tokens));
  }

  int64_t length(int64_t b) const { return first[b + 1] - first[b]; }

  // The slot of the first key of the only sequence, if the others follow it; else -1.
  int64_t in_order() const {
    if (first.size() != 2 || length(0) == 0) return -1;
    for (int64_t i = 1; i < length(0); ++i)
      if (own[i] != own[0] + i) return -1;
    return own[0];
  }

 private:
  template <class F>
  void read(const SlotTable& table, const F& begin) {
    own.resize(table.rows * width);
    for (int64_t b = 0; b < table.rows; ++b)
      for (int64_t i = 0; i < length(b); ++i) own[b * width + i] = table(b, begin(b) + i);
  }
};

inline void plan_attention(const DecoderCall& c, const DecoderLayer& l, const DecoderCache& cache,
                           const Tables& t, DecoderKind& kind) {
  AttentionArgs& a = kind.attention;
  a.dtype = c.type;
  a.key = cache.key;
  a.value = cache.value;
  a.heads = l.heads;
  a.kv_heads = l.kv_heads;
  a.dim = a.value_dim = l.head_dim;
  a.value_scale = 1.0f;
  a.window_left = l.window;
  a.window_right = 0;
  kind.first_slot = t.in_order();
  a.block = kind.first_slot < 0 ? 1 : int64_t{1} << 40;
  const int64_t in = row_stride(l.columns, c.rows()), out = row_stride(l.attended(), c.rows());
  a.q_stride_s = in;
  a.q_group = l.heads / l.groups;
  a.q_stride_group = l.group_stride;
  a.q_stride_h = l.head_dim;
  a.out_stride_s = out;
  a.out_stride_h = l.head_dim;
  for (int64_t b = 0; b < c.batch; ++b) {
    AttentionSequence s{};
    s.query = b * c.tokens * in;
    s.out = b * c.tokens * out;
    s.q_len = c.tokens;
    s.kv_len = t.length(b);
    s.table = kind.first_slot < 0 ? t.own.data() + b * t.width : nullptr;
    kind.plan.sequences.push_back(s);
  }
  make_units(a, kind.plan, thread_count());
  a.sequences = kind.plan.sequences.data();
  a.units = kind.plan.units.data();
  kind.shares.emplace(a, kind.plan);
  kind.cache.from_type = c.type;
  kind.cache.slots = t.slots.data();
  kind.cache.block = 1;
}

// The kinds of a call, and what they point to.
class Kinds {
 public:
  explicit Kinds(DecoderCall& c) : c_(c) {
    for (size_t i = 0; i < c.layers.size(); ++i) {
      const size_t kind = c.layers[i].kind;
      if (kind == count()) {
        firsts_.push_back(i);
        slots_.push_back(c.caches[i].slots);
      }
      slots_[kind] = std::min(slots_[kind], c.caches[i].slots);
      rotary_dim_ = std::max(rotary_dim_, c.layers[i].rotary_dim);
    }
    c.kinds.resize(count());
    tables_.reserve(count());
    angles_.reserve(count());
  }

  size_t count() const { return firsts_.size(); }

  // tables(k, slots): those of a kind, whose caches have so many slots.
  template <class F>
  void plan(const F& tables) {
    for (size_t k = 0; k < count(); ++k) {
      tables_.push_back(tables(k, slots_[k]));
      plan_attention(c_, c_.layers[firsts_[k]], c_.caches[firsts_[k]], tables_[k], c_.kinds[k]);
    }
  }

  // cos and sin of each kind, first all cos: for each token, or of each position, of which that of
  // the first token of each sequence is given.
  void turn(const std::vector<Tensor>& angles, const std::vector<int64_t>& positions) {
    if (!rotary_dim_) return;
    LMFUSE_CHECK_VALUE(angles.size() == 2 * count(), "cos and sin must be given ",
                       static_cast<int64_t>(count()), " times, once for each kind of layer");
    const auto known = in_a_row(positions);
    for (size_t k = 0; k < count(); ++k) {
      const DecoderLayer& l = c_.layers[firsts_[k]];
      const Tensor &cos = angles[k], &sin = angles[count() + k];
      LMFUSE_CHECK_VALUE(cos.dim() == (known ? 2 : 3), "cos and sin must be ",
                         known ? "[positions, width]" : "[batch, tokens, width]");
      angles_.push_back(RopeTable{sin, cos, known, rotary_dim_, true});
      RopeArgs& rope = c_.kinds[k].rope;
      rope = angles_.back().args({c_.batch, c_.tokens, l.heads, l.head_dim, 0, 0, 0});
      rope.dtype = c_.type;
    }
  }

 private:
  // [batch, tokens]
  std::optional<Tensor> in_a_row(const std::vector<int64_t>& first) const {
    if (first.empty()) return {};
    LMFUSE_CHECK_VALUE(static_cast<int64_t>(first.size()) == c_.batch, "there are ",
                       static_cast<int64_t>(first.size()), " positions for ", c_.batch,
                       " sequences");
    const int64_t sizes[2] = {c_.batch, c_.tokens};
    Tensor all = new_tensor(sizes, 2, ScalarType::Long);
    auto* at = static_cast<int64_t*>(all.mutable_data_ptr());
    for (int64_t p : first)
      for (int64_t t = 0; t < c_.tokens; ++t)
        *at++ = static_cast<int64_t>(static_cast<uint64_t>(p) + t);
    return all;
  }

  DecoderCall& c_;
  std::vector<size_t> firsts_;  // layers
  std::vector<int64_t> slots_;
  int64_t rotary_dim_ = 0;
  std::vector<Tables> tables_;
  std::vector<RopeTable> angles_;
};

}  // namespace lmfuse
