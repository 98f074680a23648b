// A stack of decoder layers over packed weights and caches, in one call: from the hidden states
// before the first layer to those after the last, or from tokens to logits.
#include <set>
#include <tuple>

#include "buffers.h"
#include "decoder_ends.h"
#include "decoder_kinds.h"

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
  const auto size = [&](const DecoderLinear& linear, bool joined) {
    const DecoderRows rows(linear, c.type, c.rows(), joined);
    c.ready_each = std::max(c.ready_each, rows.bytes());
    c.scratch_step = std::max(c.scratch_step, (rows.scratch_bytes() + 63) / 64 * 64);
  };
  for (const DecoderLayer& l : c.layers)
    l.each_linear(
        [&](const DecoderLinear& linear) { size(linear, &linear == &l.gate && l.joined()); });
  if (c.ends) size(c.ends->head, false);
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
  int64_t wide_gate_up = 0, routed = 0;
  std::set<int64_t> inners{0};
  for (const DecoderLayer& layer : c.layers) {
    inners.insert(layer.inner());
    if (layer.gated) wide_gate_up = std::max(wide_gate_up, 2 * layer.inner());
    if (layer.mixes()) routed = std::max(routed, layer.router.n + layer.shared_gate.n);
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
  if (c.ends) {
    c.x = rows_matrix(b.take(c.rows() * c.hidden * c.element()), c.type, c.rows(), c.hidden);
    c.y = wide(c.hidden);
    if (c.ends->embedding.quantized)
      c.embedded = reinterpret_cast<float*>(b.take(c.rows() * c.hidden * 4));
  }
  c.gate_up = wide(wide_gate_up);
  if (c.experts) {
    c.routed = wide(routed);
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

// How many threads are worth waking: each has at least 256k products.
int64_t team_size(const DecoderCall& c) {
  int64_t weights = c.ends ? c.ends->head.n * c.hidden : 0;
  for (const DecoderLayer& l : c.layers) {
    const int64_t inner = l.chosen * l.expert_inner + l.inner();
    weights += c.hidden * (l.columns + 3 * inner) + l.attended() * c.hidden;
  }
  const int64_t most = weights * c.rows() >> 18;
  return std::min(thread_count(), std::max<int64_t>(most, 1));
}

// The number of layers, or of ends, that live until they are closed.
template <class T>
int64_t open_described(std::vector<Tensor> parameters, Tensor layout, Tensor numbers) {
  using D = Described<T>;
  return Kept<D>::keep(std::make_shared<D>(std::move(parameters), layout, numbers));
}

template <class T>
void close_described(int64_t number) {
  Kept<Described<T>>::forget(number);
}

// The number of caches that are kept until they are closed.
int64_t decoder_open_caches(std::vector<Tensor> caches) {
  return Kept<DecoderCaches>::keep(std::make_shared<DecoderCaches>(std::move(caches)));
}

void decoder_close_caches(int64_t caches) { Kept<DecoderCaches>::forget(caches); }

void check_weights(const DecoderCall& c, const char* name) {
  LMFUSE_CHECK_VALUE(c.hidden == c.layers[0].hidden(), c.ends ? "the embedding" : name,
                     " must have ", c.layers[0].hidden(), " features");
  LMFUSE_CHECK_VALUE(!c.ends || c.ends->head.k == c.hidden, "head must read ", c.hidden,
                     " features");
  const auto check = [&](const DecoderLinear& linear) {
    LMFUSE_CHECK_VALUE(linear.quantized || linear.type == c.type,
                       "hidden_states must have the dtype of the weights");
  };
  for (const DecoderLayer& l : c.layers) {
    l.each_linear(check);
    LMFUSE_CHECK_VALUE(!l.mixes() || l.experts.down.quantized() || l.experts.down.type == c.type,
                       "hidden_states must have the dtype of the weights of experts");
  }
  if (c.ends) check(c.ends->head);
}

// Everything but x, y and logits is known. `before` makes x.
template <class F>
void run(DecoderCall& c, const F& before) {
  const int64_t threads = team_size(c);
  size_rows(c);
  ExpertsCall experts{};
  if (const DecoderLayer* l = mixture(c)) size_experts(c, *l, experts);
  const Buffers buffers([&](Buffers& b) { carve(b, c, threads); });
  before();
  together(threads, [&](Worker& w) { DecoderWorker(c, w).run(); });
}

// hidden_states [batch, tokens, hidden]; see functional/decoder.py for the others.
Tensor decoder(Tensor hidden_states, int64_t stack, int64_t caches, std::vector<Tensor> rows,
               std::vector<Tensor> angles) {
  LMFUSE_CHECK(hidden_states.is_cpu() && hidden_states.dim() == 3 && hidden_states.numel() > 0,
               "hidden_states must be a CPU tensor [batch, tokens, hidden], and not be empty");
  if (!hidden_states.is_contiguous()) hidden_states = torch::stable::contiguous(hidden_states);
  const auto layers = Kept<Described<DecoderLayers>>::find(stack, "stack");
  const auto arenas = Kept<DecoderCaches>::find(caches, "caches");
  DecoderCall c{layers->get(), nullptr, arenas->layers};
  c.type = dtype(hidden_states, "hidden_states");
  c.batch = hidden_states.size(0);
  c.tokens = hidden_states.size(1);
  c.hidden = hidden_states.size(2);
  check_weights(c, "hidden_states");
  arenas->check(c.layers, c.type);
  Kinds kinds(c);
  LMFUSE_CHECK_VALUE(rows.size() == 3 * kinds.count(),
                     "slots, block_tables and cu_seqlens must be given ",
                     static_cast<int64_t>(kinds.count()), " times, once for each kind of layer");
  kinds.plan([&](size_t k, int64_t all) {
    const size_t count = kinds.count();
    return Tables(rows[k], rows[count + k], rows[2 * count + k], c, all);
  });
  kinds.turn(angles, {});
  Tensor y = new_like(hidden_states, "hidden_states");
  c.x = rows_matrix(const_cast<void*>(hidden_states.const_data_ptr()), c.type, c.rows(), c.hidden);
  c.y = rows_matrix(y.mutable_data_ptr(), c.type, c.rows(), c.hidden);
  run(c, [] {});
  return y;
}

// input_ids [batch, tokens] to logits [batch, tokens, vocabulary], and where these are largest. For
// each kind `columns` has the column after the last of its table, and where each row begins to see.
// positions: of the first token of each row, if something is looked up by position.
std::tuple<Tensor, Tensor> decoder_logits(Tensor input_ids, int64_t stack, int64_t ends,
                                          int64_t caches, std::vector<Tensor> tables,
                                          std::vector<int64_t> columns, std::vector<Tensor> angles,
                                          std::vector<int64_t> positions) {
  LMFUSE_CHECK(input_ids.is_cpu() && input_ids.dim() == 2 && input_ids.numel() > 0,
               "input_ids must be a CPU tensor [batch, tokens], and not be empty");
  if (!input_ids.is_contiguous()) input_ids = torch::stable::contiguous(input_ids);
  const auto layers = Kept<Described<DecoderLayers>>::find(stack, "stack");
  const auto around = Kept<Described<DecoderEnds>>::find(ends, "ends");
  const auto arenas = Kept<DecoderCaches>::find(caches, "caches");
  DecoderCall c{layers->get(), &around->get(), arenas->layers};
  c.type = embedded_type(*c.ends, input_ids);
  c.batch = input_ids.size(0);
  c.tokens = input_ids.size(1);
  c.hidden = c.ends->embedding.k;
  check_weights(c, "the embedding");
  arenas->check(c.layers, c.type);
  Kinds kinds(c);
  LMFUSE_CHECK_VALUE(tables.size() == kinds.count() &&
                         columns.size() == tables.size() * (1 + static_cast<size_t>(c.batch)),
                     "tables and columns must be given ", static_cast<int64_t>(kinds.count()),
                     " times, once for each kind of layer");
  kinds.plan([&](size_t k, int64_t all) {
    const int64_t* at = columns.data() + k * (1 + c.batch);
    return Tables(tables[k], at[0], at + 1, c, all);
  });
  kinds.turn(angles, positions);
  check_positions(c, positions);
  const int64_t sizes[3] = {c.batch, c.tokens, c.ends->head.n};
  Tensor logits = new_tensor(sizes, 3, scalar_type(c.type));
  Tensor largest = new_tensor(sizes, 2, ScalarType::Long);
  c.logits = rows_matrix(logits.mutable_data_ptr(), c.type, c.rows(), sizes[2]);
  run(c, [&] { embed(c, static_cast<const int64_t*>(input_ids.const_data_ptr()), positions); });
  auto* const at = static_cast<int64_t*>(largest.mutable_data_ptr());
  kernels().argmax({c.logits, at, sizes[2]}, 0, c.rows());
  return {logits, largest};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("decoder_open(Tensor[] parameters, Tensor layout, Tensor numbers) -> int");
  m.def("decoder_close(int stack) -> ()");
  m.def("decoder_open_ends(Tensor[] parameters, Tensor layout, Tensor numbers) -> int");
  m.def("decoder_close_ends(int ends) -> ()");
  m.def("decoder_open_caches(Tensor[] caches) -> int");
  m.def("decoder_close_caches(int caches) -> ()");
  m.def(
      "decoder(Tensor hidden_states, int stack, int caches, Tensor[] rows,"
      " Tensor[] angles) -> Tensor");
  m.def(
      "decoder_logits(Tensor input_ids, int stack, int ends, int caches, Tensor[] tables,"
      " int[] columns, Tensor[] angles, int[] positions) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("decoder_open", TORCH_BOX(&open_described<DecoderLayers>));
  m.impl("decoder_open_ends", TORCH_BOX(&open_described<DecoderEnds>));
  m.impl("decoder_open_caches", TORCH_BOX(&decoder_open_caches));
  m.impl("decoder", TORCH_BOX(&decoder));
  m.impl("decoder_logits", TORCH_BOX(&decoder_logits));
}

// No tensor tells these which device they belong to.
STABLE_TORCH_LIBRARY_IMPL(lmfuse, CompositeExplicitAutograd, m) {
  m.impl("decoder_close", TORCH_BOX(&close_described<DecoderLayers>));
  m.impl("decoder_close_ends", TORCH_BOX(&close_described<DecoderEnds>));
  m.impl("decoder_close_caches", TORCH_BOX(&decoder_close_caches));
}

}  // namespace lmfuse
