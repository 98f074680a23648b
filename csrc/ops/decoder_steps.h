// A stack of decoder layers as a worker of a team runs it: the kernels of the single ops, step by
// step, over activations that all layers share.
//
// Whatever a step writes is rounded to the dtype of the model, as if each step were an op of its
// own: so a row has the same bits whether it is decoded alone or is part of a prompt.
#pragma once

#include <optional>
#include <vector>

#include "attention_plan.h"
#include "decoder_layers.h"
#include "team.h"

namespace lmfuse {

// The activations between two steps. The product that follows reads them where they are, or, if its
// kernel wants another form, out of `rows`. A step from one worker's copy to the next is 0 where
// all work on one.
struct DecoderStage {
  char *data, *rows;
  int64_t stride, lda;  // elements of a row
  int64_t data_step, rows_step;
  DType rows_type;

  bool converts() const { return rows != data; }
};

// All that the workers share, complete before the first of them starts.
struct DecoderCall {
  const std::vector<DecoderLayer>& layers;
  const std::vector<DecoderCache>& caches;
  DType type;
  int64_t batch, tokens, hidden;  // of each sequence
  Matrix x, y, middle;            // the first layer's input, the result, and what is on the way
  DecoderStage normed, attended, inner;
  Matrix projected, branch, gate_up;
  RopeArgs rope;
  CacheArgs cache;
  AttentionArgs attention;
  AttentionPlan plan;
  std::optional<AttentionShares> shares;
  int64_t first_slot;  // of the one sequence, if it lies in order; else -1
  float* scratch;      // of the products
  int64_t scratch_step;
  char* attention_scratch;
  int64_t attention_scratch_step;

