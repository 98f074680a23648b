// What a stack of decoder layers is made of, read from the tensors that describe it: each layer is
// a row of integers and a row of numbers, in the order of functional/decoder.py, and its parameters
// are named by their place in a list. Nothing is believed: every size is checked against the
// others.
#pragma once

#include <vector>

#include "kv.h"
#include "packed.h"

namespace lmfuse {

struct DecoderNorm {
  enum Kind : int64_t { none, rms, layer };
  int64_t kind;
  Vector weight, bias;
  int64_t size;  // of a row; 0: nothing here says it
  float eps, offset;
};

struct DecoderLinear {
  Packed weight;  // n 0: there is none
  Vector bias;
};

struct DecoderLayer {
  DecoderNorm attention_input, query_norm, key_norm, attention_output, mlp_input, mlp_output;
  DecoderLinear query, key, value, output, gate, up, down;
  int64_t heads, kv_heads, head_dim;
  // In a row of the projections: where keys and values begin, and from head to head.
  int64_t key_column, value_column, head_stride, columns;
  int64_t rotary_dim;
  bool rotary_half, parallel, gated;
  PostOp activation;
  int64_t window;  // how far a query sees to the left
  float scale, softcap, residual_scale;
  KvSource key_cache, value_cache;
  int64_t slots;  // of the caches

  int64_t attended() const { return heads * head_dim; }
  int64_t inner() const { return down.weight.k; }
};

class DecoderReader {
 public:
  DecoderReader(const std::vector<Tensor>& parameters, const Tensor& layout, const Tensor& numbers,
                const std::vector<Tensor>& caches, const Tensor& x)
      : parameters_(parameters),
        caches_(caches),
        hidden_(x.size(x.dim() - 1)),
        type_(dtype(x, "x")) {
    LMFUSE_CHECK(layout.is_cpu() && layout.dim() == 2 && layout.is_contiguous() &&
                     layout.scalar_type() == ScalarType::Long && layout.size(1) == kIntegers,
                 "layout must be a contiguous CPU tensor of int64, [layers, ", kIntegers, "]");
    LMFUSE_CHECK(numbers.is_cpu() && numbers.dim() == 2 && numbers.is_contiguous() &&
                     numbers.scalar_type() == ScalarType::Double &&
                     numbers.size(0) == layout.size(0) && numbers.size(1) == kNumbers,
                 "numbers must be a contiguous CPU tensor of float64, [layers, ", kNumbers, "]");
    integer_ = static_cast<const int64_t*>(layout.const_data_ptr());
    number_ = static_cast<const double*>(numbers.const_data_ptr());
    count_ = layout.size(0);
    per_layer_ = count_ ? static_cast<int64_t>(caches.size()) / count_ : 0;
    LMFUSE_CHECK((per_layer_ == 2 || per_layer_ == 4) &&
                     static_cast<int64_t>(caches.size()) == count_ * per_layer_,
                 "caches must be two tensors for each layer, or four with the scales of int8");
  }

  std::vector<DecoderLayer> layers() {
    std::vector<DecoderLayer> all(count_);
    for (int64_t i = 0; i < count_; ++i) read(all[i], i);
    return all;
  }

 private:
  static constexpr int64_t kIntegers = 6 * 3 + 7 * 2 + 11, kNumbers = 6 * 2 + 3;

  int64_t integer(int64_t least, int64_t most, const char* name) {
    const int64_t value = *integer_++;
    LMFUSE_CHECK_VALUE(value >= least && value <= most, "the layout says ", name, " is ", value,
                       ", but it must be from ", least, " to ", most);
    return value;
  }
  float number() { return static_cast<float>(*number_++); }

  const Tensor* parameter(const char* name) {
    const int64_t at = integer(-1, static_cast<int64_t>(parameters_.size()) - 1, name);
    return at < 0 ? nullptr : &parameters_[at];
  }

