// The table of one instruction set. Compiled once per level, like every kernel.
#include "kernels.h"

namespace lmfuse::LMFUSE_ISA {

#define LMFUSE_FUNCTION(name, Args) void name(const Args&, int64_t begin, int64_t end);
LMFUSE_KERNELS(LMFUSE_FUNCTION)
#undef LMFUSE_FUNCTION
GemmFormat gemm_format(DType weight, int64_t m);
WoqPlan woq_plan(const WoqFormat&, WoqCompute, bool block_scales, int64_t m, int64_t weights);
int64_t attention_scratch(const AttentionArgs&);

#define LMFUSE_ENTRY(name, Args) &name,
const Kernels kernels = {&gemm_format, &woq_plan, &attention_scratch, LMFUSE_KERNELS(LMFUSE_ENTRY)};
#undef LMFUSE_ENTRY

}  // namespace lmfuse::LMFUSE_ISA
