// The products of attention_few.h on AMX, for at most 16 rows: the keys are the rows of a tile as
// they lie in memory and the queries its other operand; the values are zipped, a block at a time,
// in the first-level cache. The sums are those of AmxTile, bit for bit: only the operands of
// commutative products change places.
#pragma once

#include "attention_few.h"

#if defined(LMFUSE_TILES)

namespace lmfuse::LMFUSE_ISA {
namespace {

// The keys of a chunk, its values, and the first of the next keys, fetched strictly one row after
// the other, kDistance ahead of what is read. A core has room for sixteen lines on their way, 200
// cycles of reading: what computes longer than that asks for some rows in between. So do the
// weights, for which the keys leave an eighth.
class FetchAhead {
 public:
  FetchAhead(FewPart keys, FewPart values, const ChunkRows& next_keys)
      : parts_{keys.over(*keys.rows), values.over(*values.rows), keys.over(next_keys)},
        heads_(keys.heads) {
    const int64_t lead = (heads_ > 1 ? kPanel : 0) + kDistance / keys.run() +
                         kOfWeights;  // fetched with the chunk before
    const int64_t count = keys.rows->count;
    row_ = keys.rows->row + (lead < count ? lead : count);
    end_ = keys.rows->row + count;
  }

  // While the weights of one row of count, all heads together, are computed.
  void of_weights(int64_t count) { step(kOfWeights * kOne * heads_ / count); }
  // Once `rows` rows of a head, in units of 1 / kOne, are read.
  static constexpr int64_t kOne = 64, kOfKeys = kOne * 7 / 8;
  static constexpr int64_t kOfWeights = kKeyChunk / 8;  // rows
  LMFUSE_INLINE void step(int64_t rows) {
    for (credit_ += rows; credit_ >= kOne * heads_; credit_ -= kOne * heads_) {
      while (row_ == end_) {
        if (part_ == 2) return;
        const ChunkRows& next = *parts_[++part_].rows;
        row_ = next.row;
        end_ = row_ + next.count;
      }
      const FewPart& part = parts_[part_];
      for (int64_t h = 0; h < part.heads; ++h)
        for (int64_t i = 0; i < part.bytes; i += 64)
          __builtin_prefetch(*row_ + h * part.head_step + i, 0, 2);
      ++row_;
    }
  }

 private:
  static constexpr int64_t kDistance = 8192;
  FewPart parts_[3];
  int64_t heads_, part_ = 0, credit_ = 0;
  const char *const *row_, *const *end_;
};

// 16 rows of a tile: where the first is, how far apart they are, in bytes, and how many of them
// come straight from the cache.
struct TileSource {
  const bf16_t* first;
  int64_t stride, unread;
};

// The keys [first, first + 16), from their place if that is regular, else by way of stage, which
// beyond their number holds what it held: scores of no key, to be hidden.
inline TileSource key_rows(KvType type, const FewPart& keys, int64_t first, int64_t head,
                           int64_t width, bf16_t* stage, FetchAhead& ahead) {
  const char* const* row = keys.rows->row + first;
  const int64_t offset = head * keys.head_step, dim = keys.bytes / kv_bytes(type);
  const int64_t left = keys.rows->count - first, count = left < kTileRows ? left : kTileRows;
  if (as_it_lies<bf16_t>(type, dim, width) && count == kTileRows) {
    const int64_t stride = row[1] - row[0];
    bool regular = true;
    for (int64_t r = 2; r < kTileRows; ++r) regular &= row[r] - row[r - 1] == stride;
    if (regular) return {reinterpret_cast<const bf16_t*>(row[0] + offset), stride, kTileRows};
  }
  for (int64_t r = 0; r < count; ++r) {
    widen_row(type, row[r] + offset, dim, width, stage + r * width);
    ahead.step(FetchAhead::kOfKeys);
  }
  return {stage, width * static_cast<int64_t>(sizeof(bf16_t)), 0};
}

// acc[32 keys][16 queries] to rows of scores, times the scales of the keys: to[rows][kPanel].
inline void turn_scores(const float* acc, int64_t rows, const float* scale, float* to) {
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes)
    for (int64_t k = 0; k < kPanel; k += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) v[i] = load(acc + (k + i) * kTileRows + r0);
      transpose(v);
      for (int64_t i = 0; i < kLanes && r0 + i < rows; ++i)
        store(to + (r0 + i) * kPanel + k, scale ? v[i] * load(scale + k) : v[i]);
    }
}

// Two rows of values, zipped: to[panel][kZipKeys / 2][kPanel][2].
constexpr int64_t kZipKeys = 64;
template <class T>
LMFUSE_INLINE void zip_rows(const T* a, const T* b, int64_t width, bf16_t* to) {
  for (int64_t d = 0; d < width; d += 2 * kLanes)
    zip(a + d, b + d, to + d / kPanel * kZipKeys * kPanel + 2 * (d % kPanel));
}

