// Gated activations: y = activation(gate) * up.
#include "loops.h"
#include "math.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kAhead = 4096;  // bytes that a stream from memory needs in flight

// f(gate, up)
template <class T, class F>
void gated_rows(const GatedArgs& a, int64_t begin, int64_t end, F f) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = row<T>(a.gate, r);
    const T* up = row<T>(a.up, r);
    map(a.stream, row<T>(a.y, r), a.n, [&](int64_t i, auto l) {
      if (a.stream) prefetch(gate + i + kAhead / sizeof(T));
      if (a.stream) prefetch(up + i + kAhead / sizeof(T));
      return f(load(gate + i, l), load(up + i, l));
    });
  }
}

}  // namespace

void gated(const GatedArgs& a, int64_t begin, int64_t end) {
  with_type(a.y.dtype, [&](auto t) {
    using T = decltype(t);
    switch (a.activation) {
      case Activation::silu:
        return gated_rows<T>(a, begin, end, [](Vec g, Vec u) { return silu(g) * u; });
      case Activation::gelu_erf:
        return gated_rows<T>(a, begin, end, [](Vec g, Vec u) { return gelu_erf(g) * u; });
      case Activation::gelu_tanh:
        return gated_rows<T>(a, begin, end, [](Vec g, Vec u) { return gelu_tanh(g) * u; });
      case Activation::clamped_swiglu:
        return gated_rows<T>(a, begin, end, [&a](Vec g, Vec u) {
          const Vec limit = broadcast(a.limit);
          g = min(limit, g);  // NaN passes, being the second operand
          u = max(broadcast(-a.limit), min(limit, u));
          return times_sigmoid(g, g * broadcast(a.slope)) * (u + broadcast(1.0f));
        });
    }
  });
  if (a.stream) stream_end();
}

}  // namespace lmfuse::LMFUSE_ISA
