// What outlives a call, looked up by number: the stable ABI passes no objects.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "common.h"

namespace lmfuse {

// T has current(), whether the tensors that it was read from lie where they did, and again(), a T
// that is read anew.
template <class T>
class Kept {
 public:
  static int64_t keep(std::shared_ptr<const T> made) {
    const std::lock_guard<std::mutex> lock(mutex());
    static int64_t last = 0;
    all()[++last] = std::move(made);
    return last;
  }

  static void forget(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex());
    all().erase(number);
  }

  static std::shared_ptr<const T> find(int64_t number, const char* name) {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto found = all().find(number);
    LMFUSE_CHECK_VALUE(found != all().end(), "there is no ", name, " ", number);
    if (!found->second->current()) found->second = found->second->again();
    return found->second;
  }

 private:
  // Never destroyed: torch may be gone by then.
  static std::unordered_map<int64_t, std::shared_ptr<const T>>& all() {
    static auto* const kept = new std::unordered_map<int64_t, std::shared_ptr<const T>>();
    return *kept;
  }
  static std::mutex& mutex() {
    static auto* const mutex = new std::mutex();
    return *mutex;
  }
};

// Tensors, and where their memory was.
class KeptTensors {
 public:
  explicit KeptTensors(std::vector<Tensor> tensors) : all(std::move(tensors)) {
    for (const Tensor& t : all) memory_.push_back(t.const_data_ptr());
  }
  bool current() const {
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i].const_data_ptr() != memory_[i]) return false;
    return true;
  }

  std::vector<Tensor> all;

 private:
  std::vector<const void*> memory_;
};

}  // namespace lmfuse
