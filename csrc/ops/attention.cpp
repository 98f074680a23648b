// Attention over keys that lie in order, in the blocks of a paged cache, or behind the beam indices
// of an indirect one: each op checks what it was given, says where every sequence lies, and hands
// over to attention_plan.h.
#include <cmath>
#include <limits>
#include <numeric>

#include "attention_plan.h"
#include "kv.h"

namespace lmfuse {
namespace {

constexpr int64_t kFar = int64_t{1} << 40;  // a window that hides nothing

// What all the ops may be given besides queries, keys and values.
struct Options {
  std::optional<Tensor> mask, alibi, sinks;
  double scale;
  bool causal;
  int64_t window_left, window_right;  // negative: none
  double softcap;                     // 0: none
  double key_scale, value_scale;
};

// [n], or where batch is given also [batch, n].
const float* float_vector(std::optional<Tensor>& t, int64_t n, int64_t batch, const char* name) {
  if (!t) return nullptr;
  const int64_t dim = t->dim();
  LMFUSE_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && dim > 0 &&
                   t->size(dim - 1) == n && (dim == 1 || (dim == 2 && t->size(0) == batch)),
               name, " must be a CPU tensor of ", n, " float32");
  if (!t->is_contiguous()) t = torch::stable::contiguous(*t);
  return static_cast<const float*>(t->const_data_ptr());
}

// [batch or 1, heads or 1, queries or 1, keys or 1], with strides 0 where a size is 1.
void set_mask(AttentionArgs& a, std::optional<Tensor>& t, int64_t batch, int64_t q_len,
              int64_t kv_len) {
  using Type = AttentionMask::Type;
  a.mask.type = Type::none;
  if (!t) return;
  LMFUSE_CHECK(t->is_cpu() && t->dim() == 4, "mask must be a CPU tensor of four dimensions");
  const int64_t sizes[4] = {batch, a.heads, q_len, kv_len};
  for (int d = 0; d < 4; ++d)
    LMFUSE_CHECK(t->size(d) == 1 || t->size(d) == sizes[d], "mask cannot broadcast: its size in ",
                 "dimension ", d, " is ", t->size(d), ", not 1 or ", sizes[d]);
  if (t->size(3) > 1 && t->stride(3) > 1) t = torch::stable::contiguous(*t);
  const auto stride = [&](int d) { return t->size(d) == 1 ? 0 : t->stride(d); };
  a.mask.data = t->const_data_ptr();
  a.mask.type = t->scalar_type() == ScalarType::Bool       ? Type::boolean
                : t->scalar_type() == ScalarType::Float    ? Type::f32
                : t->scalar_type() == ScalarType::BFloat16 ? Type::bf16
                : t->scalar_type() == ScalarType::Half     ? Type::f16
                                                           : Type::none;
  LMFUSE_CHECK(a.mask.type != Type::none, "mask must be bool, float32, bfloat16 or float16");
  a.mask.stride_seq = stride(0);
  a.mask.stride_head = stride(1);
  a.mask.stride_query = stride(2);
  a.mask.step = stride(3);
}

// alibi is [heads] or [batch, heads].
void set_options(AttentionArgs& a, Options& o, int64_t batch) {
  LMFUSE_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "query has ", a.heads, " heads, which ",
               a.kv_heads, " KV heads do not divide");
  LMFUSE_CHECK(a.dim > 0 && a.value_dim > 0, "heads must not be empty");
  // The scale of the keys is part of the scores, which softcap and masks then see.
  a.scale = static_cast<float>(o.scale * o.key_scale);
  a.value_scale = static_cast<float>(o.value_scale);
  a.softcap = static_cast<float>(o.softcap);
  a.window_left = o.window_left < 0 ? kFar : std::min(o.window_left, kFar);
  a.window_right = o.causal ? 0 : o.window_right < 0 ? kFar : std::min(o.window_right, kFar);
  if (o.alibi) {
    const bool each = o.alibi->dim() == 2;
    a.alibi = float_vector(o.alibi, a.heads, batch, "alibi");
    a.alibi_stride = each ? a.heads : 0;
  }
  a.sinks = float_vector(o.sinks, a.heads, -1, "sinks");
}

