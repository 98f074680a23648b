// What a stack of decoder layers is made of, read from the tensors that describe it: each layer is
// a row of integers and a row of numbers, in the order of functional/decoder_layer.py, and its
// parameters are named by their place in a list. Nothing is believed: every size is checked against
// the others.
#pragma once

#include <memory>
#include <vector>

#include "experts.h"
#include "kept.h"
#include "kv.h"

namespace lmfuse {

struct DecoderNorm {
  enum Kind : int64_t { none, rms, layer };
  int64_t kind;
  Vector weight, bias;
  int64_t size;  // of a row; 0: nothing here says it
  float eps, offset;
};

struct DecoderLayer {
  DecoderNorm attention_input, query_norm, key_norm, attention_output, mlp_input, mlp_output;
  DecoderLinear query, key, value, output, gate, up, down;
  // A mixture of experts, of which the router chooses some. Gate, up and down are then those of an
  // expert that all tokens share, if there is one: times the sigmoid of shared_gate.
  DecoderLinear router, shared_gate;
  Mixture experts;
  int64_t chosen, expert_inner;
  bool normalized;  // the weights of those add up to 1
  int64_t heads, kv_heads, head_dim;
  // In a row of the projections: from group to group of heads, and where in a group its keys and
  // its values begin. Its queries come first.
  int64_t groups, group_stride, key_column, value_column, columns;
  int64_t rotary_dim;
  bool rotary_half, parallel, gated;
  PostOp activation;
  int64_t window;      // how far a query sees to the left
  int64_t kind;        // those of one kind see the same positions
  const float* alibi;  // slopes of the heads, or null
  const float* sinks;  // logits of the heads that no key answers, or null
  float scale, softcap, residual_scale;

  int64_t hidden() const { return query.k; }
  int64_t attended() const { return heads * head_dim; }
  bool mixes() const { return router.n; }
  int64_t inner() const { return down.k; }
  bool joined() const { return up.n && activation == PostOp::silu && gate.joins(up); }
  // Those that there are.
  template <class F>
  void each_linear(const F& f) const {
    for (const DecoderLinear* l :
         {&query, &key, &value, &output, &gate, &up, &down, &router, &shared_gate})
      if (l->n) f(*l);
  }
};

// As they follow each other, with the width of a row of layout and numbers.
struct DecoderLayers : std::vector<DecoderLayer> {
  static constexpr int64_t kIntegers = 6 * 3 + 9 * 3 + 23, kNumbers = 6 * 2 + 5;
};

// What is around them: x = scale * embedding[ids], and logits = norm(y) W^T + bias. The embedding
// is a plain matrix, or the rows of a packed or quantized one.
struct DecoderEnds {
  static constexpr int64_t kIntegers = 3 + 3 * 3 + 1, kNumbers = 2 * 2 + 1;
  DecoderLinear embedding;  // [n, k]; `plain` if it is neither
  const void* plain;
  DecoderNorm norm;
  DecoderLinear head;
  float scale;
  DecoderNorm embedded;  // of what the first layer reads
  Vector positions;      // [position_rows, k] added to the embedding; or null
  int64_t position_rows;
};

// Reads the rows of layout and numbers. The parameters are looked at, and not kept.
class DecoderReader {
 public:
  DecoderReader(const std::vector<Tensor>& parameters, const std::vector<int64_t>& layout,
                const std::vector<double>& numbers)
      : parameters_(parameters), integer_(layout.data()), number_(numbers.data()) {}

  void make(DecoderLayers& all, int64_t rows) {
    all.resize(rows);
    for (DecoderLayer& l : all) {
      read(l);
      if (l.kind == static_cast<int64_t>(firsts_.size())) firsts_.push_back(&l);
      alike(all[0], l);
      if (l.mixes() && !mixture_) mixture_ = &l;
      if (l.mixes()) alike_mixtures(*mixture_, l);
      LMFUSE_CHECK_VALUE(l.window == firsts_[l.kind]->window,
                         "the layers of one kind must have the same window");
    }
  }