  Vector vector(const char* name, int64_t& size) {
    const Tensor* t = parameter(name);
    if (!t) return {};
    LMFUSE_CHECK(t->is_cpu() && t->dim() == 1 && t->is_contiguous(), name,
                 " must be a contiguous CPU vector");
    LMFUSE_CHECK_VALUE(size == 0 || t->size(0) == size, name, " has ", t->size(0),
                       " elements, but must have ", size);
    size = t->size(0);
    return {t->const_data_ptr(), dtype(*t, name)};
  }

  DecoderNorm norm(const char* name) {
    DecoderNorm n{};
    n.kind = integer(0, 2, name);
    n.weight = vector(name, n.size);
    n.bias = vector(name, n.size);
    LMFUSE_CHECK(!n.bias.data || (n.weight.data && n.bias.dtype == n.weight.dtype), name,
                 " has a bias that is not of the dtype of its weight");
    LMFUSE_CHECK(n.kind == DecoderNorm::none || n.weight.data, name, " has no weight");
    n.eps = number();
    n.offset = number();
    return n;
  }

  DecoderLinear linear(const char* name) {
    DecoderLinear l{};
    const Tensor* t = parameter(name);
    if (t) {
      l.weight = open(*t, name);
      LMFUSE_CHECK_VALUE(l.weight.dtype == type_, name, " must have the dtype of hidden_states");
    }
    int64_t size = l.weight.n;
    l.bias = vector(name, size);
    LMFUSE_CHECK(t || !l.bias.data, name, " has a bias, but no weight");
    return l;
  }

  void fits(const DecoderLinear& l, int64_t n, int64_t k, const char* name) {
    LMFUSE_CHECK_VALUE(l.weight.n == n && l.weight.k == k, name, " is ", l.weight.n, " by ",
                       l.weight.k, ", but must be ", n, " by ", k);
  }
  void fits(const DecoderNorm& n, int64_t size, const char* name) {
    LMFUSE_CHECK_VALUE(n.kind == DecoderNorm::none || n.size == size, name, " has ", n.size,
                       " elements, but must have ", size);
  }

  void read(DecoderLayer& l, int64_t i) {
    constexpr int64_t kMost = int64_t{1} << 31;
    l.attention_input = norm("the norm before attention");
    l.query_norm = norm("the norm of queries");
    l.key_norm = norm("the norm of keys");
    l.attention_output = norm("the norm after attention");
    l.mlp_input = norm("the norm before the MLP");
    l.mlp_output = norm("the norm after the MLP");
    l.query = linear("query");
    l.key = linear("key");
    l.value = linear("value");
    l.output = linear("output");
    l.gate = linear("gate");
    l.up = linear("up");
    l.down = linear("down");
    l.heads = integer(1, kMost, "heads");
    l.kv_heads = integer(1, l.heads, "kv_heads");
    l.head_dim = integer(1, kMost, "head_dim");
    l.key_column = integer(0, kMost, "key_column");
    l.value_column = integer(0, kMost, "value_column");
    l.head_stride = integer(l.head_dim, kMost, "head_stride");
    l.rotary_dim = integer(0, l.head_dim, "rotary_dim");
    l.rotary_half = integer(0, 1, "rotary_half");
    const int64_t window = integer(-1, int64_t{1} << 62, "window");
    l.window = window < 0 ? int64_t{1} << 40 : std::min(window, int64_t{1} << 40);
    const int64_t flags = integer(0, 3, "flags");
    l.parallel = flags & 1;
    l.gated = flags & 2;
    l.activation = static_cast<PostOp>(integer(0, 4, "activation"));
    l.scale = number();
    l.softcap = number();
    l.residual_scale = number();
    check(l);
    cache(l, i);
  }