// t with contiguous rows: itself, or a copy.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const bool good = last < 0 || t.size(last) <= 1 || t.stride(last) == 1;
  return good ? t : torch::stable::contiguous(t);
}

// Rows of heads in dimension s of a query or a result; heads are in dimension h.
void check_heads(const Tensor& t, int64_t dim, const char* name) {
  LMFUSE_CHECK(t.is_cpu() && t.dim() == dim, name, " must be a CPU tensor of ", dim, " dimensions");
  LMFUSE_CHECK(t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1 || t.numel() == 0, name,
               " must be contiguous in its last dimension");
}

void set_query(AttentionArgs& a, const Tensor& query, const Tensor& out, int64_t dim) {
  check_heads(query, dim, "query");
  check_heads(out, dim, "out");
  LMFUSE_CHECK(query.scalar_type() == out.scalar_type(), "out must have the dtype of query");
  for (int64_t d = 0; d + 1 < dim; ++d)
    LMFUSE_CHECK(query.size(d) == out.size(d), "out must have the shape of query");
  a.query = query.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.dtype = dtype(query, "query");
  a.q_stride_s = query.stride(dim - 3);
  a.q_stride_h = query.stride(dim - 2);
  a.out_stride_s = out.stride(dim - 3);
  a.out_stride_h = out.stride(dim - 2);
  a.heads = a.q_group = query.size(dim - 2);
  a.dim = query.size(dim - 1);
  a.value_dim = out.size(dim - 1);
}

// [batch, seq, heads, dim], each with its own strides.
Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
                 std::optional<Tensor> alibi, std::optional<Tensor> sinks,
                 std::optional<Tensor> key_scales, std::optional<Tensor> value_scales, double scale,
                 bool causal, int64_t window_left, int64_t window_right, double softcap,
                 double key_scale, double value_scale) {
  query = with_rows(query);
  key = with_rows(key);
  value = with_rows(value);
  check_heads(query, 4, "query");
  check_heads(key, 4, "key");
  check_heads(value, 4, "value");
  const int64_t batch = query.size(0), q_len = query.size(1), kv_len = key.size(1);
  LMFUSE_CHECK(key.size(0) == batch && key.size(3) == query.size(3) && value.size(0) == batch &&
                   value.size(1) == kv_len && value.size(2) == key.size(2),
               "query, key and value do not belong together");
  const int64_t sizes[4] = {batch, q_len, query.size(2), value.size(3)};
  Tensor out = empty(sizes, 4, query);
  AttentionArgs a{};
  set_query(a, query, out, 4);
  a.kv_heads = key.size(2);
  a.key = kv_source(key, key_scales, {-1, 1, 2}, "key");
  a.value = kv_source(value, value_scales, {-1, 1, 2}, "value");
  a.block = kFar;
  Options o{mask,        alibi,        sinks,   scale,     causal,
            window_left, window_right, softcap, key_scale, value_scale};
  set_options(a, o, batch);
  set_mask(a, o.mask, batch, q_len, kv_len);
  AttentionPlan plan;
  for (int64_t b = 0; b < batch; ++b) {
    AttentionSequence s{};
    s.query = b * query.stride(0);
    s.out = b * out.stride(0);
    s.key = b * key.stride(0);
    s.value = b * value.stride(0);
    s.key_scale = key_scales ? b * key_scales->stride(0) : 0;
    s.value_scale = value_scales ? b * value_scales->stride(0) : 0;
    s.q_len = q_len;
    s.kv_len = kv_len;
    plan.sequences.push_back(s);
  }
  run(a, plan);
  return out;
}

// Cumulative lengths: from 0, never falling, to at most limit.
struct Lengths {
  std::vector<int64_t> first;

