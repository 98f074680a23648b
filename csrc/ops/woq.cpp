// Linear layers over quantized weights.
#include <vector>

#include "linear.h"
#include "memory.h"
#include "quantized.h"

namespace lmfuse {
namespace {

bool is_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.is_cpu() && t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows &&
         t.size(1) == columns;
}

Tensor woq_pack(Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                std::optional<Tensor> order, int64_t kind, int64_t zero, int64_t group,
                ScalarType scale_type) {
  LMFUSE_CHECK(codes.is_cpu() && codes.dim() == 2 && codes.scalar_type() == ScalarType::Byte,
               "codes must be a CPU tensor [n, k] of bytes");
  WoqHeader h{};
  std::memcpy(h.magic, WoqHeader::kMagic, sizeof(h.magic));
  h.n = codes.size(0);
  h.k = h.columns = codes.size(1);
  if (order) {
    LMFUSE_CHECK(order->is_cpu() && order->dim() == 1 && order->scalar_type() == ScalarType::Int,
                 "order must be a CPU tensor of int32");
    h.columns = order->size(0);
    h.ordered = 1;
  }
  h.group = group;
  h.kind = static_cast<int32_t>(kind);
  h.zero = static_cast<int32_t>(zero);
  h.scale_type = static_cast<int32_t>(scale_type == ScalarType::Float      ? DType::f32
                                      : scale_type == ScalarType::BFloat16 ? DType::bf16
                                                                           : DType::f16);
  LMFUSE_CHECK_VALUE(sound(h), "no weight can be ", h.n, " by ", h.k, " in groups of ", h.group);
  const WoqFormat format = format_of(h);
  LMFUSE_CHECK(is_matrix(scales, ScalarType::Float, h.n, format.groups()),
               "scales must be [n, groups] in float32");
  LMFUSE_CHECK(zeros.has_value() == (format.zero != WoqZero::none) &&
                   (!zeros || is_matrix(*zeros, ScalarType::Float, h.n, format.groups())),
               "zeros must be [n, groups] in float32");
  codes = torch::stable::contiguous(codes);
  scales = torch::stable::contiguous(scales);
  if (zeros) zeros = torch::stable::contiguous(*zeros);
  Tensor packed = new_weight_bytes(quantized_bytes(h));
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(data, &h, sizeof(h));
  WoqPackArgs a{};
  a.format = format;
  a.packed = data + sizeof(h);
  a.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  a.scales = static_cast<float*>(scales.mutable_data_ptr());
  if (zeros) a.zeros = static_cast<float*>(zeros->mutable_data_ptr());
  a.k = h.k;
  if (order) {
    order = torch::stable::contiguous(*order);
    char* to = a.packed + panel_count(h.n) * format.panel_bytes();
    std::memcpy(to, order->const_data_ptr(), h.columns * sizeof(int32_t));
    a.order = reinterpret_cast<const int32_t*>(to);
  }
  const auto kernel = kernels().woq_pack;
  parallel(panel_count(h.n), kPanel * h.k,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return packed;
}

// n, k, columns, group, kind, zero, dtype of the scales (as DType), ordered
Tensor woq_header(Tensor packed) {
  const WoqHeader h = read_header(packed, "packed");
  const int64_t count = 8;
  const int64_t values[count] = {h.n,    h.k,    h.columns,    h.group,
                                 h.kind, h.zero, h.scale_type, h.ordered};
  Tensor header = new_tensor(&count, 1, ScalarType::Long);
  std::memcpy(header.mutable_data_ptr(), values, sizeof(values));
  return header;
}

// Codes [n, k], scales and zeros (empty if there are none) [n, groups], and the order (or none).
std::tuple<Tensor, Tensor, Tensor, Tensor> woq_unpack(Tensor packed, int64_t out_features,
                                                      int64_t in_features, int64_t groups,
                                                      bool zeros, int64_t columns) {
  const Quantized w = open_quantized(packed, "packed");
  const WoqFormat& f = w.format;
  LMFUSE_CHECK_VALUE(f.n == out_features && w.k == in_features && f.groups() == groups &&
                         (f.zero != WoqZero::none) == zeros && columns == (w.order ? f.k : 0),
                     "packed is ", f.n, " by ", w.k, " in ", f.groups(),
                     " groups, but another format was asked for");
  const int64_t code_sizes[2] = {f.n, w.k}, sizes[2] = {f.n, groups};
  const int64_t zero_sizes[2] = {f.n, zeros ? groups : 0};
  Tensor codes = new_tensor(code_sizes, 2, ScalarType::Byte);
  Tensor scales = new_tensor(sizes, 2, ScalarType::Float);
  Tensor zero = new_tensor(zero_sizes, 2, ScalarType::Float);
  Tensor order = new_tensor(&columns, 1, ScalarType::Int);
  std::memset(codes.mutable_data_ptr(), 0, codes.numel());
  if (columns) std::memcpy(order.mutable_data_ptr(), w.order, columns * sizeof(int32_t));
  const WoqPackArgs a{f,
                      const_cast<char*>(w.panels),
                      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                      static_cast<float*>(scales.mutable_data_ptr()),
                      static_cast<float*>(zero.mutable_data_ptr()),
                      w.order,
                      w.k};
  const auto kernel = kernels().woq_unpack;
  parallel(panel_count(f.n), kPanel * w.k,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {codes, scales, zero, order};
}

Tensor woq_values(Tensor packed, std::optional<Tensor> rows, int64_t out_features,
                  int64_t in_features) {
  const Quantized w = open_quantized(packed, "packed");
  LMFUSE_CHECK_VALUE(w.format.n == out_features && w.k == in_features, "packed is ", w.format.n,
                     " by ", w.k, ", not ", out_features, " by ", in_features);
  WoqValuesArgs a{};
  a.format = w.format;
  a.packed = w.panels;
  a.order = w.order;
  a.k = w.k;
  int64_t count = w.format.n;
  Tensor y;
  if (rows) {
    LMFUSE_CHECK(rows->is_cpu() && rows->scalar_type() == ScalarType::Long,
                 "rows must be a CPU tensor of int64");
    const Sizes sizes(*rows, rows->dim(), w.k, "rows");
    rows = torch::stable::contiguous(*rows);
    a.rows = static_cast<const int64_t*>(rows->const_data_ptr());
    count = rows->numel();
    for (int64_t i = 0; i < count; ++i)
      LMFUSE_CHECK_VALUE(a.rows[i] >= 0 && a.rows[i] < w.format.n, "rows has ", a.rows[i],
                         ", but packed has ", w.format.n, " rows");
    y = new_tensor(sizes.at, sizes.dim, ScalarType::Float);
  } else {
    const int64_t sizes[2] = {w.format.n, w.k};
    y = new_tensor(sizes, 2, ScalarType::Float);
  }
  a.y = static_cast<float*>(y.mutable_data_ptr());
  if (w.order) std::memset(a.y, 0, y.numel() * sizeof(float));  // whatever a damaged order leaves
  const auto kernel = kernels().woq_values;
  parallel(count, w.k, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

// The same bytes in large pages.
Tensor woq_copy(Tensor packed) {
  open_quantized(packed, "packed");
  Tensor copy = new_weight_bytes(packed.numel());
  const char* from = static_cast<const char*>(packed.const_data_ptr());
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  parallel(packed.numel(), 1,
           [&](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
  return copy;
}

WoqHow checked_how(const Tensor& x, const Quantized& w, int64_t compute, bool block_scales) {
  LMFUSE_CHECK_VALUE(x.is_cpu() && x.dim() >= 1 && x.size(x.dim() - 1) == w.k,
                     "x must be a CPU tensor [..., ", w.k, "]");
  return checked_how(w, compute, block_scales);
}

// What every product of these rows with weight w has in common.
WoqArgs woq_args(const Tensor& x, const Quantized& w, std::optional<Tensor>& bias) {
  WoqArgs a{};
  a.format = w.format;
  a.weight = w.panels;
  a.m = x.numel() / w.k;
  a.n = w.format.n;
  a.k = w.k;
  if (bias) a.bias = as_vector(*bias, w.format.n, "bias");
  return a;
}

int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

// Parts of one piece of memory: what a call needs costs one allocation.
class Parts {
 public:
  // Where a part of so many bytes will begin.
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + kAlign - 1) / kAlign * kAlign;
    return at;
  }
  void allocate() {
    memory_ = new_bytes(size_ + kAlign);
    const uintptr_t past = reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr()) % kAlign;
    data_ = static_cast<char*>(memory_.mutable_data_ptr()) + (kAlign - past) % kAlign;
  }
  template <class T = float>
  T* at(int64_t part) const {
    return reinterpret_cast<T*>(data_ + part);
  }

 private:
  static constexpr int64_t kAlign = 64;
  int64_t size_ = 0;
  Tensor memory_;
  char* data_ = nullptr;
};

// Some products of the rows x with weights of one form, in one walk of the threads over all of
// their panels.
void run(Tensor x, const Quantized& w, const WoqHow& how, WoqArgs* products, int64_t count) {
  const WoqArgs& first = products[0];
  const int64_t m = first.m;
  WoqForm form(w, how, m, first.weight2 ? 2 : 1);
  const int64_t each = form.scratch_bytes;
  Parts parts;
  const int64_t rows_at = parts.add(form.bytes), scratch_at = parts.add(each * thread_count());
  parts.allocate();
  const auto scratch = [&] { return parts.at(scratch_at) + each / 4 * thread_index(); };

  form.rows.x = as_rows(x, "x");
  form.place(parts.at<char>(rows_at));
  const auto prepare = kernels().woq_rows;
  parallel(m, w.format.packed_k(), [&](int64_t begin, int64_t end) {
    WoqRowsArgs mine = form.rows;
    mine.scratch = scratch();
    prepare(mine, begin, end);
  });

  const int64_t blocks = (m + kRowBlock - 1) / kRowBlock;
  int64_t panels = 0;
  for (int64_t p = 0; p < count; ++p) {
    form.tell(products[p]);
    panels += panel_count(products[p].n);
  }
  const auto kernel = kernels().woq;
  parallel(blocks * panels, first.k * kPanel * (m < 8 ? m : 8), [&](int64_t begin, int64_t end) {
    for (int64_t p = 0, at = 0; p < count; ++p) {
      const int64_t work = blocks * panel_count(products[p].n);
      const int64_t from = begin > at ? begin - at : 0;
      const int64_t to = end - at < work ? end - at : work;
      at += work;
      if (from >= to) continue;
      WoqArgs mine = products[p];
      mine.scratch = scratch();
      kernel(mine, from, to);
    }
  });
}

Tensor woq(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t out_features,
           int64_t compute, bool block_scales, int64_t post, std::optional<Tensor> other,
           std::optional<Tensor> other2) {
  const PostOp op = checked_post(post, other, other2);
  const Quantized w = open_quantized(weight, "weight");
  LMFUSE_CHECK_VALUE(w.format.n == out_features, "weight has ", w.format.n,
                     " output channels, not ", out_features);
  const WoqHow how = checked_how(x, w, compute, block_scales);
  Tensor out = new_result(x, w.format.n);
  WoqArgs a = woq_args(x, w, bias);
  a.post = op;
  a.other = operand(other, out, "other");
  a.other2 = operand(other2, out, "other2");
  a.out = as_rows(out, "out");
  if (out.numel()) run(x, w, how, &a, 1);
  return out;
}

// Two weights that meet the same prepared rows.
void check_alike(const Quantized& w, const Quantized& first) {
  LMFUSE_CHECK_VALUE(w.k == first.k && w.format.kind == first.format.kind &&
                         w.format.group == first.format.group && !w.order && !first.order,
                     "the weights must have one kind, in_features and group_size, and no order of "
                     "columns of their own");
}

Tensor woq_gate_up(Tensor x, Tensor gate, Tensor up, std::optional<Tensor> gate_bias,
                   std::optional<Tensor> up_bias, int64_t out_features, int64_t compute,
                   bool block_scales) {
  const Quantized w = open_quantized(gate, "gate"), w2 = open_quantized(up, "up");
  LMFUSE_CHECK_VALUE(w.format.n == out_features, "gate has ", w.format.n, " output channels, not ",
                     out_features);
  check_alike(w2, w);
  LMFUSE_CHECK_VALUE(w2.format.n == w.format.n && w2.format.zero == w.format.zero &&
                         w2.format.scale_type == w.format.scale_type,
                     "gate and up must have one shape and format");
  const WoqHow how = checked_how(x, w, compute, block_scales);
  Tensor out = new_result(x, w.format.n);
  WoqArgs a = woq_args(x, w, gate_bias);
  a.post = PostOp::gate_up;
  a.weight2 = w2.panels;
  if (up_bias) a.bias2 = as_vector(*up_bias, w.format.n, "up_bias");
  a.out = as_rows(out, "out");
  if (out.numel()) run(x, w, how, &a, 1);
  return out;
}

// The products with several weights side by side: [..., sum of n]. Bit i of biased: weight i has
// the next of the biases (torch.jit.trace knows no lists of optional tensors).
Tensor woq_concat(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t biased,
                  int64_t out_features, int64_t compute, bool block_scales) {
  LMFUSE_CHECK(!weights.empty() && weights.size() < 63, "weights must be 1 to 62");
  const Quantized first = open_quantized(weights[0], "weight");
  const WoqHow how = checked_how(x, first, compute, block_scales);
  std::vector<WoqArgs> products;
  int64_t n = 0;
  size_t next = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Quantized w = open_quantized(weights[i], "weight");
    if (weights.size() > 1) check_alike(w, first);
    std::optional<Tensor> bias;
    if (biased >> i & 1) {
      LMFUSE_CHECK(next < biases.size(), "biased counts more than there are biases");
      bias = biases[next] = torch::stable::contiguous(biases[next]);
      ++next;
    }
    products.push_back(woq_args(x, w, bias));
    n += w.format.n;
  }
  LMFUSE_CHECK_VALUE(n == out_features, "the weights have ", n, " output channels, not ",
                     out_features);
  Tensor out = new_result(x, n);
  int64_t column = 0;
  for (WoqArgs& a : products) {
    a.out = as_rows(out, "out");
    a.out.data = static_cast<char*>(a.out.data) + column * element_bytes(out);
    column += a.n;
  }
  if (out.numel()) run(x, first, how, products.data(), static_cast<int64_t>(products.size()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def(
      "woq_pack(Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, int kind, int zero,"
      " int group, ScalarType scale_dtype) -> Tensor");
  m.def("woq_header(Tensor packed) -> Tensor");
  m.def(
      "woq_unpack(Tensor packed, int out_features, int in_features, int groups, bool zeros,"
      " int columns) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("woq_copy(Tensor packed) -> Tensor");
  m.def("woq_values(Tensor packed, Tensor? rows, int out_features, int in_features) -> Tensor");
  m.def(
      "woq(Tensor x, Tensor weight, Tensor? bias, int out_features, int compute,"
      " bool block_scales, int post, Tensor? other, Tensor? other2) -> Tensor");
  m.def(
      "woq_gate_up(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias,"
      " int out_features, int compute, bool block_scales) -> Tensor");
  m.def(
      "woq_concat(Tensor x, Tensor[] weights, Tensor[] biases, int biased, int out_features,"
      " int compute, bool block_scales) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("woq_pack", TORCH_BOX(&woq_pack));
  m.impl("woq_header", TORCH_BOX(&woq_header));
  m.impl("woq_unpack", TORCH_BOX(&woq_unpack));
  m.impl("woq_copy", TORCH_BOX(&woq_copy));
  m.impl("woq_values", TORCH_BOX(&woq_values));
  m.impl("woq", TORCH_BOX(&woq));
  m.impl("woq_gate_up", TORCH_BOX(&woq_gate_up));
  m.impl("woq_concat", TORCH_BOX(&woq_concat));
}

}  // namespace lmfuse