  void check(DecoderLayer& l) {
    LMFUSE_CHECK_VALUE(l.heads % l.kv_heads == 0, "there are ", l.heads, " heads, which ",
                       l.kv_heads, " KV heads do not divide");
    LMFUSE_CHECK_VALUE(l.rotary_dim % 2 == 0, "rotary_dim is ", l.rotary_dim, ", but must be even");
    l.columns = l.query.weight.n + l.key.weight.n + l.value.weight.n;
    const int64_t span = (l.kv_heads - 1) * l.head_stride + l.head_dim;
    LMFUSE_CHECK_VALUE((l.heads - 1) * l.head_stride + l.head_dim <= l.columns &&
                           l.key_column + span <= l.columns && l.value_column + span <= l.columns,
                       "the projections give ", l.columns, " columns, which do not hold ", l.heads,
                       " queries and ", l.kv_heads, " keys and values of ", l.head_dim);
    for (const DecoderLinear* p : {&l.query, &l.key, &l.value})
      if (p->weight.n || p == &l.query) fits(*p, p->weight.n, hidden_, "a projection");
    LMFUSE_CHECK(l.query.weight.n && l.gate.weight.n && l.down.weight.n,
                 "query, gate and down must be given");
    fits(l.output, hidden_, l.attended(), "output");
    const int64_t inner = l.inner();
    fits(l.gate, l.gated && !l.up.weight.n ? 2 * inner : inner, hidden_, "gate");
    if (l.up.weight.n) fits(l.up, inner, hidden_, "up");
    LMFUSE_CHECK(l.gated || !l.up.weight.n, "up is given, but the MLP is not gated");
    LMFUSE_CHECK(!l.gated || l.activation == PostOp::silu || l.activation == PostOp::gelu_erf ||
                     l.activation == PostOp::gelu_tanh,
                 "the activation of a gated MLP must be silu or gelu");
    for (const DecoderNorm* n :
         {&l.attention_input, &l.attention_output, &l.mlp_input, &l.mlp_output})
      fits(*n, hidden_, "a norm");
    fits_heads(l.query_norm, l, l.heads);
    fits_heads(l.key_norm, l, l.kv_heads);
    LMFUSE_CHECK(
        !l.parallel || (l.attention_output.kind == DecoderNorm::none &&
                        l.mlp_output.kind == DecoderNorm::none && l.residual_scale == 1.0f),
        "a parallel layer has no norms after its parts and no residual scale");
  }

  // Norms of heads, or of all heads of a token at once.
  void fits_heads(const DecoderNorm& n, const DecoderLayer& l, int64_t heads) {
    if (n.kind == DecoderNorm::none || n.size == l.head_dim) return;
    LMFUSE_CHECK_VALUE(l.head_stride == l.head_dim && n.size == heads * l.head_dim,
                       "the norm of queries or keys has ", n.size, " elements, but must have ",
                       l.head_dim, " or ", heads * l.head_dim);
  }

  // Caches [kv_heads, slots, head_dim], scales [kv_heads, slots].
  void cache(DecoderLayer& l, int64_t i) {
    const Tensor* t = &caches_[i * per_layer_];
    const auto side = [&](const Tensor& arena, const Tensor* scales, const char* name) {
      LMFUSE_CHECK(arena.is_cpu() && arena.dim() == 3 && arena.size(0) == l.kv_heads &&
                       arena.size(2) == l.head_dim && (l.head_dim == 1 || arena.stride(2) == 1),
                   name, " must be a CPU tensor [", l.kv_heads, ", slots, ", l.head_dim, "]");
      std::optional<Tensor> of_int8;
      if (scales) of_int8 = *scales;
      return kv_source(arena, of_int8, {1, 1, 0}, name);
    };
    l.key_cache = side(t[0], per_layer_ == 4 ? t + 2 : nullptr, "a key cache");
    l.value_cache = side(t[1], per_layer_ == 4 ? t + 3 : nullptr, "a value cache");
    l.slots = t[0].size(1);
    LMFUSE_CHECK(t[1].size(1) == l.slots && l.value_cache.type == l.key_cache.type,
                 "the caches of keys and values must be alike");
    LMFUSE_CHECK(l.key_cache.type == KvType::i8 ||
                     static_cast<int>(l.key_cache.type) == static_cast<int>(type_),
                 "the caches must have the dtype of hidden_states, or be int8");
  }

  const std::vector<Tensor>& parameters_;
  const std::vector<Tensor>& caches_;
  const int64_t hidden_;
  const DType type_;
  const int64_t* integer_;
  const double* number_;
  int64_t count_, per_layer_;
};

}  // namespace lmfuse