  int64_t rows() const { return batch * tokens; }
  int64_t element() const { return type == DType::f32 ? 4 : 2; }
  // One row is normalised by every worker for itself: that is less work than waiting for another.
  bool alone() const { return rows() == 1; }
};

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
  }

 private:
  static constexpr int kMostProducts = 3;

  // middle = x + o(attention(norm(x))); of a parallel layer only the second part, in branch.
  void attention(const DecoderLayer& l, const DecoderCache& cache, const Matrix& x) {
    normalize(l.attention_input, x, c_.normed);
    const DecoderLinear* projections[kMostProducts] = {&l.query, &l.key, &l.value};
    multiply(c_.normed, projections, l.key.weight.n ? 3 : 1, c_.projected);
    const auto [begin, end] = w_.share(rows_);
    heads(l, cache, begin, end);
    w_.sync();
    attend(l, cache);
    if (l.parallel) {
      project(l.output, c_.attended, c_.branch);
    } else {
      add_branch(l, l.output, l.attention_output, c_.attended, x, c_.middle);
    }
  }

  // y = middle + mlp(norm(middle)), or x + branch + mlp(norm(x)).
  void mlp(const DecoderLayer& l, const Matrix& x, const Matrix& y) {
    normalize(l.mlp_input, l.parallel ? x : c_.middle, c_.normed);
    activate(l);
    if (l.parallel) {
      GemmArgs a = product(l.down, c_.inner, y);
      a.post = PostOp::add_add;
      a.other = c_.branch;
      a.other2 = x;
      multiply(&a, 1);
    } else {
      add_branch(l, l.down, l.mlp_output, c_.inner, c_.middle, y);
    }
  }

  // y = residual + scale * norm(linear(from))
  void add_branch(const DecoderLayer& l, const DecoderLinear& linear, const DecoderNorm& norm,
                  const DecoderStage& from, const Matrix& residual, const Matrix& y) {
    if (norm.kind == DecoderNorm::none && l.residual_scale == 1.0f) {
      GemmArgs a = product(linear, from, y);
      a.post = PostOp::add;
      a.other = residual;
      return multiply(&a, 1);
    }
    project(linear, from, c_.branch);
    const auto [begin, end] = w_.share(rows_);
    if (norm.kind != DecoderNorm::none)
      k_.norm(norm_args(norm, c_.branch, c_.branch, c_.hidden), begin, end);
    k_.add_scaled({c_.branch, residual, y, c_.hidden, l.residual_scale}, begin, end);
    w_.sync();
  }

  static NormArgs norm_args(const DecoderNorm& n, const Matrix& x, const Matrix& y, int64_t size) {
    return {x,    {},    y,        n.weight, n.bias,
            size, n.eps, n.offset, false,    n.kind == DecoderNorm::layer,
            false};
  }

  Matrix matrix(const DecoderStage& s) const {
    return matrix(s.data + w_.index * s.data_step, s.stride, c_.type);
  }
  Matrix matrix(void* data, int64_t stride, DType type) const {
    Matrix m{data, type, {}};
    m.rows.dims = 1;
    m.rows.size[0] = rows_;
    m.rows.stride[0] = stride;
    return m;
  }

  // Ready for a product when it returns; x itself where there is no norm.
  void normalize(const DecoderNorm& n, const Matrix& x, const DecoderStage& to) {
    const auto [begin, end] = c_.alone() ? std::pair<int64_t, int64_t>(0, 1) : w_.share(rows_);
    const bool plain = n.kind == DecoderNorm::none;
    if (!plain) k_.norm(norm_args(n, x, matrix(to), c_.hidden), begin, end);
    if (plain || to.converts())
      k_.gemm_rows({plain ? x : matrix(to), to.rows + w_.index * to.rows_step, to.rows_type,
                    c_.hidden, to.lda},
                   begin, end);
    if (!c_.alone()) w_.sync();
  }

  // The same for what all workers wrote together, rows of k.
  void convert(const DecoderStage& s, int64_t k) {
    if (!s.converts()) return;
    const auto [begin, end] = c_.alone() ? std::pair<int64_t, int64_t>(0, 1) : w_.share(rows_);
    k_.gemm_rows({matrix(s), s.rows + w_.index * s.rows_step, s.rows_type, k, s.lda}, begin, end);
    if (!c_.alone()) w_.sync();
  }

  GemmArgs product(const DecoderLinear& l, const DecoderStage& from, const Matrix& to) const {
    GemmArgs a{};
    a.x = from.rows + w_.index * from.rows_step;
    a.lda = from.lda;
    a.weight = l.weight.panels;
    a.weight_type = l.weight.dtype;
    a.bias = l.bias;
    a.out = to;
    a.m = rows_;
    a.n = l.weight.n;
    a.k = l.weight.k;
    return a;
  }

  void multiply(const GemmArgs* products, int64_t count) {
    int64_t panels = 0;
    for (int64_t p = 0; p < count; ++p) panels += panel_count(products[p].n);
    const auto [begin, end] = w_.share((rows_ + kRowBlock - 1) / kRowBlock * panels);
    run_products(products, count, begin, end, c_.scratch + w_.index * c_.scratch_step);
    w_.sync();
  }

  // Some products side by side.
  void multiply(const DecoderStage& from, const DecoderLinear* const* linears, int64_t count,
                const Matrix& to) {
    GemmArgs products[kMostProducts];
    int64_t column = 0;
    for (int64_t p = 0; p < count; ++p) {
      products[p] = product(*linears[p], from, to);
      products[p].out.data = static_cast<char*>(to.data) + column * c_.element();
      column += linears[p]->weight.n;
    }
    multiply(products, count);
  }
  void project(const DecoderLinear& linear, const DecoderStage& from, const Matrix& to) {
    const DecoderLinear* one = &linear;
    multiply(from, &one, 1, to);
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
    CacheArgs a = c_.cache;
    a.key = side(l, l.key_column, cache.key);
    a.value = side(l, l.value_column, cache.value);
    a.to_type = cache.key.type;
    k_.cache_write(a, begin, end);
  }

  void normalize_heads(const DecoderLayer& l, const DecoderNorm& n, int64_t at, int64_t count,
                       int64_t begin, int64_t end) {
    if (n.kind == DecoderNorm::none) return;
    Matrix x = c_.projected;
    x.data = column(at);
    if (n.size != l.head_dim) return k_.norm(norm_args(n, x, x, n.size), begin, end);
    x.rows.dims = 2;
    x.rows.size[1] = count;
    x.rows.stride[1] = l.head_stride;
    k_.norm(norm_args(n, x, x, n.size), begin * count, end * count);
  }

  void rotate(const DecoderLayer& l, int64_t at, int64_t count, int64_t begin, int64_t end) {
    RopeArgs a = c_.rope;
    const int64_t stride = c_.projected.rows.stride[0];
    a.x = a.y = {column(at), c_.tokens * stride, stride, l.head_stride};
    a.heads = count;
    a.rotary_dim = l.rotary_dim;
    a.half = l.rotary_half;
    k_.rope(a, begin, end);
  }

  CacheArgs::Side side(const DecoderLayer& l, int64_t at, const KvSource& to) const {
    return {column(at), c_.projected.rows.stride[0],  l.head_stride,   const_cast<void*>(to.data),
            to.stride,  const_cast<float*>(to.scale), to.scale_stride, l.head_dim,
            1.0f};
  }

  // Into attended, ready for the next product.
  void attend(const DecoderLayer& l, const DecoderCache& cache) {
    AttentionArgs a = c_.attention;
    a.key = source(cache.key);
    a.value = source(cache.value);
    a.scale = l.scale;
    a.softcap = l.softcap;
    a.scratch = c_.attention_scratch + w_.index * c_.attention_scratch_step;
    k_.attention(a, c_.shares->begin(w_.index, w_.count), c_.shares->begin(w_.index + 1, w_.count));
    w_.sync();
    if (c_.plan.entries) {
      const auto [begin, end] = w_.share(c_.batch * a.kv_heads);
      k_.attention_join(a, begin, end);
      w_.sync();
    }
    convert(c_.attended, l.attended());
  }

  KvSource source(KvSource s) const {
    if (c_.first_slot < 0) return s;
    static constexpr int64_t kBytes[] = {4, 2, 2, 1, 1, 1};  // of KvType
    const int64_t at = c_.first_slot * s.stride.token * kBytes[static_cast<int>(s.type)];
    s.data = static_cast<const char*>(s.data) + at;
    if (s.scale) s.scale += c_.first_slot * s.scale_stride.token;
    return s;
  }

  // activation(gate) * up, or activation(gate), into inner.
  void activate(const DecoderLayer& l) {
    const int64_t n = l.inner();
    const Matrix out = matrix(c_.inner.data, c_.inner.stride, c_.type);
    GemmArgs a = product(l.gate, c_.normed, out);
    if (!l.gated) {
      a.post = l.activation;
      multiply(&a, 1);
    } else if (l.up.weight.n && l.activation == PostOp::silu) {
      a.post = PostOp::gate_up;
      a.weight2 = l.up.weight.panels;
      a.bias2 = l.up.bias;
      multiply(&a, 1);
    } else {
      const DecoderLinear* both[] = {&l.gate, &l.up};
      multiply(c_.normed, both, l.up.weight.n ? 2 : 1, c_.gate_up);
      const Activation kind = l.activation == PostOp::silu       ? Activation::silu
                              : l.activation == PostOp::gelu_erf ? Activation::gelu_erf
                                                                 : Activation::gelu_tanh;
      Matrix up = c_.gate_up;
      up.data = static_cast<char*>(up.data) + n * c_.element();
      const auto [begin, end] = w_.share(rows_);
      k_.gated({c_.gate_up, up, out, n, kind, false}, begin, end);
      w_.sync();
    }
    convert(c_.inner, n);
  }

  const DecoderCall& c_;
  Worker& w_;
  const Kernels& k_;
  const int64_t rows_;
};

}  // namespace lmfuse
