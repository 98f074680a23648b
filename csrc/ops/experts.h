// The weights of a mixture of experts, packed or quantized.
#pragma once

#include "decoder_linear.h"

namespace lmfuse {

// The matrices [n, k] of all experts, one after the other.
class ExpertMatrices {
 public:
  ExpertMatrices() = default;
  // how: -1 if they are packed, each with a header of its own; else 2 * compute + block_scales for
  // one quantized weight, in which each takes whole panels. bias: [count * n], or null.
  ExpertMatrices(const Tensor& t, const Tensor* bias, int64_t count, int64_t n, int64_t k,
                 int64_t how, const char* name)
      : count(count), n_(n), k_(k), name_(name) {
    LMFUSE_CHECK_VALUE(n > 0 && k > 0 && how >= -1 && how < 6, name, " has no features");
    LMFUSE_CHECK_VALUE(count > 0, name, " has no experts");
    if (how < 0) {
      LMFUSE_CHECK_VALUE(t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.is_contiguous(),
                         name, " must be packed weights: a contiguous CPU tensor of bytes");
      LMFUSE_CHECK_VALUE(t.numel() % count == 0, name, " has ", t.numel(), " bytes, which are not ",
                         count, " weights");
      each_ = t.numel() / count;
      data_ = static_cast<const char*>(t.const_data_ptr());
      type = open(data_, each_, name).dtype;
    } else {
      const Quantized all = open_quantized(t, name);
      const int64_t rows = panel_count(n) * kPanel;
      LMFUSE_CHECK_VALUE(all.k == k && all.format.n == count * rows && !all.order, name, " is ",
                         all.format.n, " by ", all.k, ", but must be ", count, " times ", rows,
                         " by ", k, ", with its columns in order");
      like_.quantized = true;
      like_.how = checked_how(all, how / 2, how % 2);
      like_.weight = all;
      like_.weight.format.n = n;
      each_ = panel_count(n) * all.format.panel_bytes();
      data_ = all.panels;
    }
    if (bias) {
      LMFUSE_CHECK_VALUE(bias->is_cpu() && bias->is_contiguous() && bias->numel() == count * n,
                         "the bias of ", name, " must be contiguous and have ", count * n,
                         " elements, but has ", bias->numel());
      like_.bias = {bias->const_data_ptr(), dtype(*bias, "a bias of experts")};
    }
    for (int64_t i = 0; how < 0 && i < count; ++i) at(i);
  }

  bool quantized() const { return like_.quantized; }

  DecoderLinear at(int64_t i) const {
    DecoderLinear l = like_;
    l.n = n_;
    l.k = k_;
    l.panels = data_ + i * each_;
    l.weight.panels = l.panels;
    if (l.bias.data)
      l.bias.data =
          static_cast<const char*>(l.bias.data) + i * n_ * (l.bias.dtype == DType::f32 ? 4 : 2);
    if (!l.quantized) {
      const Packed w = open(l.panels, each_, name_);
      LMFUSE_CHECK_VALUE(w.n == n_ && w.k == k_ && w.dtype == type, name_, " holds a weight ", w.n,
                         " by ", w.k, ", but all must be ", n_, " by ", k_, " and of one dtype");
      l.panels = w.panels;
      l.type = w.dtype;
    }
    return l;
  }

  int64_t count = 0;
  DType type = DType::f32;  // of packed ones

 private:
  DecoderLinear like_{};
  int64_t n_ = 0, k_ = 0, each_ = 0;
  const char *data_ = nullptr, *name_ = nullptr;
};

// down(act(gate(x), up(x))) of each expert; in gate_up the two take turns.
struct Mixture {
  ExpertMatrices gate_up, down;
  Activation act;
  float slope, limit;  // of clamped_swiglu

  // Gate and up as one product.
  bool joined() const { return act == Activation::silu && gate_up.at(0).joins(gate_up.at(1)); }
};

}  // namespace lmfuse