  void make(DecoderEnds& e, int64_t rows) {
    constexpr int64_t kMost = int64_t{1} << 31;
    LMFUSE_CHECK_VALUE(rows == 1, "the layout of ends has ", rows, " rows, but must have one");
    const int64_t hidden = integer(0, kMost, "the features of a plain embedding");
    if (hidden) {
      int64_t size = 0;
      const Vector all = vector("embedding", size);
      LMFUSE_CHECK_VALUE(all.data && size % hidden == 0, "embedding must be given, with rows of ",
                         hidden, " elements");
      e.plain = all.data;
      e.embedding = {size / hidden, hidden, nullptr, {}, all.dtype};
      integer(-1, -1, "a place");
    } else {
      e.embedding = opened("embedding");
    }
    e.norm = norm("the weight of norm");
    e.head = linear("head");
    e.scale = number();
    e.embedded = norm("the weight of embedding_norm");
    int64_t size = 0;
    e.positions = vector("positions", size);
    LMFUSE_CHECK_VALUE(e.embedding.n && e.head.n, "embedding and head must be given");
    fits(e.norm, e.head.k, "the weight of norm");
    fits(e.embedded, e.embedding.k, "the weight of embedding_norm");
    e.position_rows = size / e.embedding.k;
    LMFUSE_CHECK_VALUE(size % e.embedding.k == 0, "positions must have rows of ", e.embedding.k,
                       " elements");
  }

 private:
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
    LMFUSE_CHECK_VALUE(
        t->is_cpu() && t->dim() == 1 && t->is_contiguous() && t->scalar_type() != ScalarType::Byte,
        name, " must be a contiguous CPU vector, not of bytes");
    LMFUSE_CHECK_VALUE(size == 0 || t->size(0) == size, name, " has ", t->size(0),
                       " elements, but must have ", size);
    size = t->size(0);
    return {t->const_data_ptr(), dtype(*t, name)};
  }

  const float* of_heads(int64_t heads, const char* name) {
    int64_t size = heads;
    const Vector found = vector(name, size);
    LMFUSE_CHECK_VALUE(!found.data || found.dtype == DType::f32, name, " must be float32");
    return static_cast<const float*>(found.data);
  }

  DecoderNorm norm(const char* name) {
    DecoderNorm n{};
    n.kind = integer(0, 2, name);
    n.weight = vector(name, n.size);
    n.bias = vector(name, n.size);
    LMFUSE_CHECK_VALUE(!n.bias.data || (n.weight.data && n.bias.dtype == n.weight.dtype), name,
                       " has a bias that is not of the dtype of its weight");
    n.eps = number();
    n.offset = number();
    return n;
  }

  DecoderLinear linear(const char* name) {
    DecoderLinear l = opened(name);
    int64_t size = l.n;
    l.bias = vector(name, size);
    LMFUSE_CHECK_VALUE(l.n || !l.bias.data, name, " has a bias, but no weight");
    return l;
  }

  // A weight, packed or quantized; n 0 if there is none.
  DecoderLinear opened(const char* name) {
    DecoderLinear l{};
    const Tensor* t = parameter(name);
    const int64_t how = integer(-1, 5, "the compute of a linear layer");  // -1: it is packed
    if (t && how < 0) {
      const Packed w = open(*t, name);
      l.n = w.n;
      l.k = w.k;
      l.panels = w.panels;
      l.type = w.dtype;
    } else if (t) {
      l.quantized = true;
      l.weight = open_quantized(*t, name);
      l.how = checked_how(l.weight, how / 2, how % 2);
      l.n = l.weight.format.n;
      l.k = l.weight.k;
      l.panels = l.weight.panels;
    }
    return l;
  }

  // What router says is how many experts there are.
  void mixture(DecoderLayer& l) {
    constexpr int64_t kMost = int64_t{1} << 31;
    const Tensor* gate_up = parameter("gate_up of the experts");
    const Tensor* down = parameter("down of the experts");
    const int64_t how = integer(-1, 5, "the compute of experts");
    l.expert_inner = integer(0, kMost, "the inner features of experts");
    l.chosen = integer(0, std::max<int64_t>(l.router.n, 0), "chosen");
    l.experts.act = static_cast<Activation>(integer(0, 3, "the activation of experts"));
    const Tensor* gate_up_bias = parameter("gate_up_bias of the experts");
    const Tensor* down_bias = parameter("down_bias of the experts");
    l.experts.slope = number();
    l.experts.limit = number();
    LMFUSE_CHECK_VALUE((gate_up != nullptr) == l.mixes() && (down != nullptr) == l.mixes() &&
                           (l.chosen > 0) == l.mixes(),
                       "a mixture has a router, experts and chosen ones, or nothing of these");
    if (!l.mixes()) return;
    const int64_t count = l.router.n, hidden = l.router.k, inner = l.expert_inner;
    l.experts.gate_up = {
        *gate_up, gate_up_bias, 2 * count, inner, hidden, how, "gate_up of the experts"};
    l.experts.down = {*down, down_bias, count, hidden, inner, how, "down of the experts"};
    LMFUSE_CHECK_VALUE(l.experts.gate_up.type == l.experts.down.type,
                       "the experts must be of one dtype");
  }

