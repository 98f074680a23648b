// A stack of decoder layers over packed weights and caches, in one call: from the hidden states
// before the first layer to those after the last.
#include <limits>
#include <set>

#include "buffers.h"
#include "decoder_steps.h"
#include "rope.h"

namespace lmfuse {
namespace {

// Rows of k, or of each of these, for the products that follow; joint: all workers write them
// together.
DecoderStage stage(Buffers& b, const DecoderCall& c, const std::set<int64_t>& ks, bool joint,
                   int64_t threads) {
  const int64_t copies = c.alone() && !joint ? threads : 1;
  const int64_t stride = row_stride(*ks.rbegin(), c.rows());
  const int64_t size = c.rows() * stride * c.element();
  DecoderStage s{b.take(copies * size), stride, copies > 1 ? size : 0};
  for (const int64_t k : ks)
    if (s.data) pad_rows(rows_matrix(s.data, c.type, copies * c.rows(), stride), k);
  return s;
}

// The first layer with a mixture of experts, or null.
const DecoderLayer* mixture(const DecoderCall& c) {
  for (const DecoderLayer& l : c.layers)
    if (l.mixes()) return &l;
  return nullptr;
}

// What the products of all layers need: bytes of a form of their rows, and of scratch.
void size_rows(DecoderCall& c) {
  for (const DecoderLayer& l : c.layers)
    l.each_linear([&](const DecoderLinear& linear) {
      const DecoderRows rows(linear, c.type, c.rows(), &linear == &l.gate && l.joined());
      c.ready_each = std::max(c.ready_each, rows.bytes());
      c.scratch_step = std::max(c.scratch_step, (rows.scratch_bytes() + 63) / 64 * 64);
    });
}

// The mixtures of layers like l, one after the other, in the same place.
void size_experts(DecoderCall& c, const DecoderLayer& l, ExpertsCall& e) {
  e.tokens = c.rows();
  e.chosen = l.chosen;
  e.n = l.expert_inner;
  e.k = c.hidden;
  e.type = c.type;
  e.weights.resize(e.rows());
  for (const DecoderLayer& layer : c.layers)
    if (layer.mixes()) e.size(layer.experts, e.tokens);
  c.experts = &e;
}

void carve(Buffers& b, DecoderCall& c, int64_t threads) {
  const DecoderLayer& l = c.layers[0];
  int64_t wide_gate_up = 0, logits = 0;
  std::set<int64_t> inners{0};
  for (const DecoderLayer& layer : c.layers) {
    inners.insert(layer.inner());
    if (layer.gated) wide_gate_up = std::max(wide_gate_up, 2 * layer.inner());
    if (layer.mixes()) logits = std::max(logits, layer.router.n + layer.shared_gate.n);
  }
  c.normed = stage(b, c, {c.hidden}, false, threads);
  c.attended = stage(b, c, {l.attended()}, true, threads);
  c.inner = stage(b, c, inners, true, threads);
  const int64_t forms = DecoderProducts::kMost * c.ready_each;
  c.ready = b.take((c.alone() ? threads : 1) * forms);
  c.ready_step = c.alone() ? forms : 0;
  const auto wide = [&](int64_t width) {
    const int64_t stride = row_stride(width, c.rows());
    return rows_matrix(b.take(c.rows() * stride * c.element()), c.type, c.rows(), stride);
  };
  c.projected = wide(l.columns);
  c.branch = wide(c.hidden);
  c.middle = wide(c.hidden);
  c.gate_up = wide(wide_gate_up);
  if (c.experts) {
    c.logits = wide(logits);
    c.index = reinterpret_cast<int64_t*>(b.take(c.experts->rows() * 8));
    c.experts->carve(b, threads);
    c.experts->y = c.branch;
  }
  c.scratch = b.take(threads * c.scratch_step);
  int64_t entries = 0;
  for (const DecoderKind& kind : c.kinds) {
    const int64_t size = (kernels().attention_scratch(kind.attention) + 63) / 64 * 64;
    c.attention_scratch_step = std::max(c.attention_scratch_step, size);
    entries = std::max(entries, kind.plan.entries);
  }
  c.attention_scratch = b.take(threads * c.attention_scratch_step);
  auto* partials = reinterpret_cast<float*>(b.take(entries * attention_entry(l.head_dim) * 4));
  for (DecoderKind& kind : c.kinds) {
    kind.attention.query = c.projected.data;
    kind.attention.out = c.attended.data;
    kind.attention.partials = partials;
  }
}

// Where the keys of each sequence are: its row of block_tables, and how many of them.
struct Tables {
  std::vector<int64_t> slots, first;
  std::vector<int32_t> own;
  int64_t width;

