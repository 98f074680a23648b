// Linear layers over packed weights.
#include "linear.h"

#include <vector>

#include "memory.h"
#include "packed.h"

namespace lmfuse {
namespace {

// One weight [n, k], or several of one shape, [count, n, k]: then their bytes one after the other.
Tensor linear_pack(Tensor weight) {
  LMFUSE_CHECK(weight.is_cpu() && (weight.dim() == 2 || weight.dim() == 3),
               "weight must be a CPU tensor [n, k] or [count, n, k]");
  const int64_t dims = weight.dim(), n = weight.size(dims - 2), k = weight.size(dims - 1);
  LMFUSE_CHECK_VALUE(weight.numel() > 0, "weight must not be empty");
  const int64_t count = dims == 3 ? weight.size(0) : 1;
  const int64_t size = packed_bytes(dtype(weight, "weight"), n, k);
  Tensor packed = new_weight_bytes(count * size);
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i, data += size) {
    Tensor one = dims == 3 ? torch::stable::select(weight, 0, i) : weight;
    PackArgs a{};
    a.weight = as_rows(one, "weight");
    a.n = n;
    a.k = k;
    Header h{};
    std::memcpy(h.magic, Header::kMagic, sizeof(h.magic));
    h.n = n;
    h.k = k;
    h.dtype = static_cast<int32_t>(a.weight.dtype);
    std::memcpy(data, &h, sizeof(h));
    a.packed = data + sizeof(h);
    const auto kernel = kernels().pack;
    parallel(panel_count(n), kPanel * k,
             [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  return packed;
}

Tensor linear_unpack(Tensor packed, int64_t out_features, int64_t in_features, ScalarType type) {
  const Packed p = open(packed, "packed");
  LMFUSE_CHECK_VALUE(p.n == out_features && p.k == in_features && scalar_type(p.dtype) == type,
                     "packed is ", p.n, " by ", p.k, ", but ", out_features, " by ", in_features,
                     ", or another dtype, was asked for");
  const int64_t sizes[2] = {p.n, p.k};
  Tensor weight = new_tensor(sizes, 2, scalar_type(p.dtype));
  PackArgs a{};
  a.weight = as_rows(weight, "weight");
  a.packed = const_cast<char*>(p.panels);
  a.n = p.n;
  a.k = p.k;
  const auto kernel = kernels().unpack;
  parallel(panel_count(p.n), kPanel * p.k,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return weight;
}

// Rows of x as the kernel takes them: x itself where its type, padding and strides allow.
struct Rows2d {
  const void* data;
  int64_t lda;
  Tensor copy;
};

Rows2d rows_of(Tensor& x, const GemmFormat& format, int64_t m, int64_t k) {
  const Matrix from = as_rows(x, "x");
  // Rows that lie a multiple of 1 KB apart share few sets of the first-level cache: 30 % slower.
  const int64_t stride = from.rows.dims ? from.rows.stride[0] : k;
  const bool crowded = m > 16 && stride % 512 == 0;
  if (from.dtype == format.type && k % format.k_multiple == 0 && from.rows.dims <= 1 && !crowded)
    return {from.data, stride, {}};
  const int64_t padded = (k + format.k_multiple - 1) / format.k_multiple * format.k_multiple;
  const int64_t lda = m > 1 ? padded + 32 : padded;
  const int64_t sizes[2] = {m, lda};
  GemmRowsArgs a{};
  a.x = from;
  Tensor copy = new_tensor(sizes, 2, scalar_type(format.type));
  a.rows = copy.mutable_data_ptr();
  a.type = format.type;
  a.k = k;
  a.lda = lda;
  const auto kernel = kernels().gemm_rows;
  parallel(m, k, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {a.rows, lda, copy};
}

// x of the type of the weight, or fp32 over bf16, which is rounded to bf16.
void check_input(const Tensor& x, const Packed& w) {
  LMFUSE_CHECK_VALUE(x.is_cpu() && x.dim() >= 1 && x.size(x.dim() - 1) == w.k,
                     "x must be a CPU tensor [..., ", w.k, "]");
  const DType type = dtype(x, "x");
  LMFUSE_CHECK_VALUE(type == w.dtype || (type == DType::f32 && w.dtype == DType::bf16),
                     "x must have the dtype of weight, or be float32 over bfloat16");
}

// What every product of these rows with weight w has in common.
GemmArgs gemm_args(const Tensor& x, const Packed& w, std::optional<Tensor>& bias) {
  GemmArgs a{};
  a.weight = w.panels;
  a.weight_type = w.dtype;
  a.m = x.numel() / w.k;
  a.n = w.n;
  a.k = w.k;
  if (bias) a.bias = as_vector(*bias, w.n, "bias");
  return a;
}

// Some products of the rows x with weights of one type and k, in one walk of the threads over all
// of their panels.
void run(Tensor x, GemmArgs* products, int64_t count) {
  const GemmArgs& first = products[0];
  // fp32 rows over a bf16 weight are rounded to bf16 first, on every level alike.
  if (first.weight_type == DType::bf16 && dtype(x, "x") != DType::bf16)
    x = torch::stable::to(x, ScalarType::BFloat16);
  const GemmFormat format = kernels().gemm_format(first.weight_type, first.m);
  const Rows2d rows = rows_of(x, format, first.m, first.k);
  const int64_t each = format.scratch_rows * kPanel * (first.weight2 ? 2 : 1);
  std::optional<Tensor> scratch;
  float* scratch_data = nullptr;
  if (each) {
    uint32_t threads = 1;
    torch_get_num_threads(&threads);
    const int64_t size = each * threads;
    scratch = new_tensor(&size, 1, ScalarType::Float);
    scratch_data = static_cast<float*>(scratch->mutable_data_ptr());
  }
  const int64_t blocks = (first.m + kRowBlock - 1) / kRowBlock;
  int64_t panels = 0;
  for (int64_t p = 0; p < count; ++p) {
    products[p].x = rows.data;
    products[p].lda = rows.lda;
    panels += panel_count(products[p].n);
  }
  parallel(blocks * panels, first.k * kPanel * (first.m < 8 ? first.m : 8),
           [&](int64_t begin, int64_t end) {
             run_products(products, count, begin, end,
                          each ? scratch_data + each * thread_index() : nullptr);
           });
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t out_features,
              int64_t post, std::optional<Tensor> other, std::optional<Tensor> other2) {
  const PostOp op = checked_post(post, other, other2);
  const Packed w = open(weight, "weight");
  LMFUSE_CHECK_VALUE(w.n == out_features, "weight has ", w.n, " output channels, not ",
                     out_features);
  check_input(x, w);
  Tensor out = new_result(x, w.n);
  GemmArgs a = gemm_args(x, w, bias);
  a.post = op;
  a.other = operand(other, out, "other");
  a.other2 = operand(other2, out, "other2");
  a.out = as_rows(out, "out");
  if (out.numel()) run(x, &a, 1);
  return out;
}

Tensor linear_gate_up(Tensor x, Tensor gate, Tensor up, std::optional<Tensor> gate_bias,
                      std::optional<Tensor> up_bias, int64_t out_features) {
  const Packed w = open(gate, "gate"), w2 = open(up, "up");
  LMFUSE_CHECK_VALUE(w.n == out_features, "gate has ", w.n, " output channels, not ", out_features);
  LMFUSE_CHECK_VALUE(w2.n == w.n && w2.k == w.k && w2.dtype == w.dtype,
                     "gate and up must have one shape and dtype");
  check_input(x, w);
  Tensor out = new_result(x, w.n);
  GemmArgs a = gemm_args(x, w, gate_bias);
  a.post = PostOp::gate_up;
  a.weight2 = w2.panels;
  if (up_bias) a.bias2 = as_vector(*up_bias, w.n, "up_bias");
  a.out = as_rows(out, "out");
  if (out.numel()) run(x, &a, 1);
  return out;
}

// The products with several weights side by side: [..., sum of n]. Bit i of biased: weight i has
// the next of the biases (torch.jit.trace knows no lists of optional tensors).
Tensor linear_concat(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                     int64_t biased, int64_t out_features) {
  LMFUSE_CHECK(!weights.empty() && weights.size() < 63, "weights must be 1 to 62");
  std::vector<GemmArgs> products;
  int64_t n = 0;
  size_t next = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Packed w = open(weights[i], "weight");
    check_input(x, w);
    std::optional<Tensor> bias;
    if (biased >> i & 1) {
      LMFUSE_CHECK(next < biases.size(), "biased counts more than there are biases");
      bias = biases[next] = torch::stable::contiguous(biases[next]);
      ++next;
    }
    products.push_back(gemm_args(x, w, bias));
    LMFUSE_CHECK_VALUE(w.dtype == products[0].weight_type, "the weights must have one dtype");
    n += w.n;
  }
  LMFUSE_CHECK_VALUE(n == out_features, "the weights have ", n, " output channels, not ",
                     out_features);
  Tensor out = new_result(x, n);
  int64_t column = 0;
  for (GemmArgs& a : products) {
    a.out = as_rows(out, "out");
    a.out.data = static_cast<char*>(a.out.data) + column * (bytes(out) / (a.m ? a.m * n : 1));
    column += a.n;
  }
  if (out.numel()) run(x, products.data(), static_cast<int64_t>(products.size()));
  return out;
}

// Rows of a packed weight: what an embedding that is tied to a linear layer reads.
Tensor linear_rows(Tensor weight, Tensor rows, int64_t in_features, ScalarType type) {
  const Packed p = open(weight, "weight");
  LMFUSE_CHECK_VALUE(p.k == in_features && scalar_type(p.dtype) == type, "weight has rows of ", p.k,
                     ", but ", in_features, ", or another dtype, was asked for");
  LMFUSE_CHECK(rows.is_cpu() && rows.scalar_type() == ScalarType::Long,
               "rows must be a CPU tensor of int64");
  rows = torch::stable::contiguous(rows);
  const auto* ids = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i)
    LMFUSE_CHECK_VALUE(ids[i] >= 0 && ids[i] < p.n, "rows has ", ids[i], ", but weight has ", p.n,
                       " rows");
  const Sizes sizes(rows, rows.dim(), p.k, "rows");
  Tensor out = new_tensor(sizes.at, sizes.dim, scalar_type(p.dtype));
  const UnpackRowsArgs a{p.panels, ids, out.mutable_data_ptr(), p.dtype, p.k};
  const auto kernel = kernels().unpack_rows;
  parallel(count, p.k, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("linear_pack(Tensor weight) -> Tensor");
  m.def(
      "linear_unpack(Tensor packed, int out_features, int in_features, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, int out_features, int post, Tensor? other,"
      " Tensor? other2) -> Tensor");
  m.def(
      "linear_gate_up(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias,"
      " int out_features) -> Tensor");
  m.def(
      "linear_concat(Tensor x, Tensor[] weights, Tensor[] biases, int biased, int out_features) -> "
      "Tensor");
  m.def("linear_rows(Tensor weight, Tensor rows, int in_features, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_unpack", TORCH_BOX(&linear_unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_gate_up", TORCH_BOX(&linear_gate_up));
  m.impl("linear_concat", TORCH_BOX(&linear_concat));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}

}  // namespace lmfuse
