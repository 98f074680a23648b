// A stack of decoder layers as a worker of a team runs it: the kernels of the single ops, step by
// step, over activations that all layers share.
//
// Whatever a step writes is rounded to the dtype of the model, as if each step were an op of its
// own: so a row has the same bits whether it is decoded alone or is part of a prompt.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <vector>

#include "attention_plan.h"
#include "experts_steps.h"

namespace lmfuse {

// The activations between two steps. From one worker's copy to the next it is `step` bytes, 0 where
// all work on one.
struct DecoderStage {
  char* data;
  int64_t stride;  // elements of a row
  int64_t step;
};

// What the layers of one kind have in common: which positions they see, and the angles.
struct DecoderKind {
  RopeArgs rope;
  CacheArgs cache;
  AttentionArgs attention;
  AttentionPlan plan;
  std::optional<AttentionShares> shares;
  int64_t first_slot;  // of the one sequence, if it lies in order; else -1
};

// All that the workers share, complete before the first of them starts.
struct DecoderCall {
  const DecoderLayers& layers;
  const DecoderEnds* ends;  // or null
  const std::vector<DecoderCache>& caches;
  DType type;
  int64_t batch, tokens, hidden;  // of each sequence
  float* embedded;                // rows of a quantized embedding
  Matrix x, y, middle;  // the first layer's input, the last one's result, and what is on the way
  Matrix logits;
  DecoderStage normed, attended, inner;
  Matrix projected, branch, gate_up;
  Matrix routed;         // logits of routers
  ExpertsCall* experts;  // of the layer that is at work
  int64_t* index;        // the experts that they chose
  std::vector<DecoderKind> kinds;
  char* ready;  // rows as products want them, DecoderProducts::kMost forms at a time
  int64_t ready_each, ready_step;  // bytes of a form, and from one worker's copy to the next
  char* scratch;                   // of the products
  int64_t scratch_step;
  char* attention_scratch;
  int64_t attention_scratch_step;

  int64_t rows() const { return batch * tokens; }
  int64_t element() const { return type == DType::f32 ? 4 : 2; }
  // One row is normalised by every worker for itself: that is less work than waiting for another.
  bool alone() const { return rows() == 1; }
};

inline NormArgs norm_args(const DecoderNorm& n, const Matrix& x, const Matrix& y, int64_t size) {
  return {x,    {}, y, n.weight, n.bias, size, n.eps, n.offset, false, n.kind == DecoderNorm::layer,
          false};
}

class DecoderWorker {
 public:
  DecoderWorker(const DecoderCall& call, Worker& worker)
      : c_(call), w_(worker), k_(kernels()), rows_(call.rows()) {}

  // A product must not be written where its residual is: the kernel may compute a row twice.
  void run() {
    Matrix x = c_.x;
    const size_t count = c_.layers.size();
    for (size_t i = 0; i < count; ++i) {
      const DecoderLayer& l = c_.layers[i];
      const Matrix& y = l.parallel && (count - i) % 2 == 0 ? c_.middle : c_.y;
      attention(l, c_.caches[i], x);
      mlp(l, x, y);
      x = y;
    }
    if (c_.ends) multiply(normalize(c_.ends->norm, x, {&c_.ends->head}), c_.logits);
  }

 private:
  using Linears = std::initializer_list<const DecoderLinear*>;

  // middle = x + o(attention(norm(x))); of a parallel layer only the second part, in branch.
  void attention(const DecoderLayer& l, const DecoderCache& cache, const Matrix& x) {
    multiply(normalize(l.attention_input, x, {&l.query, &l.key, &l.value}), c_.projected);
    const auto [begin, end] = w_.share(rows_);
    heads(l, cache, begin, end);
    w_.sync();
    attend(l, cache);
    DecoderProducts output = collect(c_.attended, {&l.output});
    if (l.parallel) {
      multiply(output, c_.branch);
    } else {
      add_branch(l, output, l.attention_output, x, c_.middle);
    }
  }

  // y = middle + mlp(norm(middle)), or x + branch + mlp(norm(x)).
  void mlp(const DecoderLayer& l, const Matrix& x, const Matrix& y) {
    if (l.mixes()) return mixture(l, y);
    const Matrix& from = l.parallel ? x : c_.middle;
    if (l.joined()) {
      gate_up(l, normalize(l.mlp_input, from, {&l.gate}, true));
    } else {
      activate(l, normalize(l.mlp_input, from, {&l.gate, &l.up}));
    }
    DecoderProducts down = collect(c_.inner, {&l.down});
    if (l.parallel) {
      down.at[0].post = PostOp::add_add;
      down.at[0].other = c_.branch;
      down.at[0].other2 = x;
      multiply(down, y);
    } else {
      add_branch(l, down, l.mlp_output, c_.middle, y);
    }
  }