  Tables(const Tensor& new_slots, const Tensor& tables, const Tensor& cu_lens, const DecoderCall& c,
         int64_t all)
      : slots(integers(new_slots, "slots")), first(integers(cu_lens, "cu_seqlens")) {
    LMFUSE_CHECK_VALUE(static_cast<int64_t>(slots.size()) == c.rows(), "slots has ",
                       static_cast<int64_t>(slots.size()), " elements for ", c.rows(), " tokens");
    for (int64_t slot : slots)
      LMFUSE_CHECK_VALUE(slot >= 0 && slot < all, "slots has ", slot, ", but the caches have ", all,
                         " slots");
    LMFUSE_CHECK_VALUE(all <= std::numeric_limits<int32_t>::max(), "the caches have ", all,
                       " slots, but may have at most 2^31 - 1");
    LMFUSE_CHECK(tables.dim() == 2, "block_tables must have two dimensions");
    LMFUSE_CHECK_VALUE(tables.size(0) == c.batch &&
                           static_cast<int64_t>(first.size()) == c.batch + 1 && first[0] == 0,
                       "block_tables and cu_seqlens must be for ", c.batch, " sequences");
    width = tables.size(1);
    read(tables, all);
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
  void read(const Tensor& tables, int64_t all) {
    const bool wide = tables.scalar_type() == ScalarType::Long;
    LMFUSE_CHECK(tables.is_cpu() && (wide || tables.scalar_type() == ScalarType::Int),
                 "block_tables must be a CPU tensor of int32 or int64");
    const void* data = tables.const_data_ptr();
    const int64_t stride = tables.stride(0), step = tables.stride(1);
    own.resize((first.size() - 1) * width);
    for (size_t b = 0; b + 1 < first.size(); ++b) {
      LMFUSE_CHECK_VALUE(length(b) >= 0 && length(b) <= width, "the length of sequence ",
                         static_cast<int64_t>(b), " is ", length(b),
                         ", but its row of block_tables has ", width);
      for (int64_t i = 0; i < length(b); ++i) {
        const int64_t at = b * stride + i * step;
        const int64_t slot =
            wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
        LMFUSE_CHECK_VALUE(slot >= 0 && slot < all, "block_tables[", static_cast<int64_t>(b), ", ",
                           i, "] is ", slot, ", but the caches have ", all, " slots");
        own[b * width + i] = static_cast<int32_t>(slot);
      }
    }
  }
};

void plan_attention(const DecoderCall& c, const DecoderLayer& l, const DecoderCache& cache,
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

// The kinds of a call, and what they point to. For each there are slots, block_tables and
// cu_seqlens in `rows`, first all slots, and cos and sin in `angles`. (A list is 0.7 us.)
class Kinds {
 public:
  Kinds(DecoderCall& c, const std::vector<Tensor>& rows, const std::vector<Tensor>& angles) {
    std::vector<size_t> firsts;  // layers
    std::vector<int64_t> slots;
    int64_t rotary_dim = 0;
    for (size_t i = 0; i < c.layers.size(); ++i) {
      const size_t kind = c.layers[i].kind;
      if (kind == firsts.size()) {
        firsts.push_back(i);
        slots.push_back(c.caches[i].slots);
      }
      slots[kind] = std::min(slots[kind], c.caches[i].slots);
      rotary_dim = std::max(rotary_dim, c.layers[i].rotary_dim);
    }
    const size_t count = firsts.size();
    LMFUSE_CHECK_VALUE(rows.size() == 3 * count,
                       "slots, block_tables and cu_seqlens must be given ",
                       static_cast<int64_t>(count), " times, once for each kind of layer");
    LMFUSE_CHECK_VALUE(!rotary_dim || angles.size() == 2 * count, "cos and sin must be given ",
                       static_cast<int64_t>(count), " times, once for each kind of layer");
    c.kinds.resize(count);
    tables_.reserve(count);
    angles_.reserve(count);
    for (size_t k = 0; k < count; ++k) {
      const DecoderLayer& l = c.layers[firsts[k]];
      if (rotary_dim) rotate(c, l, angles[k], angles[count + k], rotary_dim, c.kinds[k]);
      tables_.emplace_back(rows[k], rows[count + k], rows[2 * count + k], c, slots[k]);
      plan_attention(c, l, c.caches[firsts[k]], tables_[k], c.kinds[k]);
    }
  }

 private:
  void rotate(const DecoderCall& c, const DecoderLayer& l, const Tensor& cos, const Tensor& sin,
              int64_t rotary_dim, DecoderKind& kind) {
    LMFUSE_CHECK_VALUE(cos.dim() == 3, "cos and sin must be [batch, tokens, width]");
    angles_.push_back(RopeTable{sin, cos, {}, rotary_dim, true});
    kind.rope = angles_.back().args({c.batch, c.tokens, l.heads, l.head_dim, 0, 0, 0});
    kind.rope.dtype = c.type;
  }

  std::vector<Tables> tables_;
  std::vector<RopeTable> angles_;
};

// How many threads are worth waking: each has at least 256k products.
int64_t team_size(const DecoderCall& c) {
  int64_t weights = 0;
  for (const DecoderLayer& l : c.layers) {
    const int64_t inner = l.chosen * l.expert_inner + l.inner();
    weights += c.hidden * (l.columns + 3 * inner) + l.attended() * c.hidden;
  }
  const int64_t most = weights * c.rows() >> 18;
  return std::min(thread_count(), std::max<int64_t>(most, 1));
}

// The number of a stack that lives until it is closed.
int64_t decoder_open(std::vector<Tensor> parameters, Tensor layout, Tensor numbers) {
  return Kept<DecoderStack>::keep(
      std::make_shared<DecoderStack>(std::move(parameters), layout, numbers));
}

void decoder_close(int64_t stack) { Kept<DecoderStack>::forget(stack); }

// The number of caches that are kept until they are closed.
int64_t decoder_open_caches(std::vector<Tensor> caches) {
  return Kept<DecoderCaches>::keep(std::make_shared<DecoderCaches>(std::move(caches)));
}

void decoder_close_caches(int64_t caches) { Kept<DecoderCaches>::forget(caches); }

// hidden_states [batch, tokens, hidden]; see functional/decoder.py for the others.
Tensor decoder(Tensor hidden_states, int64_t stack, int64_t caches, std::vector<Tensor> rows,
               std::vector<Tensor> angles) {
  LMFUSE_CHECK(hidden_states.is_cpu() && hidden_states.dim() == 3 && hidden_states.numel() > 0,
               "hidden_states must be a CPU tensor [batch, tokens, hidden], and not be empty");
  if (!hidden_states.is_contiguous()) hidden_states = torch::stable::contiguous(hidden_states);
  const auto known = Kept<DecoderStack>::find(stack, "stack");
  const auto kept = Kept<DecoderCaches>::find(caches, "caches");
  const DecoderCaches& arenas = *kept;
  const DType type = dtype(hidden_states, "hidden_states");
  const DecoderLayer& first = known->layers()[0];
  LMFUSE_CHECK_VALUE(hidden_states.size(2) == first.hidden(), "hidden_states must have ",
                     first.hidden(), " features");
  for (const DecoderLayer& l : known->layers())
    l.each_linear([&](const DecoderLinear& linear) {
      LMFUSE_CHECK_VALUE(linear.quantized || linear.type == type,
                         "hidden_states must have the dtype of the weights");
    });
  for (const DecoderLayer& l : known->layers())
    LMFUSE_CHECK_VALUE(!l.mixes() || l.experts.down.quantized() || l.experts.down.type == type,
                       "hidden_states must have the dtype of the weights of experts");
  arenas.check(known->layers(), type);
  DecoderCall c{known->layers(), arenas.layers};
  c.batch = hidden_states.size(0);
  c.tokens = hidden_states.size(1);
  c.hidden = hidden_states.size(2);
  c.type = type;
  const Kinds kinds(c, rows, angles);
  Tensor y = new_like(hidden_states, "hidden_states");
  c.x = rows_matrix(const_cast<void*>(hidden_states.const_data_ptr()), c.type, c.rows(), c.hidden);
  c.y = rows_matrix(y.mutable_data_ptr(), c.type, c.rows(), c.hidden);
  const int64_t threads = team_size(c);
  size_rows(c);
  ExpertsCall experts{};
  if (const DecoderLayer* l = mixture(c)) size_experts(c, *l, experts);
  const Buffers buffers([&](Buffers& b) { carve(b, c, threads); });
  together(threads, [&](Worker& w) { DecoderWorker(c, w).run(); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("decoder_open(Tensor[] parameters, Tensor layout, Tensor numbers) -> int");
  m.def("decoder_close(int stack) -> ()");
  m.def("decoder_open_caches(Tensor[] caches) -> int");
  m.def("decoder_close_caches(int caches) -> ()");
  m.def(
      "decoder(Tensor hidden_states, int stack, int caches, Tensor[] rows,"
      " Tensor[] angles) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("decoder_open", TORCH_BOX(&decoder_open));
  m.impl("decoder_open_caches", TORCH_BOX(&decoder_open_caches));
  m.impl("decoder", TORCH_BOX(&decoder));
}

// No tensor tells these which device they belong to.
STABLE_TORCH_LIBRARY_IMPL(lmfuse, CompositeExplicitAutograd, m) {
  m.impl("decoder_close", TORCH_BOX(&decoder_close));
  m.impl("decoder_close_caches", TORCH_BOX(&decoder_close_caches));
}

}  // namespace lmfuse
