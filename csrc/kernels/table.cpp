// The table of one instruction set. Compiled once per level, like every kernel.
#include "kernels.h"

namespace lmfuse::LMFUSE_ISA {

#define LMFUSE_FUNCTION(name, Args) void name(const Args&, int64_t begin, int64_t end);
LMFUSE_KERNELS(LMFUSE_FUNCTION)
#undef LMFUSE_FUNCTION

#define LMFUSE_ENTRY(name, Args) &name,
const Kernels kernels = {LMFUSE_KERNELS(LMFUSE_ENTRY)};
#undef LMFUSE_ENTRY

}  // namespace lmfuse::LMFUSE_ISA