  // Into inner.
  void gate_up(const DecoderLayer& l, DecoderProducts gate) {
    gate.at[0].post = PostOp::gate_up;
    gate.at[0].weight2 = l.up.panels;
    gate.at[0].bias2 = l.up.bias;
    multiply(gate, matrix(c_.inner));
  }

  // The same, with a mixture of experts for the MLP.
  void mixture(const DecoderLayer& l, const Matrix& y) {
    multiply(normalize(l.mlp_input, c_.middle, {&l.router, &l.shared_gate}), c_.routed);
    const bool plain = l.mlp_input.kind == DecoderNorm::none;
    const Matrix x = plain ? c_.middle : matrix(c_.normed);
    const auto [begin, end] = w_.share(rows_);
    for (int64_t r = begin; r < end; ++r) route(l, r);
    w_.sync();
    if (w_.index == 0) c_.experts->choose(l.experts, c_.index);
    if (l.down.n) {
      shared_expert(l, x, !plain, y);
    } else {
      w_.sync();
    }
    ExpertsWorker(*c_.experts, w_, x).run();
    for (int64_t r = begin; l.down.n && r < end; ++r)
      k_.add_scaled({y, c_.branch, c_.branch, c_.hidden, shared_weight(l, r)}, r, r + 1);
    if (l.mlp_output.kind != DecoderNorm::none)
      k_.norm(norm_args(l.mlp_output, c_.branch, c_.branch, c_.hidden), begin, end);
    k_.add_scaled({c_.branch, c_.middle, y, c_.hidden, l.residual_scale}, begin, end);
    w_.sync();
  }

  // What the expert that all tokens share makes of x, not yet weighed.
  void shared_expert(const DecoderLayer& l, const Matrix& x, bool padded, const Matrix& to) {
    bool waits = false;
    const auto products = l.joined() ? read(x, padded, {&l.gate}, true, waits)
                                     : read(x, padded, {&l.gate, &l.up}, false, waits);
    if (waits && !c_.alone()) w_.sync();
    if (l.joined()) {
      gate_up(l, products);
    } else {
      activate(l, products);
    }
    multiply(collect(c_.inner, {&l.down}), to);
  }

  // How much it counts for a row: the sigmoid of a logit.
  float shared_weight(const DecoderLayer& l, int64_t r) const {
    if (!l.shared_gate.n) return 1.0f;
    float p[2];  // the softmax of 0 and the logit
    alignas(8) char pair[8] = {};
    const int64_t at = r * c_.routed.rows.stride[0] + l.router.n;
    std::memcpy(pair + c_.element(), static_cast<const char*>(c_.routed.data) + at * c_.element(),
                c_.element());
    k_.softmax({{pair, c_.type, {}}, {p, DType::f32, {}}, 2}, 0, 1);
    return p[1];
  }