  Lengths(const Tensor& t, int64_t limit, const char* name) {
    const std::vector<int64_t> at = integers(t, name);
    LMFUSE_CHECK_VALUE(!at.empty() && at[0] == 0, name, " must begin with 0");
    for (size_t i = 1; i < at.size(); ++i)
      LMFUSE_CHECK_VALUE(at[i] >= at[i - 1], name, " must not fall, but ", name, "[", i, "] is ",
                         at[i], " after ", at[i - 1]);
    LMFUSE_CHECK_VALUE(at.back() <= limit, name, " ends at ", at.back(), ", but there are ", limit,
                       " tokens");
    first = at;
  }
  int64_t count() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t size(int64_t i) const { return first[i + 1] - first[i]; }
};

// query, out [tokens, heads, dim]; key, value [tokens, kv_heads, dim].
void attention_varlen(Tensor query, Tensor key, Tensor value, Tensor out, Tensor cu_q, Tensor cu_k,
                      std::optional<Tensor> alibi, std::optional<Tensor> sinks, double scale,
                      bool causal, int64_t window_left, int64_t window_right, double softcap) {
  query = with_rows(query);
  key = with_rows(key);
  value = with_rows(value);
  check_heads(query, 3, "query");
  check_heads(key, 3, "key");
  check_heads(value, 3, "value");
  LMFUSE_CHECK(
      key.size(2) == query.size(2) && value.size(0) == key.size(0) && value.size(1) == key.size(1),
      "query, key and value do not belong together");
  AttentionArgs a{};
  set_query(a, query, out, 3);
  LMFUSE_CHECK(value.size(2) == a.value_dim, "out must have the head dimension of value");
  a.kv_heads = key.size(1);
  a.key = kv_source(key, {}, {-1, 0, 1}, "key");
  a.value = kv_source(value, {}, {-1, 0, 1}, "value");
  a.block = kFar;
  const Lengths q(cu_q, query.size(0), "seqlen_q"), k(cu_k, key.size(0), "seqlen_k");
  LMFUSE_CHECK_VALUE(q.count() == k.count(), "seqlen_q is for ", q.count(),
                     " sequences, seqlen_k for ", k.count());
  Options o{{}, alibi, sinks, scale, causal, window_left, window_right, softcap, 1.0, 1.0};
  set_options(a, o, q.count());
  AttentionPlan plan;
  for (int64_t b = 0; b < q.count(); ++b) {
    AttentionSequence s{};
    s.query = q.first[b] * query.stride(0);
    s.out = q.first[b] * out.stride(0);
    s.key = k.first[b] * key.stride(0);
    s.value = k.first[b] * value.stride(0);
    s.q_len = q.size(b);
    s.kv_len = k.size(b);
    plan.sequences.push_back(s);
  }
  run(a, plan);
}

// The blocks that each sequence needs, all of them inside of the cache.
std::vector<int32_t> blocks_of(const Integers& tables, int64_t width,
                               const std::vector<int64_t>& lens, const char* name, int64_t block,
                               int64_t blocks) {
  const int64_t count = static_cast<int64_t>(lens.size());
  LMFUSE_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "key_cache has ", blocks,
                     " blocks, but may have at most 2^31 - 1");
  std::vector<int32_t> own(count * width, 0);
  for (int64_t b = 0; b < count; ++b) {
    LMFUSE_CHECK_VALUE(lens[b] >= 0 && lens[b] <= width * block, name, ": the length of sequence ",
                       b, " is ", lens[b], ", but its row of block_tables has room for ", width,
                       " blocks of ", block);
    for (int64_t i = 0; i * block < lens[b]; ++i) {
      const int64_t entry = tables[b * width + i];
      LMFUSE_CHECK_VALUE(entry >= 0 && entry < blocks, "block_tables[", b, ", ", i, "] is ", entry,
                         ", but the cache has ", blocks, " blocks");
      own[b * width + i] = static_cast<int32_t>(entry);
    }
  }
  return own;
}