  void fits(const DecoderLinear& l, int64_t n, int64_t k, const char* name) {
    LMFUSE_CHECK_VALUE(l.n == n && l.k == k, name, " is ", l.n, " by ", l.k, ", but must be ", n,
                       " by ", k);
  }
  void fits(const DecoderNorm& n, int64_t size, const char* name) {
    LMFUSE_CHECK_VALUE(n.size == 0 || n.size == size, name, " has ", n.size,
                       " elements, but must have ", size);
  }

  void read(DecoderLayer& l) {
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
    l.router = linear("router");
    l.shared_gate = linear("shared_gate");
    mixture(l);
    l.heads = integer(1, kMost, "heads");
    l.kv_heads = integer(1, l.heads, "kv_heads");
    l.head_dim = integer(1, kMost, "head_dim");
    l.groups = integer(1, l.kv_heads, "groups");
    l.group_stride = integer(1, kMost, "group_stride");
    l.key_column = integer(0, kMost, "key_column");
    l.value_column = integer(0, kMost, "value_column");
    l.rotary_dim = integer(0, l.head_dim, "rotary_dim");
    l.rotary_half = integer(0, 1, "rotary_half");
    const int64_t window = integer(-1, int64_t{1} << 62, "window");
    l.window = window < 0 ? int64_t{1} << 40 : std::min(window, int64_t{1} << 40);
    const int64_t flags = integer(0, 7, "flags");
    l.parallel = flags & 1;
    l.gated = flags & 2;
    l.normalized = flags & 4;
    l.activation = static_cast<PostOp>(integer(0, 4, "activation"));
    l.kind = integer(0, static_cast<int64_t>(firsts_.size()), "kind");  // in order of appearance
    l.alibi = of_heads(l.heads, "alibi");
    l.sinks = of_heads(l.heads, "sinks");
    l.scale = number();
    l.softcap = number();
    l.residual_scale = number();
    check(l);
  }

  void check(DecoderLayer& l) {
    LMFUSE_CHECK_VALUE(l.heads % l.kv_heads == 0, "there are ", l.heads, " heads, which ",
                       l.kv_heads, " KV heads do not divide");
    LMFUSE_CHECK_VALUE(l.kv_heads % l.groups == 0, "there are ", l.kv_heads, " KV heads, which ",
                       l.groups, " groups do not divide");
    LMFUSE_CHECK_VALUE(l.rotary_dim % 2 == 0, "rotary_dim is ", l.rotary_dim, ", but must be even");
    LMFUSE_CHECK_VALUE(
        l.query.n && l.output.n && (l.mixes() || l.down.n) && (l.gate.n > 0) == (l.down.n > 0),
        "query, output, and gate and down or a router must be given");
    const int64_t hidden = l.hidden();
    l.columns = l.query.n + l.key.n + l.value.n;
    const int64_t span = l.kv_heads / l.groups * l.head_dim;
    const int64_t last = (l.groups - 1) * l.group_stride;
    LMFUSE_CHECK_VALUE(last + l.heads / l.groups * l.head_dim <= l.columns &&
                           last + l.key_column + span <= l.columns &&
                           last + l.value_column + span <= l.columns,
                       "the projections give ", l.columns, " columns, which do not hold ", l.heads,
                       " queries and ", l.kv_heads, " keys and values of ", l.head_dim);
    for (const DecoderLinear* p : {&l.query, &l.key, &l.value})
      if (p->n) fits(*p, p->n, hidden, "a projection");
    fits(l.output, hidden, l.attended(), "output");
    if (l.mixes()) {
      fits(l.router, l.router.n, hidden, "router");
      LMFUSE_CHECK_VALUE(!l.parallel, "a layer with a mixture is not parallel");
    }
    if (l.down.n) mlp(l, hidden);
    LMFUSE_CHECK_VALUE(!l.shared_gate.n || (l.mixes() && l.down.n),
                       "shared_gate is given, but no expert that is shared");
    if (l.shared_gate.n) fits(l.shared_gate, 1, hidden, "shared_gate");
    LMFUSE_CHECK_VALUE(!l.gated || !l.down.n || l.activation == PostOp::silu ||
                           l.activation == PostOp::gelu_erf || l.activation == PostOp::gelu_tanh,
                       "the activation of a gated MLP must be silu or gelu");
    LMFUSE_CHECK_VALUE(l.gated || !l.mixes(), "the experts of a mixture are gated");
    norms(l, hidden);
  }