// Values [first, first + keys) of one head; stage: two rows of width elements.
inline void zip_values(KvType type, const FewPart& values, int64_t first, int64_t head,
                       int64_t keys, int64_t width, bf16_t* stage, bf16_t* to, FetchAhead& ahead) {
  const int64_t offset = head * values.head_step, dim = values.bytes / kv_bytes(type);
  for (int64_t k = 0; k < keys; k += 2, to += 2 * kPanel) {
    const int64_t left = values.rows->count - first - k;
    const char* row[2] = {};
    for (int64_t j = 0; j < 2 && j < left; ++j) row[j] = values.rows->row[first + k + j] + offset;
    ahead.step(2 * FetchAhead::kOne);
    if (dim == width && left > 1 && (type == KvType::bf16 || type == KvType::i8)) {
      if (type == KvType::bf16) {
        zip_rows(reinterpret_cast<const bf16_t*>(row[0]), reinterpret_cast<const bf16_t*>(row[1]),
                 width, to);
      } else {
        zip_rows(reinterpret_cast<const i8_t*>(row[0]), reinterpret_cast<const i8_t*>(row[1]),
                 width, to);
      }
      continue;
    }
    for (int64_t j = 0; j < 2; ++j)
      if (j < left) {
        widen_row(type, row[j], dim, width, stage + j * width);
      } else {
        for (int64_t i = 0; i < width; ++i) stage[j * width + i] = bf16_t{};
      }
    zip_rows(stage, stage + width, width, to);
  }
}

template <>
struct FewRows<AmxTile> {
  using Ahead = FetchAhead;
  static constexpr int64_t kRows = kTileRows;
  static_assert(kRows == kFewRows);

  static void scores(KvType type, const FewPart& keys, int64_t width, const bf16_t* queries,
                     int64_t count, bf16_t* stage, bf16_t*, float* scores, FetchAhead& ahead) {
    Tiles tiles;
    for (int64_t first = 0; first < keys.rows->count; first += kPanel)
      for (int64_t h = 0; h < keys.heads; ++h) {
        const float* scale = keys.rows->scales(h);
        score(tiles, type, keys, first, h, width, queries + h * kRows * width, count, stage,
              scale ? scale + first : nullptr, scores + kRows * (h * kKeyChunk + first), ahead);
      }
  }

  static void values(KvType type, const FewPart& values, int64_t width, const bf16_t* weights,
                     int64_t weights_row, int64_t count, bf16_t* stage, bf16_t* zipped,
                     float* products, FetchAhead& ahead) {
    Tiles tiles(static_cast<int>(count));
    for (int64_t first = 0; first < values.rows->count; first += kZipKeys)
      for (int64_t h = 0; h < values.heads; ++h) {
        const int64_t keys = smaller(round_up(values.rows->count - first, kDotStep), kZipKeys);
        zip_values(type, values, first, h, keys, width, stage, zipped, ahead);
        weigh(tiles, zipped, keys, width, weights + h * count * weights_row + first, weights_row,
              count, first > 0, products + h * width * count);
      }
  }

 private:
  static void score(Tiles& tiles, KvType type, const FewPart& keys, int64_t first, int64_t head,
                    int64_t width, const bf16_t* queries, int64_t count, bf16_t* stage,
                    const float* scale, float* to, FetchAhead& ahead) {
    constexpr int64_t kRow = kTileRows * sizeof(float);
    alignas(64) float acc[kPanel * kTileRows];
    const TileSource low = key_rows(type, keys, first, head, width, stage, ahead);
    const TileSource high =
        key_rows(type, keys, first + kTileRows, head, width, stage + kTileRows * width, ahead);
    const int64_t step = (low.unread + high.unread) * FetchAhead::kOfKeys * kDotStep / width;
    tiles.zero<0>();
    tiles.zero<1>();
    for (int64_t i = 0; i < width; i += kDotStep) {
      tiles.load<6>(queries + i * kTileRows, kRow);
      tiles.load<4>(low.first + i, low.stride);
      tiles.dot_bf16<0, 4, 6>();
      tiles.load<5>(high.first + i, high.stride);
      tiles.dot_bf16<1, 5, 6>();
      ahead.step(step);
    }
    tiles.store<0>(acc, kRow);
    tiles.store<1>(acc + kTileRows * kTileRows, kRow);
    turn_scores(acc, count, scale, to);
  }

  // products[panel][count][kPanel] of the zipped values of one head.
  static void weigh(Tiles& tiles, const bf16_t* zipped, int64_t keys, int64_t width,
                    const bf16_t* weights, int64_t weights_row, int64_t count, bool resume,
                    float* products) {
    constexpr int64_t kRow = kPanel * sizeof(float);
    for (int64_t p = 0; p < width / kPanel; ++p) {
      float* to = products + p * count * kPanel;
      if (resume) {
        tiles.load<0>(to, kRow);
        tiles.load<1>(to + kPanel / 2, kRow);
      } else {
        tiles.zero<0>();
        tiles.zero<1>();
      }
      for (int64_t k = 0; k < keys; k += kDotStep) {
        const bf16_t* b = zipped + (p * kZipKeys + k) * kPanel;
        tiles.load<4>(weights + k, weights_row * static_cast<int64_t>(sizeof(bf16_t)));
        tiles.load<6>(b, kRow);
        tiles.dot_bf16<0, 4, 6>();
        tiles.load<7>(b + kPanel, kRow);
        tiles.dot_bf16<1, 4, 7>();
      }
      tiles.store<0>(to, kRow);
      tiles.store<1>(to + kPanel / 2, kRow);
    }
  }
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA

#endif
