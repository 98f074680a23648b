// Tiles of AMX for quantized weights: few rows of bf16, whose weights are decoded meanwhile, and
// rows of int8, in int32, which is exact. Declared micro-kernel: this file may name instructions.
#pragma once

#include "woq_decode.h"

#if defined(LMFUSE_TILES)

namespace lmfuse::LMFUSE_ISA {
namespace {

// Few rows of bf16 by AMX: like AmxTile in gemm_tile.h, to the bit, but a step is decoded while the
// tiles work on the one before, so that neither waits for the other.
class AmxFewTile {
 public:
  using Input = bf16_t;
  static constexpr int kRows = kTileRows;

  explicit AmxFewTile(int64_t rows) : rows_(rows), tiles_(static_cast<int>(rows)) {}
  TileRows rows() const { return {rows_, rows_, 0}; }

  template <class Decoder>
  LMFUSE_INLINE void run(const bf16_t* x, int64_t lda, const char* codes, int64_t k, float* acc,
                         const Decoder& decode) {
    constexpr int64_t kRow = kPanel * sizeof(float),
                      kStepBytes = kDotStep / Decoder::kColumns * 128;
    alignas(64) char steps[2][kDotStep * kPanel * sizeof(bf16_t)];
    tiles_.zero<0>();
    tiles_.zero<1>();
    decode_bf16(decode, codes, kDotStep, steps[0]);
    for (int64_t i = 0, at = 0; i < k; i += kDotStep, at = 1 - at) {
      codes += kStepBytes;
      if (i + kDotStep < k) decode_bf16(decode, codes, kDotStep, steps[1 - at]);
      tiles_.load<4>(x + i, lda * static_cast<int64_t>(sizeof(bf16_t)));
      tiles_.load<6>(steps[at], kRow);
      tiles_.load<7>(steps[at] + 64, kRow);
      tiles_.dot_bf16<0, 4, 6>();
      tiles_.dot_bf16<1, 4, 7>();
    }
    tiles_.store<0>(acc, kRow);
    tiles_.store<1>(acc + 16, kRow);
  }

 private:
  int64_t rows_;
  Tiles tiles_;
};

// Rows of int8 by AMX, as AmxTile: two tiles of rows by two of channels.
class AmxInt8Tile {
 public:
  static constexpr int kRows = 2 * kTileRows;

  // step: what k is a multiple of.
  AmxInt8Tile(int64_t rows, int64_t step)
      : rows_(rows),
        half_(rows <= kTileRows ? rows : (rows + 1) / 2),
        step_(step),
        tiles_(static_cast<int>(half_), static_cast<int>(step)) {}
  TileRows rows() const { return {rows_, half_, rows_ <= kTileRows ? 0 : 2 * half_ - rows_}; }

  // acc[rows][32] = x[rows][k] b[k / 4][32][4]; ahead: read from memory, and so is what follows
  LMFUSE_INLINE void run(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc,
                         bool ahead) {
    if (rows_ <= kTileRows) {
      run_tiles<false>(x, lda, b, k, acc, ahead);
    } else {
      run_tiles<true>(x, lda, b, k, acc, ahead);
    }
  }

 private:
  int64_t rows_, half_, step_;
  Tiles tiles_;

  template <bool kTwo>
  LMFUSE_INLINE void run_tiles(const int8_t* x, int64_t lda, const char* b, int64_t k, int32_t* acc,
                               bool ahead) {
    constexpr int64_t kRow = 4 * kPanel;
    const int8_t* x2 = x + (rows_ - half_) * lda;
    int32_t* acc2 = acc + half_ * kPanel;
    tiles_.zero<0>();
    tiles_.zero<1>();
    if constexpr (kTwo) {
      tiles_.zero<2>();
      tiles_.zero<3>();
    }
    for (int64_t i = 0; i < k; i += step_, b += step_ * kPanel) {
      if (ahead)
        for (int64_t at = 0; at < step_ * kPanel; at += 128) fetch_codes(b + at);
      tiles_.load<4>(x + i, lda);
      tiles_.load<6>(b, kRow);
      tiles_.load<7>(b + 64, kRow);
      tiles_.dot_int8<0, 4, 6>();
      if constexpr (kTwo) tiles_.load<5>(x2 + i, lda);
      tiles_.dot_int8<1, 4, 7>();
      if constexpr (kTwo) {
        tiles_.dot_int8<2, 5, 6>();
        tiles_.dot_int8<3, 5, 7>();
      }
    }
    tiles_.store<0>(acc, kRow);
    tiles_.store<1>(acc + 16, kRow);
    if constexpr (kTwo) {
      tiles_.store<2>(acc2, kRow);
      tiles_.store<3>(acc2 + 16, kRow);
    }
  }
};

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA

#endif
