#include "rope.h"

namespace lmfuse {
namespace {

Heads heads_of(const Tensor& x, bool heads_first, const char* name) {
  LMFUSE_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a CPU tensor of four dimensions");
  LMFUSE_CHECK(x.size(3) <= 1 || x.stride(3) == 1 || x.numel() == 0, name,
               " must be contiguous in its last dimension");
  const int s = heads_first ? 2 : 1, h = 3 - s;
  return {x.size(0), x.size(s), x.size(h), x.size(3), x.stride(0), x.stride(s), x.stride(h)};
}

int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

RopeArgs::Heads operand(const Heads& g, void* data) {
  return {data, g.stride_b, g.stride_s, g.stride_h};
}

// A new tensor with the sizes of x, laid out as [batch, seq, heads, head_dim] in memory.
Tensor empty_heads(const Tensor& x, const Heads& g, bool heads_first) {
  const int64_t row = g.heads * g.dim;
  const int64_t sizes[4] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const int64_t strides[4] = {g.seq * row, heads_first ? g.dim : row, heads_first ? row : g.dim, 1};
  int32_t type;
  aoti_torch_get_dtype(x.get(), &type);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void rotate(RopeArgs a, const Heads& x, const void* from, const Heads& y, void* to, DType type) {
  a.x = operand(x, const_cast<void*>(from));
  a.y = operand(y, to);
  a.dtype = type;
  a.stream = to != from && x.batch * x.seq * x.heads * x.dim * size_of(type) >= kStreamBytes;
  const auto kernel = kernels().rope;
  parallel(x.batch * x.seq, x.heads * x.dim,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor rope(Tensor x, Tensor sin, Tensor cos, std::optional<Tensor> positions, int64_t rotary_dim,
            bool half, bool heads_first) {
  const Heads g = heads_of(x, heads_first, "x");
  RopeTable table{sin, cos, positions, rotary_dim, half};
  const RopeArgs a = table.args(g);
  Tensor y = empty_heads(x, g, heads_first);
  rotate(a, g, x.const_data_ptr(), heads_of(y, heads_first, "y"), y.mutable_data_ptr(),
         dtype(x, "x"));
  return y;
}

std::tuple<Tensor, Tensor> rope_qk(Tensor query, Tensor key, Tensor sin, Tensor cos,
                                   std::optional<Tensor> positions, int64_t rotary_dim, bool half,
                                   bool heads_first) {
  const Heads q = heads_of(query, heads_first, "query"), k = heads_of(key, heads_first, "key");
  LMFUSE_CHECK(q.batch == k.batch && q.seq == k.seq && q.dim == k.dim && same_type(query, key),
               "query and key must agree in all but their heads");
  return {rope(query, sin, cos, positions, rotary_dim, half, heads_first),
          rope(key, sin, cos, positions, rotary_dim, half, heads_first)};
}

void rope_qk_(Tensor query, Tensor key, Tensor sin, Tensor cos, std::optional<Tensor> positions,
              int64_t rotary_dim, bool half) {
  const Heads q = heads_of(query, false, "query"), k = heads_of(key, false, "key");
  LMFUSE_CHECK(q.batch == k.batch && q.seq == k.seq && q.dim == k.dim,
               "query and key must agree in all but their heads");
  RopeTable table{sin, cos, positions, rotary_dim, half};
  RopeArgs a = table.args(q);
  rotate(a, q, query.const_data_ptr(), q, query.mutable_data_ptr(), dtype(query, "query"));
  a.heads = k.heads;
  rotate(a, k, key.const_data_ptr(), k, key.mutable_data_ptr(), dtype(key, "key"));
}

// qkv [batch, seq, (heads + 2 kv_heads) * head_dim] -> q and k rotated, v copied.
std::tuple<Tensor, Tensor, Tensor> rope_qkv(Tensor qkv, Tensor sin, Tensor cos,
                                            std::optional<Tensor> positions, int64_t num_heads,
                                            int64_t head_dim, int64_t rotary_dim, bool half) {
  LMFUSE_CHECK(qkv.is_cpu() && qkv.dim() == 3 &&
                   (qkv.size(2) <= 1 || qkv.stride(2) == 1 || qkv.numel() == 0),
               "x must be a CPU tensor [batch, seq, features], contiguous in its last dimension");
  const int64_t features = qkv.size(2);
  const bool fits = num_heads > 0 && head_dim > 0 && num_heads <= features / head_dim;
  const int64_t rest = fits ? features - num_heads * head_dim : 0;
  LMFUSE_CHECK(rest > 0 && rest % (2 * head_dim) == 0, "x has ", features, " features, which ",
               num_heads, " query heads of ", head_dim,
               " do not leave an equal number of key and value heads of");
  const int64_t kv_heads = rest / (2 * head_dim);
  const DType type = dtype(qkv, "x");
  Heads g{qkv.size(0), qkv.size(1), num_heads, head_dim, qkv.stride(0), qkv.stride(1), head_dim};
  RopeTable table{sin, cos, positions, rotary_dim, half};
  const RopeArgs shared = table.args(g);

  const char* from = static_cast<const char*>(qkv.const_data_ptr());
  const auto part = [&](int64_t heads, int64_t rotary) {
    const int64_t sizes[4] = {g.batch, g.seq, heads, head_dim};
    Tensor y = empty(sizes, 4, qkv);
    g.heads = heads;
    RopeArgs a = shared;
    a.heads = heads;
    a.rotary_dim = rotary;
    rotate(a, g, from, heads_of(y, false, "y"), y.mutable_data_ptr(), type);
    from += heads * head_dim * size_of(type);
    return y;
  };
  Tensor q = part(num_heads, rotary_dim);
  Tensor k = part(kv_heads, rotary_dim);
  return {q, k, part(kv_heads, 0)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def(
      "rope(Tensor x, Tensor sin, Tensor cos, Tensor? position_ids, int rotary_dim, bool half,"
      " bool heads_first) -> Tensor");
  m.def(
      "rope_qk(Tensor query, Tensor key, Tensor sin, Tensor cos, Tensor? position_ids,"
      " int rotary_dim, bool half, bool heads_first) -> (Tensor, Tensor)");
  m.def(
      "rope_qk_(Tensor(a!) query, Tensor(b!) key, Tensor sin, Tensor cos, Tensor? position_ids,"
      " int rotary_dim, bool half) -> ()");
  m.def(
      "rope_qkv(Tensor x, Tensor sin, Tensor cos, Tensor? position_ids, int num_heads,"
      " int head_dim, int rotary_dim, bool half) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_qk", TORCH_BOX(&rope_qk));
  m.impl("rope_qk_", TORCH_BOX(&rope_qk_));
  m.impl("rope_qkv", TORCH_BOX(&rope_qkv));
}

}  // namespace lmfuse