  // The most probable experts of a row, and how much each counts.
  void route(const DecoderLayer& l, int64_t r) {
    const int64_t count = l.router.n;
    std::vector<float> p(count);
    const Matrix wide{p.data(), DType::f32, {}};
    Matrix logits = c_.routed;
    logits.data = static_cast<char*>(logits.data) + r * logits.rows.stride[0] * c_.element();
    logits.rows = {};
    k_.softmax({logits, wide, count}, 0, 1);
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + l.chosen, order.end(),
                      [&](int64_t a, int64_t b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
    float sum = 0.0f;
    for (int64_t j = 0; j < l.chosen; ++j) sum += p[order[j]];
    for (int64_t j = 0; j < l.chosen; ++j) {
      c_.index[r * l.chosen + j] = order[j];
      c_.experts->weights[r * l.chosen + j] = l.normalized ? p[order[j]] / sum : p[order[j]];
    }
  }

  // y = residual + scale * norm(product)
  void add_branch(const DecoderLayer& l, DecoderProducts& product, const DecoderNorm& norm,
                  const Matrix& residual, const Matrix& y) {
    if (norm.kind == DecoderNorm::none && l.residual_scale == 1.0f) {
      product.at[0].post = PostOp::add;
      product.at[0].other = residual;
      return multiply(product, y);
    }
    multiply(product, c_.branch);
    const auto [begin, end] = w_.share(rows_);
    if (norm.kind != DecoderNorm::none)
      k_.norm(norm_args(norm, c_.branch, c_.branch, c_.hidden), begin, end);
    k_.add_scaled({c_.branch, residual, y, c_.hidden, l.residual_scale}, begin, end);
    w_.sync();
  }

  Matrix matrix(const DecoderStage& s) const {
    return rows_matrix(s.data + w_.index * s.step, c_.type, rows_, s.stride);
  }
  // The rows that this worker makes ready: one row each for itself.
  std::pair<int64_t, int64_t> mine() const {
    return c_.alone() ? std::pair<int64_t, int64_t>(0, 1) : w_.share(rows_);
  }

  // Products of norm(x), which is ready for them; of x itself where there is no norm.
  DecoderProducts normalize(const DecoderNorm& n, const Matrix& x, Linears linears,
                            bool joined = false) {
    const auto [begin, end] = mine();
    const bool plain = n.kind == DecoderNorm::none;
    const Matrix normed = matrix(c_.normed);
    if (!plain) k_.norm(norm_args(n, x, normed, c_.hidden), begin, end);
    bool waits = !plain;
    const DecoderProducts products =
        plain ? read(x, false, linears, joined, waits) : read(normed, true, linears, joined, waits);
    if (waits && !c_.alone()) w_.sync();
    return products;
  }

  // Products of what all workers wrote together.
  DecoderProducts collect(const DecoderStage& s, Linears linears) {
    bool waits = false;
    const DecoderProducts products = read(matrix(s), true, linears, false, waits);
    if (waits && !c_.alone()) w_.sync();
    return products;
  }

  // This worker's part of x, in each form in which these products read it. waits: it was written.
  DecoderProducts read(const Matrix& x, bool padded, Linears linears, bool joined, bool& waits) {
    std::optional<DecoderRows> forms[DecoderProducts::kMost];
    DecoderProducts products;
    const auto [begin, end] = mine();
    int made = 0;
    for (const DecoderLinear* l : linears) {
      if (!l->n) continue;
      DecoderRows rows(*l, c_.type, rows_, joined);
      int at = 0;
      while (at < made && !forms[at]->serves(rows)) ++at;
      if (at == made) {
        rows.place(x, padded, c_.ready + w_.index * c_.ready_step + made * c_.ready_each);
        rows.make(begin, end, scratch());
        waits = waits || !rows.as_is();
        forms[made++] = rows;
      }
      products.at[products.count++] = DecoderProduct(*l, *forms[at], rows_);
    }
    return products;
  }

  float* scratch() const {
    return reinterpret_cast<float*>(c_.scratch + w_.index * c_.scratch_step);
  }

  // Side by side into rows of `to`.
  void multiply(DecoderProducts products, const Matrix& to) {
    const int64_t blocks = (rows_ + kRowBlock - 1) / kRowBlock;
    int64_t all = 0, column = 0;
    for (int p = 0; p < products.count; ++p) {
      DecoderProduct& a = products.at[p];
      a.out = to;
      a.out.data = static_cast<char*>(to.data) + column * c_.element();
      a.scratch = scratch();
      column += a.n;
      all += blocks * panel_count(a.n);
    }
    auto [begin, end] = w_.share(all);
    for (int p = 0; p < products.count; ++p) {
      const int64_t work = blocks * panel_count(products.at[p].n);
      const int64_t from = std::max<int64_t>(begin, 0), last = std::min(end, work);
      if (from < last) products.at[p].run(from, last);
      begin -= work;
      end -= work;
    }
    w_.sync();
  }

  char* column(int64_t at) const {
    return static_cast<char*>(c_.projected.data) + at * c_.element();
  }

  // Norms, rotation and the way into the cache, of the heads of tokens [begin, end).
  void heads(const DecoderLayer& l, const DecoderCache& cache, int64_t begin, int64_t end) {
    normalize_heads(l, l.query_norm, 0, l.heads, begin, end);
    normalize_heads(l, l.key_norm, l.key_column, l.kv_heads, begin, end);
    if (l.rotary_dim) {
      rotate(l, 0, l.heads, begin, end);
      rotate(l, l.key_column, l.kv_heads, begin, end);
    }
    CacheArgs a = kind(l).cache;
    a.to_type = cache.key.type;
    each_run(l, 0, l.kv_heads, [&](const HeadRun& run) {
      a.key = side(l, run, l.key_column, cache.key);
      a.value = side(l, run, l.value_column, cache.value);
      a.heads = run.count;
      k_.cache_write(a, begin, end);
    });
  }

  // Heads [first, first + count) in a row of the projections, whose columns are `stride` apart.
  struct HeadRun {
    int64_t first, count, column, stride;
  };
  // Those of all groups, the first of them at column `at`: as few runs as there can be.
  template <class F>
  static void each_run(const DecoderLayer& l, int64_t at, int64_t count, const F& f) {
    const int64_t each = count / l.groups;
    if (each == 1) return f(HeadRun{0, count, at, l.group_stride});
    for (int64_t g = 0; g < l.groups; ++g)
      f(HeadRun{g * each, each, at + g * l.group_stride, l.head_dim});
  }

  void normalize_heads(const DecoderLayer& l, const DecoderNorm& n, int64_t at, int64_t count,
                       int64_t begin, int64_t end) {
    if (n.kind == DecoderNorm::none) return;
    Matrix x = c_.projected;
    x.data = column(at);
    if (n.size != l.head_dim) return k_.norm(norm_args(n, x, x, n.size), begin, end);
    x.rows.dims = 2;
    each_run(l, at, count, [&](const HeadRun& run) {
      x.data = column(run.column);
      x.rows.size[1] = run.count;
      x.rows.stride[1] = run.stride;
      k_.norm(norm_args(n, x, x, n.size), begin * run.count, end * run.count);
    });
  }

  void rotate(const DecoderLayer& l, int64_t at, int64_t count, int64_t begin, int64_t end) {
    RopeArgs a = kind(l).rope;
    const int64_t stride = c_.projected.rows.stride[0];
    a.rotary_dim = l.rotary_dim;
    a.half = l.rotary_half;
    each_run(l, at, count, [&](const HeadRun& run) {
      a.x = a.y = {column(run.column), c_.tokens * stride, stride, run.stride};
      a.heads = run.count;
      k_.rope(a, begin, end);
    });
  }

  // Into the cache, the heads of this run whose first in the projections is at column `at`.
  CacheArgs::Side side(const DecoderLayer& l, const HeadRun& run, int64_t at, KvSource to) const {
    to = from(to, run.first * to.stride.head, run.first * to.scale_stride.head);
    return {column(at + run.column),
            c_.projected.rows.stride[0],
            run.stride,
            const_cast<void*>(to.data),
            to.stride,
            const_cast<float*>(to.scale),
            to.scale_stride,
            l.head_dim,
            1.0f};
  }

  const DecoderKind& kind(const DecoderLayer& l) const { return c_.kinds[l.kind]; }

  // Into attended.
  void attend(const DecoderLayer& l, const DecoderCache& cache) {
    const DecoderKind& kind = this->kind(l);
    AttentionArgs a = kind.attention;
    a.key = source(cache.key, kind.first_slot);
    a.value = source(cache.value, kind.first_slot);
    a.scale = l.scale;
    a.softcap = l.softcap;
    a.alibi = l.alibi;
    a.sinks = l.sinks;
    a.scratch = c_.attention_scratch + w_.index * c_.attention_scratch_step;
    k_.attention(a, kind.shares->begin(w_.index, w_.count),
                 kind.shares->begin(w_.index + 1, w_.count));
    w_.sync();
    if (kind.plan.entries) {
      const auto [begin, end] = w_.share(c_.batch * a.kv_heads);
      k_.attention_join(a, begin, end);
      w_.sync();
    }
  }

  // From its slot `first` on; whole if that is negative.
  static KvSource source(const KvSource& s, int64_t first) {
    return first < 0 ? s : from(s, first * s.stride.token, first * s.scale_stride.token);
  }
  static KvSource from(KvSource s, int64_t elements, int64_t scales) {
    static constexpr int64_t kBytes[] = {4, 2, 2, 1, 1, 1};  // of KvType
    s.data = static_cast<const char*>(s.data) + elements * kBytes[static_cast<int>(s.type)];
    if (s.scale) s.scale += scales;
    return s;
  }

  // activation(gate) * up, or activation(gate), into inner.
  void activate(const DecoderLayer& l, DecoderProducts products) {
    const Matrix out = matrix(c_.inner);
    if (!l.gated) {
      products.at[0].post = l.activation;
      return multiply(products, out);
    }
    multiply(products, c_.gate_up);
    const Activation kind = l.activation == PostOp::silu       ? Activation::silu
                            : l.activation == PostOp::gelu_erf ? Activation::gelu_erf
                                                               : Activation::gelu_tanh;
    Matrix up = c_.gate_up;
    up.data = static_cast<char*>(up.data) + l.inner() * c_.element();
    const auto [begin, end] = w_.share(rows_);
    k_.gated({c_.gate_up, up, out, l.inner(), kind, false}, begin, end);
    w_.sync();
  }

  const DecoderCall& c_;
  Worker& w_;
  const Kernels& k_;
  const int64_t rows_;
};

}  // namespace lmfuse