  void mlp(const DecoderLayer& l, int64_t hidden) {
    fits(l.down, hidden, l.inner(), "down");
    const int64_t inner = l.inner();
    fits(l.gate, l.gated && !l.up.n ? 2 * inner : inner, hidden, "gate");
    if (l.up.n) fits(l.up, inner, hidden, "up");
    LMFUSE_CHECK_VALUE(l.gated || !l.up.n, "up is given, but the MLP is not gated");
  }

  void norms(DecoderLayer& l, int64_t hidden) {
    for (const DecoderNorm* n :
         {&l.attention_input, &l.attention_output, &l.mlp_input, &l.mlp_output})
      fits(*n, hidden, "a norm");
    fits_heads(l.query_norm, l, l.heads);
    fits_heads(l.key_norm, l, l.kv_heads);
    LMFUSE_CHECK_VALUE(
        !l.parallel || (l.attention_output.kind == DecoderNorm::none &&
                        l.mlp_output.kind == DecoderNorm::none && l.residual_scale == 1.0f),
        "a parallel layer has no norms after its parts and no residual scale");
  }

  // Norms of heads, or of all heads of a token at once.
  void fits_heads(DecoderNorm& n, const DecoderLayer& l, int64_t heads) {
    if (n.size == 0) n.size = l.head_dim;
    if (n.kind == DecoderNorm::none || n.size == l.head_dim) return;
    LMFUSE_CHECK_VALUE(l.groups == 1 && n.size == heads * l.head_dim,
                       "the norm of queries or keys has ", n.size, " elements, but must have ",
                       l.head_dim, " or ", heads * l.head_dim);
  }

  // Equal in all that the plan of attention, but for the window, and its activations depend on.
  static void alike(const DecoderLayer& a, const DecoderLayer& b) {
    LMFUSE_CHECK_VALUE(a.hidden() == b.hidden() && a.heads == b.heads && a.kv_heads == b.kv_heads &&
                           a.head_dim == b.head_dim && a.groups == b.groups &&
                           a.group_stride == b.group_stride && a.columns == b.columns &&
                           a.parallel == b.parallel,
                       "the layers of one call must have the same sizes and form");
  }
  static void alike_mixtures(const DecoderLayer& a, const DecoderLayer& b) {
    LMFUSE_CHECK_VALUE(
        a.router.n == b.router.n && a.chosen == b.chosen && a.expert_inner == b.expert_inner,
        "the mixtures of one call must have the same sizes");
  }

  const std::vector<Tensor>& parameters_;
  const int64_t* integer_;
  const double* number_;
  std::vector<const DecoderLayer*> firsts_;  // of each kind
  const DecoderLayer* mixture_ = nullptr;    // the first
};

// Layers or ends, read once and kept, so that a step of a few milliseconds does not begin with
// the checks of some hundred tensors. Parameters whose memory is another than before are read anew.
template <class T>
class Described {
 public:
  Described(std::vector<Tensor> parameters, const Tensor& layout, const Tensor& numbers)
      : parameters_(std::move(parameters)) {
    constexpr int64_t n = T::kIntegers, f = T::kNumbers;
    LMFUSE_CHECK_VALUE(layout.is_cpu() && layout.dim() == 2 && layout.is_contiguous() &&
                           layout.scalar_type() == ScalarType::Long && layout.size(1) == n &&
                           layout.size(0) > 0,
                       "layout must be a contiguous CPU tensor of int64, [rows, ", n, "]");
    LMFUSE_CHECK_VALUE(numbers.is_cpu() && numbers.dim() == 2 && numbers.is_contiguous() &&
                           numbers.scalar_type() == ScalarType::Double &&
                           numbers.size(0) == layout.size(0) && numbers.size(1) == f,
                       "numbers must be a contiguous CPU tensor of float64, [rows, ", f, "]");
    const auto* integer = static_cast<const int64_t*>(layout.const_data_ptr());
    const auto* number = static_cast<const double*>(numbers.const_data_ptr());
    layout_.assign(integer, integer + layout.numel());
    numbers_.assign(number, number + numbers.numel());
    read();
  }

