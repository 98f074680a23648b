// What a call needs besides its results, in one allocation.
#pragma once

#include <optional>

#include "common.h"

namespace lmfuse {

// Pieces of one allocation, each on cache lines of its own; the first pass only counts.
class Buffers {
 public:
  template <class F>
  explicit Buffers(const F& carve) {
    carve(*this);
    Tensor all = torch::stable::empty({&used_, 1}, ScalarType::Byte);
    const uintptr_t past = reinterpret_cast<uintptr_t>(all.mutable_data_ptr()) % kLine;
    at_ = static_cast<char*>(all.mutable_data_ptr()) + (past ? kLine - past : 0);
    memory_ = all;
    used_ = kLine;
    carve(*this);
  }
  char* take(int64_t bytes) {
    char* mine = at_ ? at_ + used_ - kLine : nullptr;
    used_ += (bytes + kLine - 1) / kLine * kLine;
    return mine;
  }

 private:
  static constexpr int64_t kLine = 64;
  int64_t used_ = kLine;
  char* at_ = nullptr;
  std::optional<Tensor> memory_;
};

}  // namespace lmfuse
