// What few rows of attention will read, fetched ahead of it.
#pragma once

#include "attention_pack.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// The keys or values of a chunk: the rows of the first of some heads, what one row is long, and
// how far the same row of the next head is, in bytes. Apart: the rows of a panel fall into the same
// sets of the first-level cache.
struct FewPart {
  const ChunkRows* rows;
  int64_t heads, bytes, head_step;
  bool apart;

  // Of a position, all heads.
  int64_t run() const { return heads * bytes; }
  // The same of other rows, to be fetched: heads beside each other at a position are one long row.
  FewPart over(const ChunkRows& those) const {
    if (head_step != bytes) return {&those, heads, bytes, head_step, apart};
    return {&those, 1, heads * bytes, heads * bytes, apart};
  }
};

// The keys of a chunk, its values, and the first of the next keys, fetched strictly one line after
// the other, kDistance ahead of what is read.
template <int64_t kDistance>
class LinesFrom {
 public:
  LinesFrom(FewPart keys, FewPart values, const ChunkRows& next_keys)
      : parts_{keys.over(*keys.rows), values.over(*values.rows), keys.over(next_keys)} {
    const int64_t lead = kPanel + kDistance / keys.run(), count = keys.rows->count;
    row_ = keys.rows->row + smaller(lead, count);
    last_ = keys.rows->row + count;
    run_ = parts_[0].bytes;
    apart_ = parts_[0].heads == 1 && parts_[1].heads == 1 && count > 1 &&
             keys.rows->row[1] != keys.rows->row[0] + run_;
  }

  template <int N>
  LMFUSE_INLINE void fetch() {
    if (at_ >= end_) {
      if (apart_ && row_ != last_) {
        at_ = *row_++;
        end_ = at_ + run_;
      } else {
        find_run();
      }
    }
    if (end_ - at_ < N * 64) return fetch(N);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) __builtin_prefetch(at_ + i * 64, 0, 2);
    at_ += N * 64;
  }
  __attribute__((noinline)) void fetch(int64_t lines) {
    while (lines > 0) {
      if (at_ >= end_ && !find_run()) return;
      const char* stop = at_ + smaller(lines * 64, (end_ - at_ + 63) / 64 * 64);
      lines -= (stop - at_) / 64;
      for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  // Rows that lie one after the other, and then the same ones of the next head.
  __attribute__((noinline)) bool find_run() {
    if (heads_left_ > 0) {
      --heads_left_;
      first_ += parts_[part_].head_step;
      at_ = first_;
      end_ = first_ + size_;
      return true;
    }
    while (row_ == last_) {
      at_ = end_ = nullptr;
      if (part_ == 2) return false;
      const ChunkRows& next = *parts_[++part_].rows;
      run_ = parts_[part_].bytes;
      row_ = next.row;
      last_ = row_ + next.count;
    }
    const FewPart& part = parts_[part_];
    constexpr int64_t kMany = 8;  // told by the last of them: row by row takes 4 ns/KB
    first_ = at_ = end_ = *row_;
    for (; last_ - row_ >= kMany && row_[kMany - 1] == end_ + (kMany - 1) * part.bytes;
         row_ += kMany)
      end_ += kMany * part.bytes;
    for (; row_ != last_ && *row_ == end_; ++row_) end_ += part.bytes;
    size_ = end_ - first_;
    heads_left_ = part.heads - 1;
    if (size_ == part.head_step) {  // a whole block
      end_ += heads_left_ * size_;
      heads_left_ = 0;
    }
    return true;
  }

  FewPart parts_[3];
  int64_t part_ = 0, size_ = 0, heads_left_ = 0;
  int64_t run_;  // of a position of this part
  bool apart_;  // rows, as behind indices: to look for runs of them takes 3 to 6 ns/KB of 1 KB each
  const char *const *row_, *const *last_;
  const char *first_ = nullptr, *at_ = nullptr, *end_ = nullptr;
};

// Fetches into the second-level cache, further ahead while weights are computed: columns of rows
// are read, and line buffers of the first full of what comes from memory would hold them up (Zen 4:
// 52 % of the bandwidth so, 87 % into the second). kTwice: again shortly before, for a Zen 4 drops
// what it has no room for, most where little is computed (84 % of the bandwidth, 90 % with it).
template <bool kTwice>
class LinesAhead {
 public:
  LinesAhead(FewPart keys, FewPart values, const ChunkRows& next_keys)
      : first_(keys, values, next_keys),
        again_(keys, values, next_keys),
        of_weights_(kPanel * values.run() / 64) {}

  template <int N>
  LMFUSE_INLINE void fetch() {
    first_.template fetch<N>();
    if constexpr (kTwice) again_.template fetch<N>();
  }
  void fetch(int64_t lines) {
    first_.fetch(lines);
    if constexpr (kTwice) again_.fetch(lines);
  }
  // While the weights of one row of count, all heads together, are computed. Values follow at once,
  // so the last panel of them fetches nothing.
  void of_weights(int64_t count) { fetch(of_weights_ / count); }

 private:
  LinesFrom<16384> first_;
  LinesFrom<4096> again_;
  int64_t of_weights_;
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
