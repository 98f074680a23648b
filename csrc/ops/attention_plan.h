// From sequences to pieces of work: which chunks of keys each sees, which sequences share them, and
// how the work is spread over threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace lmfuse {

// Everything but the tensors' own addresses and strides, which the ops fill in.
struct AttentionPlan {
  std::vector<AttentionSequence> sequences;
  std::vector<AttentionUnit> units;
  int64_t entries = 0;  // of partial results
};

namespace plan {

// Sequences with so few rows are spread over threads in pieces of chunks, if their partial results
// fit.
constexpr int64_t kFewRows = 64;
constexpr int64_t kMostPartialBytes = int64_t{32} << 20;

inline void see(const AttentionArgs& a, AttentionSequence& s) {
  const int64_t first = s.kv_len - s.q_len;
  const int64_t begin = std::max<int64_t>(0, first - a.window_left);
  const int64_t end = std::min(s.kv_len, s.kv_len + a.window_right);
  s.first_chunk = begin / kKeyChunk;
  s.chunks = end > begin && s.q_len > 0 ? (end + kKeyChunk - 1) / kKeyChunk - s.first_chunk : 0;
  s.partial = -1;
}

// True if all positions of chunk c that either sequence has lie at the same place.
inline bool same_keys(const AttentionArgs& a, const AttentionSequence& s,
                      const AttentionSequence& t, int64_t c) {
  if (s.key != t.key || s.value != t.value || s.key_scale != t.key_scale ||
      s.value_scale != t.value_scale)
    return false;
  if (s.table == t.table) return true;
  const auto last_block = [&](const AttentionSequence& x) {
    return (std::min(x.kv_len, (c + 1) * kKeyChunk) - 1) / a.block;
  };
  const int64_t first = c * kKeyChunk / a.block, last = last_block(s);
  return last == last_block(t) && std::equal(s.table + first, s.table + last + 1, t.table + first);
}

// Sequences [begin, end) with equal numbers of rows: together where keys are shared, for as many
// chunks as they are.
inline void by_keys(const AttentionArgs& a, AttentionPlan& p, int64_t begin, int64_t end,
                    int64_t rows) {
  int64_t first = p.sequences[begin].first_chunk, last = 0;
  for (int64_t b = begin; b < end; ++b) {
    first = std::min(first, p.sequences[b].first_chunk);
    last = std::max(last, p.sequences[b].first_chunk + p.sequences[b].chunks);
  }
  std::vector<size_t> unit_of(end - begin, p.units.size());
  for (int64_t c = first; c < last; ++c) {
    const auto sees = [&](int64_t b) {
      const AttentionSequence& s = p.sequences[b];
      return s.first_chunk <= c && c < s.first_chunk + s.chunks;
    };
    for (int64_t b = begin; b < end;) {
      int64_t n = 1;
      if (sees(b)) {
        while (b + n < end && (n + 1) * rows <= kAttentionRows && sees(b + n) &&
               same_keys(a, p.sequences[b], p.sequences[b + n], c))
          ++n;
        size_t& at = unit_of[b - begin];
        if (at < p.units.size() && p.units[at].seq == b && p.units[at].seq_count == n &&
            p.units[at].chunk + p.units[at].chunk_count == c) {
          ++p.units[at].chunk_count;
        } else {
          at = p.units.size();
          p.units.push_back({b, n, 0, rows, c, 1});
        }
      }
      b += n;
    }
  }
}

// A sequence of many rows: in blocks of rows, long and short ones in turn under a causal mask.
inline void by_rows(AttentionPlan& p, int64_t b, int64_t rows) {
  const AttentionSequence& s = p.sequences[b];
  const int64_t blocks = (rows + kAttentionRows - 1) / kAttentionRows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t row = (i % 2 ? blocks - 1 - i / 2 : i / 2) * kAttentionRows;
    p.units.push_back({b, 1, row, std::min(kAttentionRows, rows - row), s.first_chunk, s.chunks});
  }
}

}  // namespace plan

// What a unit costs for each KV head, in products of a row and a key: reading and packing a key is
// worth about 64 of them.
inline int64_t cost(const AttentionArgs& a, const AttentionSequence& s, const AttentionUnit& u) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t middle = s.kv_len - s.q_len + (u.row + u.row_count / 2) / group;
  const int64_t begin = std::max(u.chunk * kKeyChunk, middle - a.window_left);
  const int64_t end = std::min({(u.chunk + u.chunk_count) * kKeyChunk, s.kv_len,
                                middle + std::min(a.window_right, s.kv_len) + 1});
  return std::max<int64_t>(end - begin, 1) * (u.seq_count * u.row_count + 64);
}