// query, out [tokens, heads, dim]; caches [blocks, kv_heads, block, dim]. cu_q: where the queries
// of each sequence begin (cumulative); without, each sequence has one. lens: how many keys each
// has, or (cumulative) where they would begin.
void attention_paged(Tensor query, Tensor key_cache, Tensor value_cache, Tensor out,
                     std::optional<Tensor> cu_q, Tensor lens, bool cumulative, Tensor tables,
                     std::optional<Tensor> alibi, std::optional<Tensor> sinks,
                     std::optional<Tensor> key_scales, std::optional<Tensor> value_scales,
                     double scale, bool causal, int64_t window_left, int64_t window_right,
                     double softcap, double key_scale, double value_scale) {
  query = with_rows(query);
  check_heads(query, 3, "query");
  check_heads(key_cache, 4, "key_cache");
  check_heads(value_cache, 4, "value_cache");
  LMFUSE_CHECK(key_cache.size(3) == query.size(2) && value_cache.size(0) == key_cache.size(0) &&
                   value_cache.size(1) == key_cache.size(1) &&
                   value_cache.size(2) == key_cache.size(2),
               "query, key_cache and value_cache do not belong together");
  LMFUSE_CHECK(same_type(key_cache, value_cache), "the caches must have one dtype");
  LMFUSE_CHECK(tables.dim() == 2, "block_tables must have two dimensions");
  AttentionArgs a{};
  set_query(a, query, out, 3);
  LMFUSE_CHECK(value_cache.size(3) == a.value_dim, "out must have the head dimension of the cache");
  a.kv_heads = key_cache.size(1);
  a.key = kv_source(key_cache, key_scales, {0, 2, 1}, "key_cache");
  a.value = kv_source(value_cache, value_scales, {0, 2, 1}, "value_cache");
  a.block = key_cache.size(2);
  LMFUSE_CHECK(a.block > 0, "key_cache has blocks of no token");
  std::vector<int64_t> kv_lens;
  if (cumulative) {
    const Lengths l(lens, std::numeric_limits<int64_t>::max(), "cu_seqlens_kv");
    for (int64_t b = 0; b < l.count(); ++b) kv_lens.push_back(l.size(b));
  } else {
    kv_lens = integers(lens, "context_lens");
  }
  const int64_t batch = static_cast<int64_t>(kv_lens.size());
  LMFUSE_CHECK_VALUE(tables.size(0) == batch, "block_tables has ", tables.size(0), " rows for ",
                     batch, " sequences");
  std::vector<int64_t> first(batch + 1);
  for (int64_t b = 0; b <= batch; ++b) first[b] = b;
  if (cu_q) first = Lengths(*cu_q, query.size(0), "cu_seqlens_q").first;
  LMFUSE_CHECK_VALUE(static_cast<int64_t>(first.size()) == batch + 1 &&
                         (cu_q ? first[batch] <= query.size(0) : batch == query.size(0)),
                     "there are queries for ", static_cast<int64_t>(first.size()) - 1,
                     " sequences, and lengths for ", batch);
  const std::vector<int32_t> own =
      blocks_of(Integers(tables, "block_tables"), tables.size(1), kv_lens,
                cumulative ? "cu_seqlens_kv" : "context_lens", a.block, key_cache.size(0));
  Options o{{},          alibi,        sinks,   scale,     causal,
            window_left, window_right, softcap, key_scale, value_scale};
  set_options(a, o, batch);
  AttentionPlan plan;
  for (int64_t b = 0; b < batch; ++b) {
    AttentionSequence s{};
    s.query = first[b] * query.stride(0);
    s.out = first[b] * out.stride(0);
    s.q_len = first[b + 1] - first[b];
    s.kv_len = kv_lens[b];
    s.table = own.data() + b * tables.size(1);
    plan.sequences.push_back(s);
  }
  run(a, plan);
}

int32_t column_in(int64_t named, int64_t batch, int64_t position) {
  LMFUSE_CHECK_VALUE(named >= 0 && named < batch, "the beam indices of layer_past name row ", named,
                     " at position ", position, ", but the batch has ", batch, " rows");
  return static_cast<int32_t>(named);
}

