// Where logits are largest: the next token of a greedy search, and those of beams.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr uint32_t kEvery = (1u << kLanes) - 1;  // bits of a mask

template <class T>
int64_t largest(const T* x, int64_t n) {
  const float infinity = __builtin_inff();
  const Vec above = broadcast(infinity), below = broadcast(-infinity);
  const int64_t whole = n / kLanes * kLanes;
  // The last vector reads beyond the others only what is there; its other lanes change nothing.
  float rest[kLanes];
  for (float& y : rest) y = -infinity;
  map(rest, n - whole, [&](int64_t i, auto l) { return load(x + whole + i, l); });
  const auto each = [&](int64_t i) { return i < whole ? load(x + i) : load(rest); };
  Vec top = below;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = each(i);
    const uint32_t numbers = bits(v < above) | bits(below < v);
    if (numbers != kEvery) return i + __builtin_ctz(~numbers);
    top = max(v, top);
  }
  top = broadcast(max(top));
  for (int64_t i = 0; i < n; i += kLanes) {
    const uint32_t less = bits(each(i) < top);
    if (less != kEvery) return i + __builtin_ctz(~less);
  }
  return 0;  // not reached
}

}  // namespace

void argmax(const ArgmaxArgs& a, int64_t begin, int64_t end) {
  with_type(a.x.dtype, [&](auto t) {
    for (int64_t r = begin; r < end; ++r) a.y[r] = largest(row<decltype(t)>(a.x, r), a.n);
  });
}

void above(const AboveArgs& a, int64_t begin, int64_t end) {
  const Vec add = broadcast(a.add), than = broadcast(a.than);
  const Vec infinity = broadcast(__builtin_inff());
  const auto found = [&](int64_t i, auto l) LMFUSE_LAMBDA {
    const Vec v = load(a.x + i, l) + add;
    return bits(than < v) | (kEvery & ~(bits(v < infinity) | bits(broadcast(0.0f) < v)));
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    if (const uint32_t at = found(i, Lanes::all())) {
      *a.y = i + __builtin_ctz(at);
      return;
    }
  const uint32_t rest = i < end ? found(i, Lanes::first(end - i)) & ((1u << (end - i)) - 1) : 0;
  *a.y = rest ? i + __builtin_ctz(rest) : end;
}

}  // namespace lmfuse::LMFUSE_ISA