// Cuts the units of sequences that may have partial results into pieces of some chunks, so that the
// threads can be given about the same: kPieces or more for each. Those left whole need no join.
//
// In a cache where a position of all sequences lies beside the next one, pieces are short, and the
// sequences take turns: each one to its end would walk over all pages of the cache again (8
// sequences of 32k, D = 64, Zen 4 at 34 GB/s: 75 for 70 ns/KB; of 4k the same).
inline void cut_units(const AttentionArgs& a, AttentionPlan& p, int64_t threads) {
  constexpr int64_t kPieces = 8, kTurn = 2 * kSpan;
  int64_t total = 0;
  for (const AttentionUnit& u : p.units) total += cost(a, p.sequences[u.seq], u);
  const int64_t most = std::max<int64_t>(1, total * a.kv_heads / (threads * kPieces));
  std::vector<AttentionUnit> pieces;
  std::vector<int64_t> of_sequence(p.sequences.size(), 0);
  for (AttentionUnit u : p.units) {
    if (p.sequences[u.seq].partial < 0) {
      pieces.push_back(u);
      continue;
    }
    int64_t n = (cost(a, p.sequences[u.seq], u) + most - 1) / most;
    while (n * a.kv_heads % threads) ++n;
    const int64_t even = (u.chunk_count + n - 1) / n;
    const int64_t size = a.absolute ? std::min(even, kTurn) : even;
    for (int64_t end = u.chunk + u.chunk_count; u.chunk < end; u.chunk += u.chunk_count) {
      u.chunk_count = std::min(size, end - u.chunk);
      pieces.push_back(u);
      for (int64_t b = u.seq; b < u.seq + u.seq_count; ++b) of_sequence[b] += u.seq_count;
    }
  }
  if (a.absolute)
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const auto& x, const auto& y) { return x.chunk < y.chunk; });
  p.units = std::move(pieces);
  bool joins = false;
  for (size_t b = 0; b < p.sequences.size(); ++b) {
    if (of_sequence[b] <= 1) p.sequences[b].partial = -1;  // one piece, and alone in it
    joins |= p.sequences[b].partial >= 0;
  }
  if (!joins) p.entries = 0;
}

// Completes the sequences and makes the units.
inline void make_units(const AttentionArgs& a, AttentionPlan& p, int64_t threads) {
  using namespace plan;
  const int64_t group = a.heads / a.kv_heads, count = static_cast<int64_t>(p.sequences.size());
  const int64_t entry_bytes = attention_entry(a.value_dim) * 4;
  for (AttentionSequence& s : p.sequences) {
    see(a, s);
    const int64_t entries = s.q_len * group * a.kv_heads * s.chunks;
    if (s.chunks > 1 && s.q_len * group <= kFewRows &&
        (p.entries + entries) * entry_bytes <= kMostPartialBytes) {
      s.partial = p.entries;
      p.entries += entries;
    }
  }
  for (int64_t b = 0; b < count;) {
    const int64_t rows = p.sequences[b].q_len * group;
    int64_t end = b + 1;
    if (p.sequences[b].partial < 0) {
      by_rows(p, b, rows);
    } else {
      while (end < count && p.sequences[end].partial >= 0 && p.sequences[end].q_len * group == rows)
        ++end;
      by_keys(a, p, b, end, rows);
    }
    b = end;
  }
  cut_units(a, p, threads);
}

// Cuts the pieces of work, units * kv_heads + head, into contiguous ranges of about equal cost.
class AttentionShares {
 public:
  AttentionShares(const AttentionArgs& a, const AttentionPlan& p)
      : kv_heads_(a.kv_heads), until_(p.units.size()) {
    int64_t total = 0;
    for (size_t u = 0; u < until_.size(); ++u)
      until_[u] = total += cost(a, p.sequences[p.units[u].seq], p.units[u]);
  }
  int64_t total() const { return until_.empty() ? 0 : until_.back(); }

  // Where range t of `slices` begins; range `slices` begins at the end.
  int64_t begin(int64_t t, int64_t slices) const {
    if (t == slices) return static_cast<int64_t>(until_.size()) * kv_heads_;
    const int64_t share = total() * t / slices;
    const int64_t u = std::upper_bound(until_.begin(), until_.end(), share) - until_.begin();
    const int64_t before = u ? until_[u - 1] : 0;
    return u * kv_heads_ + (share - before) * kv_heads_ / (until_[u] - before);
  }

 private:
  int64_t kv_heads_;
  std::vector<int64_t> until_;  // costs up to and including each unit
};

// Runs the units and joins what they left, on torch's threads, each with one contiguous range of
// about equal cost.
inline void run(AttentionArgs a, AttentionPlan& p) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  make_units(a, p, threads);
  a.sequences = p.sequences.data();
  a.units = p.units.data();
  const int64_t items = static_cast<int64_t>(p.units.size()) * a.kv_heads;
  if (items == 0) return;
  const AttentionShares shares(a, p);

  constexpr int64_t kAlone = 1 << 19;  // multiplications below which a second thread is no help
  if (shares.total() * a.kv_heads * (a.dim + a.value_dim) < kAlone) threads = 1;
  const int64_t slices = std::min<int64_t>(threads, items);

  const auto bytes_tensor = [&](int64_t size) {
    return torch::stable::empty({&size, 1}, ScalarType::Byte);
  };
  const int64_t each = kernels().attention_scratch(a) + 64;
  Tensor scratch = bytes_tensor(each * slices + 64);
  Tensor partials = bytes_tensor(p.entries * attention_entry(a.value_dim) * 4 + 64);
  const auto aligned = [](Tensor& t) {
    const auto at = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    return reinterpret_cast<char*>((at + 63) & ~uintptr_t{63});
  };
  char* first = aligned(scratch);
  a.partials = reinterpret_cast<float*>(aligned(partials));
  const auto over_slices = [&](const auto& f) {
    if (slices == 1) return f(0, 1);
    torch::stable::parallel_for(0, slices, 1, f);
  };
  const Kernels& k = kernels();
  over_slices([&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      AttentionArgs mine = a;
      mine.scratch = first + t * (each / 64 * 64);
      k.attention(mine, shares.begin(t, slices), shares.begin(t + 1, slices));
    }
  });
  if (!p.entries) return;
  const int64_t joins = static_cast<int64_t>(p.sequences.size()) * a.kv_heads;
  over_slices([&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      AttentionArgs mine = a;
      mine.scratch = first + t * (each / 64 * 64);
      k.attention_join(mine, joins * t / slices, joins * (t + 1) / slices);
    }
  });
}

}  // namespace lmfuse
