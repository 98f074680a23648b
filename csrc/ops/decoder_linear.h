// A linear layer, packed or quantized, as decoder layers and experts multiply by it.
#pragma once

#include "packed.h"
#include "quantized.h"

namespace lmfuse {

struct DecoderLinear {
  int64_t n, k;  // n 0: there is none
  const char* panels;
  Vector bias;
  DType type;  // of a packed weight
  bool quantized;
  Quantized weight;  // of a quantized one
  WoqHow how;

  // Gate and up as one product, whose results are not rounded in between.
  bool joins(const DecoderLinear& up) const {
    if (n != up.n || quantized != up.quantized) return false;
    if (!quantized) return true;
    const WoqFormat &a = weight.format, &b = up.weight.format;
    return a.kind == b.kind && a.group == b.group && a.zero == b.zero &&
           a.scale_type == b.scale_type && how.compute == up.how.compute &&
           how.block_scales == up.how.block_scales && !weight.order && !up.weight.order;
  }
};

}  // namespace lmfuse
