// Work in many short steps, in one parallel region: the workers run the same code side by side and
// wait for one another between steps. A step costs 0.1 to 0.3 us, a region of its own 0.5 to 2.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "common.h"

namespace lmfuse {

// Spins for some 20 us, then lets others run.
class Patience {
 public:
  void wait() {
    if (++spins_ > 1000) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  int spins_ = 0;
};

// The workers are those threads of the pool that came in time: nobody waits for one that never
// comes, whatever else the pool is busy with.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  struct Place {
    int64_t index, count;  // index < 0: came too late
  };

  // Called by each thread that the pool sent, with how many of the `threads` it stands for.
  Place enter(int64_t shares) {
    const uint64_t before = door_.fetch_add(kOne + static_cast<uint64_t>(shares));
    if (before & kClosed) return {-1, 0};
    const int64_t index = static_cast<int64_t>(before / kOne);
    if (index == 0) {
      count_.store(closed(), std::memory_order_release);
    } else {
      for (Patience p; !count_.load(std::memory_order_acquire);) p.wait();
    }
    return {index, count_.load(std::memory_order_relaxed)};
  }

  void sync() {
    const int64_t count = count_.load(std::memory_order_relaxed);
    if (count == 1) return;
    const uint32_t step = step_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      step_.store(step + 1, std::memory_order_release);
    } else {
      for (Patience p; step_.load(std::memory_order_acquire) == step;) p.wait();
    }
  }

 private:
  static constexpr uint64_t kOne = uint64_t{1} << 32, kClosed = uint64_t{1} << 63;

  // Waits for all, but not longer than it takes to wake them, and says how many came.
  int64_t closed() {
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
    for (Patience p; static_cast<int64_t>(door_.load() % kOne) < threads_ &&
                     std::chrono::steady_clock::now() < until;)
      p.wait();
    return static_cast<int64_t>(door_.fetch_or(kClosed) / kOne);
  }

  const int64_t threads_;
  alignas(64) std::atomic<uint64_t> door_{0};
  std::atomic<int64_t> count_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> step_{0};
};

// One of `count` that do the same work.
class Worker {
 public:
  Worker(Team& team, Team::Place place) : index(place.index), count(place.count), team_(team) {}

  const int64_t index, count;

  void sync() { team_.sync(); }
  // Its part of n pieces of work.
  std::pair<int64_t, int64_t> share(int64_t n) const {
    return {n * index / count, n * (index + 1) / count};
  }

 private:
  Team& team_;
};

// f(Worker&) by up to so many of torch's threads.
template <class F>
void together(int64_t threads, const F& f) {
  Team team(threads);
  const auto join = [&](int64_t begin, int64_t end) {
    const Team::Place place = team.enter(end - begin);
    if (place.index < 0) return;
    Worker worker(team, place);
    f(worker);
  };
  if (threads == 1) {
    join(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, join);
  }
}

inline int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

}  // namespace lmfuse
