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

enum class Activation : int8_t { silu, gelu_erf, gelu_tanh };

// y = activation(gate) * up, row by row.
struct GatedArgs {
  Matrix gate, up, y;
  int64_t n;
  Activation activation;
  bool stream;
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

//                          name   arguments   begin and end count
#define LMFUSE_KERNELS(K)                                                       \
  K(norm, NormArgs)   /* rows */                                                \
  K(gated, GatedArgs) /* rows */                                                \
  K(rope, RopeArgs)   /* tokens, that is b * seq_len + s */

struct Kernels {
#define LMFUSE_MEMBER(name, Args) void (*name)(const Args&, int64_t begin, int64_t end);
  LMFUSE_KERNELS(LMFUSE_MEMBER)
#undef LMFUSE_MEMBER
};

// One table per instruction set, each in its own namespace.
#define LMFUSE_ISAS(I) I(generic) I(avx2) I(avx512) I(avx512_bf16) I(amx)

#define LMFUSE_DECLARE(isa)      \
  namespace isa {                \
  extern const Kernels kernels;  \
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
