// Memory for caches, and keys and values of new tokens into their slots.
#include "kv.h"
#include "memory.h"

namespace lmfuse {
namespace {

// More than the second-level caches hold goes around them: an ordinary store first fetches its
// line, half as much traffic again (4096 tokens of 8 x 128: 58 and 97 % of the copy bandwidth).
constexpr int64_t kStreamCacheBytes = int64_t{4} << 20;

// Whether each row begins where a line does; others would leave lines half written.
bool whole_lines(const CacheArgs::Side& s, int64_t size) {
  constexpr int64_t kLine = 64;
  const auto whole = [&](int64_t stride) { return stride * size % kLine == 0; };
  return reinterpret_cast<uintptr_t>(s.to) % kLine == 0 && whole(s.stride.block) &&
         whole(s.stride.token) && whole(s.stride.head);
}

// key, value [tokens, heads, dim]; caches [blocks, heads, block, dim]; slots [tokens].
void cache_write(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots,
                 std::optional<Tensor> key_scales, std::optional<Tensor> value_scales,
                 double key_scale, double value_scale) {
  if (key.dim() == 3 && key.size(2) > 1 && key.stride(2) != 1) key = torch::stable::contiguous(key);
  if (value.dim() == 3 && value.size(2) > 1 && value.stride(2) != 1)
    value = torch::stable::contiguous(value);
  const auto side = [&](const Tensor& from, const Tensor& to, std::optional<Tensor>& scales,
                        double scale, const char* name) {
    LMFUSE_CHECK(from.is_cpu() && to.is_cpu() && from.dim() == 3 && to.dim() == 4 &&
                     from.size(1) == to.size(1) && from.size(2) == to.size(3) &&
                     (from.size(2) <= 1 || (from.stride(2) == 1 && to.stride(3) == 1)),
                 name, " and its cache do not belong together");
    const KvSource to_source = kv_source(to, scales, {0, 2, 1}, name);
    return CacheArgs::Side{
        from.const_data_ptr(),  from.stride(0),   from.stride(1),
        to.mutable_data_ptr(),  to_source.stride, const_cast<float*>(to_source.scale),
        to_source.scale_stride, from.size(2),     static_cast<float>(1.0 / scale)};
  };
  CacheArgs a{};
  a.key = side(key, key_cache, key_scales, key_scale, "key");
  a.value = side(value, value_cache, value_scales, value_scale, "value");
  a.from_type = dtype(key, "key");
  a.to_type = kv_type(key_cache, "key_cache");
  a.block = key_cache.size(2);
  a.heads = key.size(1);
  LMFUSE_CHECK(
      dtype(value, "value") == a.from_type && kv_type(value_cache, "value_cache") == a.to_type,
      "key and value, and their caches, must have one dtype");
  LMFUSE_CHECK(static_cast<int8_t>(a.to_type) > 2 ||
                   static_cast<int8_t>(a.to_type) == static_cast<int8_t>(a.from_type),
               "the cache must have the dtype of key, or be fp8 or int8");
  const int64_t tokens = key.size(0), all = key_cache.size(0) * a.block;
  LMFUSE_CHECK(value.size(0) == tokens && value.size(1) == a.heads &&
                   value_cache.size(0) == key_cache.size(0) && value_cache.size(2) == a.block &&
                   slots.numel() == tokens,
               "key, value, caches and slot_mapping do not belong together");
  const std::vector<int64_t> checked = integers(slots, "slot_mapping");
  for (int64_t t = 0; t < tokens; ++t)
    LMFUSE_CHECK_VALUE(checked[t] < all, "slot_mapping[", t, "] is ", checked[t],
                       ", but the cache has ", all, " slots");
  a.slots = checked.data();
  const int64_t size = key_cache.element_size();
  a.stream = tokens * a.heads * (a.key.dim + a.value.dim) * size >= kStreamCacheBytes &&
             whole_lines(a.key, size) && whole_lines(a.value, size);
  const auto kernel = kernels().cache_write;
  parallel(tokens, a.heads * (a.key.dim + a.value.dim),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensor cache_new(int64_t size, bool alone) {
  LMFUSE_CHECK(size >= 0, "size must not be negative");
  return new_cache_bytes(size, alone);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("cache_new(int size, bool alone) -> Tensor");
  m.def(
      "cache_write(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
      " Tensor slots, Tensor(c!)? key_scales, Tensor(d!)? value_scales, float key_scale,"
      " float value_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) { m.impl("cache_write", TORCH_BOX(&cache_write)); }

// No tensor tells it which device it belongs to.
STABLE_TORCH_LIBRARY_IMPL(lmfuse, CompositeExplicitAutograd, m) {
  m.impl("cache_new", TORCH_BOX(&cache_new));
}

}  // namespace lmfuse
