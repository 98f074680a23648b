// Weights into panels of 32 output channels and back (the layout stands in kernels.h). A panel is
// words transposed: one fp32, one fp16, or a pair of bf16 along k. Sources may lie at any address:
// safetensors maps tensors at multiples of 8 bytes.
#include "loops.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// What one word holds: elements along k.
struct Layout {
  int64_t element, word;  // bytes
  int64_t k_bytes, k_words;

  Layout(DType type, int64_t k)
      : element(type == DType::f32 ? 4 : 2),
        word(type == DType::f16 ? 2 : 4),
        k_bytes(k * element),
        k_words(packed_k(type, k) * element / word) {}
};

LMFUSE_INLINE char* channel(const PackArgs& a, const Layout& l, int64_t n) {
  return static_cast<char*>(a.weight.data) + offset(a.weight.rows, n) * l.element;
}

// In blocks of one line (64 bytes) of each of the 32 channels: each source line is read once, and
// the scattered side of the transposition stays in the first-level cache.
constexpr int64_t kLine = 64;

// One line of each channel (16 words of 4 bytes) to 16 packed rows, and back, by squares of
// vectors.
LMFUSE_INLINE void pack_lines(const char* const (&from)[kPanel], int64_t at, uint32_t* to) {
  constexpr int64_t kWords = kLine / sizeof(float);
  for (int64_t c = 0; c < kPanel; c += kLanes)
    for (int64_t w = 0; w < kWords; w += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        v[i] = load(reinterpret_cast<const float*>(from[c + i] + at) + w);
      transpose(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        store(reinterpret_cast<float*>(to + (w + i) * kPanel + c), v[i]);
    }
}

LMFUSE_INLINE void unpack_lines(const uint32_t* from, char* const (&to)[kPanel], int64_t at) {
  constexpr int64_t kWords = kLine / sizeof(float);
  for (int64_t c = 0; c < kPanel; c += kLanes)
    for (int64_t w = 0; w < kWords; w += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        v[i] = load(reinterpret_cast<const float*>(from + (w + i) * kPanel + c));
      transpose(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        store(reinterpret_cast<float*>(to[c + i] + at) + w, v[i]);
    }
}

template <class Word>
void pack_panel(const PackArgs& a, const Layout& l, int64_t panel) {
  constexpr int64_t kWords = kLine / sizeof(Word);
  Word* to = static_cast<Word*>(a.packed) + panel * kPanel * l.k_words;
  const int64_t channels = a.n - panel * kPanel < kPanel ? a.n - panel * kPanel : kPanel;
  const char* from[kPanel];
  for (int64_t c = 0; c < channels; ++c) from[c] = channel(a, l, panel * kPanel + c);
  Word block[kPanel][kWords] = {};
  for (int64_t w0 = 0; w0 < l.k_words; w0 += kWords) {
    const int64_t words = l.k_words - w0 < kWords ? l.k_words - w0 : kWords;
    const int64_t at = w0 * static_cast<int64_t>(sizeof(Word));
    const int64_t size = l.k_bytes - at < kLine ? l.k_bytes - at : kLine;
    if constexpr (sizeof(Word) == sizeof(float))
      if (channels == kPanel && size == kLine) {
        pack_lines(from, at, to + w0 * kPanel);
        continue;
      }
    for (int64_t c = 0; c < channels; ++c) {
      if (size == kLine) {
        __builtin_memcpy(block[c], from[c] + at, kLine);
      } else {
        __builtin_memset(block[c], 0, kLine);
        if (size > 0) __builtin_memcpy(block[c], from[c] + at, size);
      }
    }
    for (int64_t w = 0; w < words; ++w)
      for (int64_t c = 0; c < kPanel; ++c) to[(w0 + w) * kPanel + c] = block[c][w];
  }
}

template <class Word>
void unpack_panel(const PackArgs& a, const Layout& l, int64_t panel) {
  constexpr int64_t kWords = kLine / sizeof(Word);
  const Word* from = static_cast<const Word*>(a.packed) + panel * kPanel * l.k_words;
  const int64_t channels = a.n - panel * kPanel < kPanel ? a.n - panel * kPanel : kPanel;
  char* to[kPanel];
  for (int64_t c = 0; c < channels; ++c) to[c] = channel(a, l, panel * kPanel + c);
  Word block[kPanel][kWords];
  for (int64_t w0 = 0; w0 < l.k_words; w0 += kWords) {
    const int64_t words = l.k_words - w0 < kWords ? l.k_words - w0 : kWords;
    const int64_t at = w0 * static_cast<int64_t>(sizeof(Word));
    const int64_t size = l.k_bytes - at < kLine ? l.k_bytes - at : kLine;
    if constexpr (sizeof(Word) == sizeof(float))
      if (channels == kPanel && size == kLine) {
        unpack_lines(from + w0 * kPanel, to, at);
        continue;
      }
    for (int64_t w = 0; w < words; ++w)
      for (int64_t c = 0; c < kPanel; ++c) block[c][w] = from[(w0 + w) * kPanel + c];
    for (int64_t c = 0; c < channels && size > 0; ++c) __builtin_memcpy(to[c] + at, block[c], size);
  }
}

template <class Word>
void unpack_row(const UnpackRowsArgs& a, const Layout& l, int64_t i) {
  const int64_t panel = a.rows[i] / kPanel, channel = a.rows[i] % kPanel;
  const Word* from = static_cast<const Word*>(a.packed) + panel * kPanel * l.k_words + channel;
  char* to = static_cast<char*>(a.y) + i * l.k_bytes;
  const int64_t words = l.k_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t w = 0; w < words; ++w)
    __builtin_memcpy(to + w * sizeof(Word), from + w * kPanel, sizeof(Word));
  const int64_t rest = l.k_bytes - words * static_cast<int64_t>(sizeof(Word));
  if (rest) __builtin_memcpy(to + words * sizeof(Word), from + words * kPanel, rest);
}

}  // namespace

void pack(const PackArgs& a, int64_t begin, int64_t end) {
  const Layout l(a.weight.dtype, a.k);
  for (int64_t panel = begin; panel < end; ++panel) {
    if (l.word == 4) {
      pack_panel<uint32_t>(a, l, panel);
    } else {
      pack_panel<uint16_t>(a, l, panel);
    }
  }
}

void unpack(const PackArgs& a, int64_t begin, int64_t end) {
  const Layout l(a.weight.dtype, a.k);
  for (int64_t panel = begin; panel < end; ++panel) {
    if (l.word == 4) {
      unpack_panel<uint32_t>(a, l, panel);
    } else {
      unpack_panel<uint16_t>(a, l, panel);
    }
  }
}

void unpack_rows(const UnpackRowsArgs& a, int64_t begin, int64_t end) {
  const Layout l(a.dtype, a.k);
  for (int64_t i = begin; i < end; ++i) {
    if (l.word == 4) {
      unpack_row<uint32_t>(a, l, i);
    } else {
      unpack_row<uint16_t>(a, l, i);
    }
  }
}

}  // namespace lmfuse::LMFUSE_ISA