// For each position of each row of the batch the column of the cache that holds it. Column i at
// position len - 1 is that which beam_idx[len - 1, i] names, and so back to the first position; the
// positions of a shared prompt are in the first column of its beams.
std::vector<int32_t> columns_of(const Tensor& beam_idx, int64_t rows, int64_t batch, int64_t past,
                                int64_t kv_len) {
  const auto* at = static_cast<const int64_t*>(beam_idx.const_data_ptr());
  const int64_t prompt_len = at[rows * batch], prompts = at[(rows + 1) * batch];
  LMFUSE_CHECK_VALUE(prompt_len >= 0 && prompt_len <= rows && prompts > 0 && prompts <= batch &&
                         batch % prompts == 0,
                     "the beam indices of layer_past record a prompt of ", prompt_len,
                     " tokens for a batch of ", prompts, ", which does not fit ", rows,
                     " rows and a batch of ", batch);
  const int64_t beams = batch / prompts;
  const int64_t shared = beams > 1 ? std::min(prompt_len, past) : 0;
  std::vector<int32_t> columns(batch * kv_len), column(batch);
  for (int64_t i = 0; i < batch; ++i) {
    int32_t* mine = columns.data() + i * kv_len;
    std::fill(mine, mine + shared, static_cast<int32_t>(i / beams * beams));
    std::fill(mine + past, mine + kv_len, static_cast<int32_t>(i));
    column[i] = static_cast<int32_t>(i);
  }
  for (int64_t t = past - 1; t >= shared; --t) {
    const int64_t* named = at + t * batch;
    bool stay = true;  // most do, and then no read waits for the one before it
    for (int64_t i = 0; i < batch; ++i) stay &= named[i] == i;
    for (int64_t i = 0; i < batch; ++i) {
      if (!stay) column[i] = column_in(named[column[i]], batch, t);
      columns[i * kv_len + t] = column[i];
    }
  }
  return columns;
}

// Of [batch, seq, kv_heads, dim] the tokens at position `past` and on into the rows of caches
// [rows, batch, kv_heads, dim], each sequence into its own column.
void append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
            const Tensor& value_cache, int64_t past) {
  const auto side = [](const Tensor& from, const Tensor& to, const char* name) {
    const KvSource cache = kv_source(to, {}, {0, 1, 2}, name);
    return CacheArgs::Side{from.const_data_ptr(), from.stride(0), from.stride(2),
                           to.mutable_data_ptr(), cache.stride,   nullptr,
                           cache.scale_stride,    from.size(3),   1.0f};
  };
  CacheArgs a{};
  a.key = side(key, key_cache, "key_cache");
  a.value = side(value, value_cache, "value_cache");
  a.from_type = dtype(key, "key");
  a.to_type = kv_type(key_cache, "key_cache");
  a.heads = key.size(2);
  const int64_t batch = a.block = key.size(0), seq = key.size(1), size = key.element_size();
  std::vector<int64_t> slots(seq * batch);
  std::iota(slots.begin(), slots.end(), past * batch);
  const auto kernel = kernels().cache_write;
  const auto at = [&](const Tensor& t, int64_t s) {
    return static_cast<const char*>(t.const_data_ptr()) + s * t.stride(1) * size;
  };
  parallel(seq, batch * a.heads * (a.key.dim + a.value.dim), [&](int64_t begin, int64_t end) {
    CacheArgs mine = a;
    for (int64_t s = begin; s < end; ++s) {
      mine.key.from = at(key, s);
      mine.value.from = at(value, s);
      mine.slots = slots.data() + s * batch;
      kernel(mine, 0, batch);
    }
  });
}

void check_indirect(const Tensor& query, const Tensor& key, const Tensor& value,
                    const Tensor& key_cache, const Tensor& value_cache, const Tensor& beam_idx,
                    int64_t past) {
  const int64_t batch = query.size(0), seq = query.size(1), rows = key_cache.size(0);
  const auto belong = [&](const Tensor& t, const Tensor& cache) {
    return t.size(0) == batch && t.size(1) == seq && t.size(2) == cache.size(2) &&
           t.size(3) == cache.size(3) && cache.size(0) == rows && cache.size(1) == batch;
  };
  LMFUSE_CHECK(belong(key, key_cache) && belong(value, value_cache) &&
                   key.size(3) == query.size(3) && key.size(2) == value.size(2),
               "query, key, value and their caches do not belong together");
  LMFUSE_CHECK(same_type(key, value) && same_type(key_cache, value_cache) &&
                   (same_type(key, key_cache) || key_cache.element_size() == 1),
               "the caches must have the dtype of key and value, or be fp8");
  LMFUSE_CHECK(beam_idx.is_cpu() && beam_idx.scalar_type() == ScalarType::Long &&
                   beam_idx.is_contiguous() && beam_idx.dim() == 2 &&
                   beam_idx.size(0) == rows + 2 && beam_idx.size(1) == batch,
               "beam_idx must be a contiguous CPU tensor of int64, [rows + 2, batch]");
  LMFUSE_CHECK_VALUE(past >= 0 && past <= rows - seq, "there are ", past, " tokens in ", rows,
                     " rows of the cache, but ", seq, " more must fit");
}

