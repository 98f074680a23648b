// The levels of kernels/isa.cpp as ops, so that Python reaches them without a binding of its own.
#include "common.h"

namespace lmfuse {
namespace {

int64_t active() { return isa_active(); }
int64_t best() {
  int level = 0;
  while (isa_available(level + 1)) ++level;
  return level;
}
bool use(int64_t level) {
  return level >= 0 && level < isa_count() && isa_use(static_cast<int>(level));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmfuse, m) {
  m.def("isa_active() -> int");
  m.def("isa_best() -> int");
  m.def("isa_use(int level) -> bool");
}

// No tensor tells these which device they belong to.
STABLE_TORCH_LIBRARY_IMPL(lmfuse, CompositeExplicitAutograd, m) {
  m.impl("isa_active", TORCH_BOX(&active));
  m.impl("isa_best", TORCH_BOX(&best));
  m.impl("isa_use", TORCH_BOX(&use));
}

}  // namespace lmfuse