  const T& get() const { return made_; }

  bool current() const { return parameters_.current(); }
  std::shared_ptr<const Described> again() const {
    auto other = std::make_shared<Described>(*this);
    other->parameters_ = KeptTensors(parameters_.all);
    other->read();
    return other;
  }

 private:
  void read() {
    made_ = T();
    const int64_t rows = static_cast<int64_t>(layout_.size()) / T::kIntegers;
    DecoderReader(parameters_.all, layout_, numbers_).make(made_, rows);
  }

  KeptTensors parameters_;
  std::vector<int64_t> layout_;
  std::vector<double> numbers_;
  T made_;
};

// Where the keys and values of a layer are.
struct DecoderCache {
  KvSource key, value;
  int64_t slots;
};

// Caches [kv_heads, slots, head_dim], for each layer keys and values; of int8 also their scales,
// [kv_heads, slots]. Kept as well, for to hand over 60 tensors takes 0.1 ms.
class DecoderCaches {
 public:
  explicit DecoderCaches(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) { read(); }

  bool current() const { return tensors_.current(); }
  std::shared_ptr<const DecoderCaches> again() const {
    return std::make_shared<DecoderCaches>(tensors_.all);
  }

  void check(const std::vector<DecoderLayer>& of, DType dtype) const {
    LMFUSE_CHECK_VALUE(layers.size() == of.size(), "the caches are for ",
                       static_cast<int64_t>(layers.size()), " layers, but there are ",
                       static_cast<int64_t>(of.size()));
    LMFUSE_CHECK_VALUE(kv_heads_ == of[0].kv_heads && head_dim_ == of[0].head_dim,
                       "the caches must be CPU tensors [", of[0].kv_heads, ", slots, ",
                       of[0].head_dim, "]");
    LMFUSE_CHECK_VALUE(type_ == KvType::i8 || static_cast<int>(type_) == static_cast<int>(dtype),
                       "the caches must have the dtype of hidden_states, or be int8");
  }

  std::vector<DecoderCache> layers;

 private:
  void read() {
    const std::vector<Tensor>& all = tensors_.all;
    LMFUSE_CHECK(!all.empty() && all[0].dim() == 3, "caches must be tensors of three dimensions");
    kv_heads_ = all[0].size(0);
    head_dim_ = all[0].size(2);
    const bool scaled = all[0].scalar_type() == ScalarType::Char;
    const size_t each = scaled ? 4 : 2;
    LMFUSE_CHECK(all.size() % each == 0,
                 "caches must be two tensors for each layer, or four with the scales of int8");
    for (const Tensor* t = all.data(); t != all.data() + all.size(); t += each) {
      const DecoderCache c{side(t[0], scaled ? t + 2 : nullptr, "a key cache"),
                           side(t[1], scaled ? t + 3 : nullptr, "a value cache"),
                           std::min(t[0].size(1), t[1].size(1))};
      layers.push_back(c);
      type_ = layers[0].key.type;
      LMFUSE_CHECK(c.key.type == type_ && c.value.type == type_,
                   "the caches must have the dtype of hidden_states, or be int8");
    }
  }

  KvSource side(const Tensor& arena, const Tensor* scales, const char* name) {
    LMFUSE_CHECK(arena.is_cpu() && arena.dim() == 3 && arena.size(0) == kv_heads_ &&
                     arena.size(2) == head_dim_ && (head_dim_ == 1 || arena.stride(2) == 1),
                 name, " must be a CPU tensor [", kv_heads_, ", slots, ", head_dim_, "]");
    std::optional<Tensor> of_int8;
    if (scales) of_int8 = *scales;
    return kv_source(arena, of_int8, {1, 1, 0}, name);
  }

  KeptTensors tensors_;
  int64_t kv_heads_, head_dim_;
  KvType type_;
};

}  // namespace lmfuse
