// Which instruction sets this CPU and its operating system can run, and which one is active.
// Compiled without any ISA flag: it runs before anything is known about the machine.
#include <atomic>
#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lmfuse {
namespace {

constexpr const char* kNames[] = {
#define LMFUSE_NAME(isa) #isa,
    LMFUSE_ISAS(LMFUSE_NAME)
#undef LMFUSE_NAME
};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#if defined(LMFUSE_X86)
constexpr const Kernels* kTables[] = {
#define LMFUSE_TABLE(isa) &isa::kernels,
    LMFUSE_ISAS(LMFUSE_TABLE)
#undef LMFUSE_TABLE
};
#else
constexpr const Kernels* kTables[kCount] = {&generic::kernels};
#endif

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bits(unsigned word, std::initializer_list<int> positions) {
  for (int p : positions)
    if (!(word >> p & 1)) return false;
  return true;
}

// The register state that the operating system saves; without it an instruction faults although
// CPUID lists it.
uint64_t xcr0() {
  if (!bits(cpuid(1, 0).c, {27})) return 0;  // OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux lends the 8 KB of tile state per process, on request.
bool request_tiles() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

// Exactly the bits behind the -m flags of each level in CMakeLists.txt.
int best_level() {
  const uint64_t state = xcr0();
  const Registers l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
  const bool avx2 = (state & 0x6) == 0x6 && bits(l1.c, {12, 28, 29}) &&  // FMA, AVX, F16C
                    bits(l7.b, {5});                                     // AVX2
  if (!avx2) return 0;
  const bool avx512 = (state & 0xe6) == 0xe6 && bits(l7.b, {16, 17, 30, 31});  // F, DQ, BW, VL
  if (!avx512) return 1;
  const bool bf16 = bits(l71.a, {5}) && bits(l7.c, {1, 11});  // AVX512_BF16, VBMI, VNNI
  if (!bf16) return 2;
#if defined(LMFUSE_SOFT_TILES)
  return 4;  // whose tiles are plain C++ in this build
#endif
  const bool amx = (state & 0x60000) == 0x60000 && bits(l7.d, {22, 24, 25}) &&  // BF16, TILE, INT8
                   request_tiles();
  return amx ? 4 : 3;
}

#else
int best_level() { return 0; }
#endif

const int kBest = best_level();
std::atomic<int> active{kBest};

}  // namespace

const Kernels& kernels() { return *kTables[active.load(std::memory_order_relaxed)]; }
int isa_count() { return kCount; }
const char* isa_name(int level) { return kNames[level]; }
bool isa_available(int level) { return level >= 0 && level <= kBest; }
int isa_active() { return active.load(std::memory_order_relaxed); }
bool isa_use(int level) {
  if (!isa_available(level)) return false;
  active.store(level, std::memory_order_relaxed);
  return true;
}

}  // namespace lmfuse