// query, key, value [batch, seq, heads, dim]; caches [rows, batch, kv_heads, dim] of `past` tokens,
// to which key and value are appended.
Tensor attention_indirect(Tensor query, Tensor key, Tensor value, Tensor key_cache,
                          Tensor value_cache, Tensor beam_idx, int64_t past,
                          std::optional<Tensor> mask, std::optional<Tensor> alibi, double scale,
                          bool causal) {
  query = with_rows(query);
  key = with_rows(key);
  value = with_rows(value);
  check_heads(query, 4, "query");
  check_heads(key, 4, "key");
  check_heads(value, 4, "value");
  check_heads(key_cache, 4, "key_cache");
  check_heads(value_cache, 4, "value_cache");
  check_indirect(query, key, value, key_cache, value_cache, beam_idx, past);
  const int64_t batch = query.size(0), q_len = query.size(1), rows = key_cache.size(0);
  const int64_t kv_len = past + q_len;
  const int64_t sizes[4] = {batch, q_len, query.size(2), value_cache.size(3)};
  Tensor out = empty(sizes, 4, query);
  AttentionArgs a{};
  set_query(a, query, out, 4);
  a.kv_heads = key_cache.size(2);
  a.key = kv_source(key_cache, {}, {1, 0, 2}, "key_cache");
  a.value = kv_source(value_cache, {}, {1, 0, 2}, "value_cache");
  a.block = 1;
  a.absolute = true;
  Options o{mask, alibi, {}, scale, causal, -1, -1, 0.0, 1.0, 1.0};
  set_options(a, o, batch);
  set_mask(a, o.mask, batch, q_len, kv_len);
  const std::vector<int32_t> columns = columns_of(beam_idx, rows, batch, past, kv_len);
  append(key, value, key_cache, value_cache, past);
  AttentionPlan plan;
  for (int64_t b = 0; b < batch; ++b) {
    AttentionSequence s{};
    s.query = b * query.stride(0);
    s.out = b * out.stride(0);
    s.q_len = q_len;
    s.kv_len = kv_len;
    s.table = columns.data() + b * kv_len;
    plan.sequences.push_back(s);
  }
  run(a, plan);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? alibi,"
      " Tensor? sinks, Tensor? key_scales, Tensor? value_scales, float scale, bool causal,"
      " int window_left, int window_right, float softcap, float key_scale, float value_scale)"
      " -> Tensor");
  m.def(
      "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor seqlen_q,"
      " Tensor seqlen_k, Tensor? alibi_slopes, Tensor? sinks, float scale, bool causal,"
      " int window_left, int window_right, float softcap) -> ()");
  m.def(
      "attention_paged(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) output,"
      " Tensor? cu_seqlens_q, Tensor lens, bool cumulative, Tensor block_tables,"
      " Tensor? alibi_slopes, Tensor? sinks, Tensor? key_scales, Tensor? value_scales, float scale,"
      " bool causal, int window_left, int window_right, float softcap, float key_scale,"
      " float value_scale) -> ()");
  m.def(
      "attention_indirect(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache,"
      " Tensor(b!) value_cache, Tensor beam_idx, int past, Tensor? mask, Tensor? alibi,"
      " float scale, bool causal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lmfuse, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_paged", TORCH_BOX(&attention_paged));
  m.impl("attention_indirect", TORCH_BOX(&attention_indirect));
}

}  // namespace lmfuse
