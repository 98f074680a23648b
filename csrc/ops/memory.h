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

// Large pages that small tensors share, so that none is left half empty: less than half a block
// lies in one with its neighbours, more alone. A block goes when the last of its tensors does.
class LargePageBlocks {
 public:
  explicit LargePageBlocks(int64_t pages) : size_(pages * kLargePage), used_(size_) {}

  bool shares(int64_t size) const { return size <= size_ / 2; }

  Tensor take(int64_t size) {
    constexpr int64_t kAlign = 64;
    if (!shares(size)) return new_large_pages(size);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (used_ + size > size_) {
      block_ = new_large_pages(size_);
      used_ = 0;
    }
    const int64_t at = used_;
    used_ += (size + kAlign - 1) / kAlign * kAlign;
    return torch::stable::narrow(block_, 0, at, size);
  }

 private:
  std::mutex mutex_;
  Tensor block_;
  int64_t size_, used_;
};

// Bytes that live as long as a model.
inline Tensor new_weight_bytes(int64_t size) {
  static auto* const blocks = new LargePageBlocks(32);  // never destroyed: torch may go first
  return blocks->take(size);
}

// Bytes that live as long as a cache, and grow with it: smaller blocks, which are sooner free.
// alone: in a storage of its own, as what an op returns must be; so small ones in small pages.
inline Tensor new_cache_bytes(int64_t size, bool alone) {
  static auto* const blocks = new LargePageBlocks(8);
  return alone && blocks->shares(size) ? new_bytes(size) : blocks->take(size);
}

}  // namespace lmfuse
