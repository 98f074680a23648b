// THE table: every kernel, one line each. A kernel computes the slice [begin, end) of its work and
// knows neither torch nor threads. It is compiled once per instruction set (see CMakeLists.txt), so
// a kernel that one level lacks is a link error, never a silent fallback.
#pragma once

#include <cstdint>

namespace lmfuse {

enum class DType : int8_t { f32, bf16, f16 };

// Where row r of a tensor starts, in elements: its leading dimensions, collapsed where they can be.
// The elements of a row are contiguous.
struct Rows {
  static constexpr int kMaxDims = 6;
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// A tensor seen as rows of contiguous elements. data is null for an operand that was not given.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  Rows rows;
};

// A vector of contiguous elements (a weight, a bias); null data: not given.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// y = norm(x + residual) * (weight + weight_offset) + bias, row by row; residual, weight and bias
// may be absent. add_back: residual = x + residual. center: subtract the mean (layer norm).
struct NormArgs {
  Matrix x, residual, y;
  Vector weight, bias;
  int64_t n;
  float eps;
  float weight_offset;
  bool add_back;
  bool center;
  bool stream;  // y is larger than the caches: write around them
};

// y = residual + x * scale, row by row; residual may be absent. x is of the dtype of y, or fp32.
struct AddScaledArgs {
  Matrix x, residual, y;
  int64_t n;
  float scale;
};

// y = exp(x - max x) / sum of these, row by row.
struct SoftmaxArgs {
  Matrix x, y;
  int64_t n;
};

// y[r]: where row r is largest first; NaN is larger than all.
struct ArgmaxArgs {
  Matrix x;
  int64_t* y;
  int64_t n;
};

// y: the first i with x[i] + add above `than`, or NaN; where there is none, the end.
struct AboveArgs {
  const float* x;
  float add, than;
  int64_t* y;
};

// y[r] = sum over j < count of weights[r, j] * x[from[r, j]], in that order.
struct MixArgs {
  Matrix x, y;
  const int64_t* from;
  const float* weights;
  int64_t count, n;
};

enum class Activation : int8_t { silu, gelu_erf, gelu_tanh, clamped_swiglu };

// y = activation(gate) * up, row by row. clamped_swiglu: g sigmoid(slope g) (u + 1), where g and u
// are gate and up, at most limit, and u at least -limit.
struct GatedArgs {
  Matrix gate, up, y;
  int64_t n;
  Activation activation;
  bool stream;
  float slope, limit;
};

// Rotation of heads x[b, s, h, :] by the angles of table row
//   position(b, s) = positions ? positions[b * pos_b + s * pos_s] + s * pos_step : s
// half:        pairs (j, j + rotary_dim / 2)   (GPT-NeoX, Llama)
// interleaved: pairs (2j, 2j + 1)              (GPT-J)
// Elements from rotary_dim to head_dim are copied. y may be x itself (in place).
struct RopeArgs {
  struct Heads {
    void* data;
    int64_t stride_b, stride_s, stride_h;
  };
  Heads x, y;
  DType dtype, table_dtype;
  const void *sin, *cos;
  int64_t sin_stride_b, sin_stride_s, cos_stride_b, cos_stride_s;  // of a table row and batch
  const int64_t* positions;
  int64_t pos_b, pos_s, pos_step;
  int64_t seq_len, heads, head_dim, rotary_dim;
  bool half;
  bool stream;
};

// A packed weight [n, k]: panels of 32 output channels, the last one padded with zeros. One layout
// per dtype, whatever the instruction set, the number of threads or of rows (kRow = 128 B):
//   f32  [panel][k][32]          f16  [panel][k][32]
//   bf16 [panel][k / 2][32][2], k padded to a multiple of 32: what VDPBF16PS and the tiles take
constexpr int64_t kPanel = 32;
constexpr int64_t kDotStep = 32;

constexpr int64_t packed_k(DType weight, int64_t k) {
  return weight == DType::bf16 ? (k + kDotStep - 1) / kDotStep * kDotStep : k;
}
constexpr int64_t panel_bytes(DType weight, int64_t k) {
  return packed_k(weight, k) * kPanel * (weight == DType::f32 ? 4 : 2);
}
constexpr int64_t panel_count(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Rows of weight into panels, or (unpack) back. weight and packed have one dtype.
struct PackArgs {
  Matrix weight;
  void* packed;
  int64_t n, k;
};

// y[i] = row rows[i] of a packed weight.
struct UnpackRowsArgs {
  const void* packed;
  const int64_t* rows;
  void* y;
  DType dtype;
  int64_t k;
};

// What is done to the fp32 accumulators z before the one rounding; u, v: other operands.
enum class PostOp : int8_t {
  none,       // z
  relu,       // max(z, 0)
  gelu_erf,   // z/2 (1 + erf(z/sqrt 2))
  gelu_tanh,  // its tanh form
  silu,       // z / (1 + e^-z)
  mul,        // z u
  add,        // z + u
  add_add,    // z + u + v
  silu_mul,   // silu(z) u
  gate_up,    // silu(z) (x W2^T + b2): two weights in one sweep
};

// How a level wants the rows of x for a weight of some dtype: which type, and k padded to what.
struct GemmFormat {
  DType type;
  int64_t k_multiple;
  int64_t scratch_rows;  // of kPanel accumulators, for each weight
};

// Rows of x into the form of GemmFormat: converted, padded with zeros up to lda.
struct GemmRowsArgs {
  Matrix x;
  void* rows;
  DType type;
  int64_t k, lda;
};

// out = post(x W^T + bias). The work is counted in panels of row blocks: block * panel_count(n) +
// panel.
struct GemmArgs {
  const void* x;  // rows in the form of GemmFormat, lda elements apart
  int64_t lda;
  const void *weight, *weight2;  // packed panels
  Vector bias, bias2;
  Matrix out, other, other2;
  DType weight_type;
  PostOp post;
  int64_t m, n, k;
  float* scratch;  // of the calling thread
};
constexpr int64_t kRowBlock = 512;  // rows that share one pass over the weight

// A quantized weight [n, k]: panels of 32 output channels, the last one padded. A panel is groups
// along k (one, where every channel has one scale), each of them scales[32], zeros[32] if there are
// any, and the codes, k padded with zeros to a multiple of woq_step:
//   int8, fp8   [k / 4][32][4] bytes, fp8 being e4m3
//   int4, nf4   [k / 8][32] words of 32 bits: nibbles k 0, 2, 4, 6 in the lower half, 1, 3, 5, 7
//   above
// One layout for every instruction set and kind of arithmetic: four bytes are what VPDPBUSD and the
// tiles take, and a word shifted by a nibble is two indices into a table of bf16.
enum class WoqKind : int8_t { int8, int4, nf4, fp8 };
enum class WoqZero : int8_t {
  none,    // value = (q - middle) scale; the middle of int4 is 8, else 0
  zero,    // value = (q - zero) scale
  offset,  // value = q scale + offset
};

struct WoqFormat {
  WoqKind kind;
  WoqZero zero;
  DType scale_type;  // of scales and zeros
  int64_t n, k;      // k: columns as they lie in the panels
  int64_t group;     // columns that share a scale

  constexpr bool nibbles() const { return kind == WoqKind::int4 || kind == WoqKind::nf4; }
  constexpr int64_t groups() const { return (k + group - 1) / group; }
  constexpr int64_t step() const { return group == 32 ? 32 : 64; }
  constexpr int64_t packed_k() const { return (k + step() - 1) / step() * step(); }
  constexpr int64_t code_bytes(int64_t columns) const {
    return columns * kPanel / (nibbles() ? 2 : 1);
  }
  constexpr int64_t scale_bytes() const {
    return kPanel * (scale_type == DType::f32 ? 4 : 2) * (zero == WoqZero::none ? 1 : 2);
  }
  constexpr int64_t panel_bytes() const {
    return groups() * scale_bytes() + code_bytes(packed_k());
  }
};

// Codes [n][k], scales and zeros [n][groups] into panels, or (unpack) back. order: which column of
// codes each column of the panels is, -1 for none; null: the same.
struct WoqPackArgs {
  WoqFormat format;
  char* packed;
  uint8_t* codes;
  float *scales, *zeros;
  const int32_t* order;
  int64_t k;
};

// y[i] = row rows[i] of a quantized weight (row i, if rows is null), in fp32.
struct WoqValuesArgs {
  WoqFormat format;
  const char* packed;
  const int32_t* order;
  const int64_t* rows;
  float* y;
  int64_t k;
};

// What is multiplied: fp32 values, codes widened to bf16, or int8 codes and int8 rows of x.
enum class WoqCompute : int8_t { f32, bf16, int8 };

// Blocks of k, within groups: sums over each are scaled, and added in order.
constexpr int64_t kWoqBlock = 256;
constexpr int64_t woq_block(const WoqFormat& f) {
  const int64_t group = (f.group + f.step() - 1) / f.step() * f.step();
  return group < kWoqBlock ? group : kWoqBlock;
}
// int32 holds the sums of so many bytes by bytes, fp32 those of so many bytes, both exactly.
constexpr int64_t kWoqMostExact = 1 << 16;
constexpr int64_t woq_whole_group(const WoqFormat& f) {
  const int64_t group = (f.group + f.step() - 1) / f.step() * f.step();
  return group < kWoqMostExact ? group : kWoqMostExact;
}
constexpr int64_t woq_blocks(const WoqFormat& f, int64_t block) {
  return (f.k + block - 1) / block;
}

// Values of a row of x that int8 compute leaves as they are: the largest, which else would take the
// scale for themselves. With all layers of SmolLM2-135M in int8, perplexity is 3.7 % above that of
// bf16 compute without them, and 0.2 % with eight (KL 0.036 and 0.001; with four 0.003).
constexpr int64_t kWoqOutliers = 8;
struct WoqOutlier {
  int32_t group, codes;  // of its column: the bytes of codes before it in the panel
  int32_t shift;         // which byte of the word it is; of nibbles: what brings it to the bottom
  float value;           // where codes are bytes, over 2^24
};

// Rows of x, as the kernel wants them: columns in the order of the panels, padded with zeros as
// these are, and for each block the sum of what it then holds. As int8: x / scale, with a scale for
// each row or block, and 0 where there is an outlier.
struct WoqRowsArgs {
  Matrix x;
  WoqFormat format;
  WoqCompute compute;  // as what
  bool round;          // to bf16 first
  bool block_scales;
  int64_t block;  // as WoqPlan says
  const int32_t* order;
  int64_t k, lda;
  void* rows;
  float *sums, *scales;  // [blocks][m], or scales[m]; scales for int8 only
  WoqOutlier* outliers;  // [m][kWoqOutliers], for int8 only
  float* scratch;        // k and packed_k floats, of the calling thread
};

// out = post(x W^T + bias), as GemmArgs (of which weight_type is not used).
struct WoqArgs : GemmArgs {
  WoqFormat format;
  WoqCompute compute;
  bool block_scales;
  int64_t block;
  const float *sums, *scales;
  const WoqOutlier* outliers;
};
// How a level computes, in blocks of how many columns, and how many floats of scratch a thread then
// needs.
struct WoqPlan {
  WoqCompute compute;
  int64_t block, scratch;
};

// Attention: out = softmax(scale q k^T + bias) v, the softmax over chunks of keys that begin at
// fixed positions. Those of a span, kSpan chunks that begin at a multiple of it, are joined in
// their order, and then the spans in theirs. So the bits of a row depend on its query, its keys and
// its masks, and on nothing that is computed beside it.
constexpr int64_t kKeyChunk = 256, kSpan = 8;

// How keys and values are stored: a DType, an fp8 type, or int8 with a scale for each token and
// head.
enum class KvType : int8_t { f32, bf16, f16, e5m2, e4m3, i8 };

// The row of position p and head h begins at element
//   data + offset of the sequence + h * stride_head + (table ? table[p / block] * stride_block : 0)
//        + (absolute ? p : p % block) * stride_token
// and its scale (i8 only) at the same place of scale with the strides of scale.
struct KvSource {
  struct Strides {
    int64_t block, token, head;
  };
  const void* data;
  KvType type;
  Strides stride;
  const float* scale;
  Strides scale_stride;
};

// One sequence of a batch. Query i is at position kv_len - q_len + i.
struct AttentionSequence {
  int64_t query, out;                          // its first rows, in elements
  int64_t key, value, key_scale, value_scale;  // offsets into the sources
  int64_t q_len, kv_len;
  const int32_t* table;
  int64_t partial;      // where its partial results begin, in entries; -1: it has none
  int64_t first_chunk;  // that some row sees, and how many there are
  int64_t chunks;
};

// A piece of work for each KV head: rows [row, row + row_count) of each of seq_count sequences that
// share the keys of the chunks [chunk, chunk + chunk_count). Rows count queries times heads of a
// group. The sums of sequences with partial results stay apart by chunk, for attention_join.
struct AttentionUnit {
  int64_t seq, seq_count, row, row_count, chunk, chunk_count;
};
constexpr int64_t kAttentionRows = 512;  // of a unit, all sequences together

// Added to the scores, or a choice among them. Elements of a row are step apart, 0 or 1.
struct AttentionMask {
  enum class Type : int8_t { none, boolean, f32, bf16, f16 };
  const void* data;
  Type type;
  int64_t stride_seq, stride_head, stride_query, step;
};

// Head h of a query is h / q_group groups and h % q_group heads from its first.
struct AttentionArgs {
  const void* query;
  void* out;
  DType dtype;  // of both
  int64_t q_stride_s, q_stride_group, q_stride_h, out_stride_s, out_stride_h;
  int64_t q_group;
  KvSource key, value;
  int64_t block;
  bool absolute;
  int64_t heads, kv_heads, dim, value_dim;
  float scale, value_scale, softcap;  // softcap 0: none
  int64_t window_left, window_right;  // how far a query sees
  const float *alibi, *sinks;         // null: none; alibi_stride: from sequence to sequence
  int64_t alibi_stride;
  AttentionMask mask;
  const AttentionSequence* sequences;
  const AttentionUnit* units;
  float* partials;  // entries of attention_entry(value_dim) floats
  char* scratch;    // of the calling thread
};
// A partial result, of one chunk or the first ones of a span: the largest score, the sum, how many
// chunks, and (64 bytes further) the weighted values.
constexpr int64_t attention_entry(int64_t value_dim) {
  return 16 + (value_dim + kPanel - 1) / kPanel * kPanel;
}

// Tokens into a cache [block, head, token, dim]: slot = block * block_size + token; negative slots
// are skipped. To fp8: x / scale, saturated. To int8: the scale of each token and head is computed.
// stream: rows that are not converted go around the caches.
struct CacheArgs {
  struct Side {
    const void* from;
    int64_t from_stride_t, from_stride_h;
    void* to;
    KvSource::Strides stride;
    float* scale;
    KvSource::Strides scale_stride;
    int64_t dim;
    float inverse_scale;
  };
  Side key, value;
  DType from_type;
  KvType to_type;
  const int64_t* slots;
  int64_t block, heads;
  bool stream;
};

// The machine's own limits, which the benchmarks measure the other kernels by. x and y begin on a
// page of kPage floats, and are a whole number of pages.
constexpr int64_t kPage = 1024;
struct ReadArgs {
  const float* x;
};
struct CopyArgs {
  const float* x;
  float* y;
  bool stream;
};

enum class Unit : int8_t { fp32, bf16, int8 };

// operations[i]: how many multiplications and additions thread i did.
struct PeakArgs {
  Unit unit;
  int64_t rounds;
  int64_t* operations;
};

//                          name   arguments   begin and end count
#define LMFUSE_KERNELS(K)                                                \
  K(norm, NormArgs)                /* rows */                            \
  K(gated, GatedArgs)              /* rows */                            \
  K(add_scaled, AddScaledArgs)     /* rows */                            \
  K(softmax, SoftmaxArgs)          /* rows */                            \
  K(mix, MixArgs)                  /* rows */                            \
  K(argmax, ArgmaxArgs)            /* rows */                            \
  K(above, AboveArgs)              /* elements */                        \
  K(rope, RopeArgs)                /* tokens, that is b * seq_len + s */ \
  K(pack, PackArgs)                /* panels */                          \
  K(unpack, PackArgs)              /* panels */                          \
  K(unpack_rows, UnpackRowsArgs)   /* rows */                            \
  K(gemm_rows, GemmRowsArgs)       /* rows */                            \
  K(gemm, GemmArgs)                /* panels of row blocks */            \
  K(woq_pack, WoqPackArgs)         /* panels */                          \
  K(woq_unpack, WoqPackArgs)       /* panels */                          \
  K(woq_values, WoqValuesArgs)     /* rows */                            \
  K(woq_rows, WoqRowsArgs)         /* rows */                            \
  K(woq, WoqArgs)                  /* panels of row blocks */            \
  K(attention, AttentionArgs)      /* units * kv_heads + head */         \
  K(attention_join, AttentionArgs) /* sequences * kv_heads + head */     \
  K(cache_write, CacheArgs)        /* tokens */                          \
  K(limit_read, ReadArgs)          /* pages */                           \
  K(limit_copy, CopyArgs)          /* pages */                           \
  K(limit_peak, PeakArgs)          /* threads */

struct Kernels {
  GemmFormat (*gemm_format)(DType weight, int64_t m);
  WoqPlan (*woq_plan)(const WoqFormat&, WoqCompute, bool block_scales, int64_t m, int64_t weights);
  int64_t (*attention_scratch)(const AttentionArgs&);  // bytes for each thread
#define LMFUSE_MEMBER(name, Args) void (*name)(const Args&, int64_t begin, int64_t end);
  LMFUSE_KERNELS(LMFUSE_MEMBER)
#undef LMFUSE_MEMBER
};

// One table per instruction set, each in its own namespace.
#define LMFUSE_ISAS(I) I(generic) I(avx2) I(avx512) I(avx512_bf16) I(amx)

#define LMFUSE_DECLARE(isa)     \
  namespace isa {               \
  extern const Kernels kernels; \
  }
LMFUSE_ISAS(LMFUSE_DECLARE)
#undef LMFUSE_DECLARE

// The active table, and which levels this CPU can run; see isa.cpp.
const Kernels& kernels();
int isa_count();
const char* isa_name(int level);
bool isa_available(int level);
int isa_active();
bool isa_use(int level);

}  // namespace lmfuse
