// Memory that is read again and again, in pages of 2 MB: with those of 4 KB, a virtual machine
// spends up to a third of its read bandwidth on translating addresses.
#pragma once

#include <mutex>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lmfuse {

constexpr int64_t kLargePage = int64_t{2} << 20;

inline Tensor new_bytes(int64_t size) { return torch::stable::empty({&size, 1}, ScalarType::Byte); }

// Before the memory is first written. Only whole large pages can be had.
inline void use_large_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (data + kLargePage - 1) & ~static_cast<uintptr_t>(kLargePage - 1);
  const uintptr_t end = (data + t.numel()) & ~static_cast<uintptr_t>(kLargePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// size bytes from the first large page on.
inline Tensor new_large_pages(int64_t size) {
  Tensor all = new_bytes(size + kLargePage);
  use_large_pages(all);
  const uintptr_t past = reinterpret_cast<uintptr_t>(all.mutable_data_ptr()) % kLargePage;
  return torch::stable::narrow(all, 0, past ? kLargePage - static_cast<int64_t>(past) : 0, size);
}

// Bytes that live as long as a model. Weights of less than half a block share one with their
// neighbours, so that no large page is left half empty; a block goes when the last of them does.
inline Tensor new_weight_bytes(int64_t size) {
  constexpr int64_t kBlock = 32 * kLargePage, kAlign = 64;
  if (size > kBlock / 2) return new_large_pages(size);
  static std::mutex mutex;
  static Tensor* const block = new Tensor();  // never destroyed: torch may be gone by then
  static int64_t used = kBlock;
  const std::lock_guard<std::mutex> lock(mutex);
  if (used + size > kBlock) {
    *block = new_large_pages(kBlock);
    used = 0;
  }
  const int64_t at = used;
  used += (size + kAlign - 1) / kAlign * kAlign;
  return torch::stable::narrow(*block, 0, at, size);
}

}  // namespace lmfuse
