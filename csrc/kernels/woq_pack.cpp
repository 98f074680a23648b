// Quantized weights into panels and back (the layout stands in kernels.h), and rows of their
// values.
#include "woq_decode.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// Where the codes and scales of one panel lie.
template <class Byte>
struct Panel {
  const WoqFormat& f;
  Byte* data;

  Panel(const WoqFormat& format, Byte* packed, int64_t panel)
      : f(format), data(packed + panel * format.panel_bytes()) {}

  int64_t group_bytes() const { return f.scale_bytes() + f.code_bytes(f.group); }
  Byte* scales(int64_t group) const { return data + group * group_bytes(); }
  // The four bytes with the code of column k, and where in them it lies.
  Byte* word(int64_t k, int64_t c) const {
    const int64_t in = k % f.group, words = in / (f.nibbles() ? 8 : 4);
    return scales(k / f.group) + f.scale_bytes() + 4 * (words * kPanel + c);
  }
  int64_t shift(int64_t k) const {
    const int64_t in = k % f.group;
    return f.nibbles() ? nibble_shift(in % 8) : in % 4 * 8;
  }
  uint32_t mask() const { return f.nibbles() ? 15 : 255; }

  uint32_t code(int64_t k, int64_t c) const {
    uint32_t word_;
    __builtin_memcpy(&word_, word(k, c), sizeof(word_));
    return word_ >> shift(k) & mask();
  }
};

LMFUSE_INLINE int64_t channels(const WoqFormat& f, int64_t panel) {
  const int64_t left = f.n - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

// Column i of the panels, as one of the codes; -1 if it is none.
LMFUSE_INLINE int64_t column(const int32_t* order, int64_t i, int64_t k) {
  const int64_t from = order ? order[i] : i;
  return from < k ? from : -1;
}

template <class T>
LMFUSE_INLINE void put(char* p, int64_t i, float value) {
  map(reinterpret_cast<T*>(p) + i, 1, [&](int64_t, auto) { return broadcast(value); });
}
template <class T>
LMFUSE_INLINE float get(const char* p, int64_t i) {
  float value;
  map(&value, 1, [&](int64_t, auto l) { return load(reinterpret_cast<const T*>(p) + i, l); });
  return value;
}

}  // namespace

void woq_pack(const WoqPackArgs& a, int64_t begin, int64_t end) {
  const WoqFormat& f = a.format;
  const int64_t groups = f.groups();
  for (int64_t p = begin; p < end; ++p) {
    const Panel<char> panel(f, a.packed, p);
    __builtin_memset(panel.data, 0, f.panel_bytes());
    for (int64_t c = 0; c < channels(f, p); ++c) {
      const int64_t n = p * kPanel + c;
      with_type(f.scale_type, [&](auto t) {
        using T = decltype(t);
        for (int64_t g = 0; g < groups; ++g) {
          put<T>(panel.scales(g), c, a.scales[n * groups + g]);
          if (f.zero != WoqZero::none) put<T>(panel.scales(g), kPanel + c, a.zeros[n * groups + g]);
        }
      });
      const uint8_t* codes = a.codes + n * a.k;
      for (int64_t i = 0; i < f.k; ++i) {
        const int64_t from = column(a.order, i, a.k);
        if (from < 0) continue;
        char* at = panel.word(i, c);
        uint32_t word;
        __builtin_memcpy(&word, at, sizeof(word));
        word |= static_cast<uint32_t>(codes[from]) << panel.shift(i);
        __builtin_memcpy(at, &word, sizeof(word));
      }
    }
  }
}

void woq_unpack(const WoqPackArgs& a, int64_t begin, int64_t end) {
  const WoqFormat& f = a.format;
  const int64_t groups = f.groups();
  for (int64_t p = begin; p < end; ++p) {
    const Panel<const char> panel(f, a.packed, p);
    for (int64_t c = 0; c < channels(f, p); ++c) {
      const int64_t n = p * kPanel + c;
      with_type(f.scale_type, [&](auto t) {
        using T = decltype(t);
        for (int64_t g = 0; g < groups; ++g) {
          a.scales[n * groups + g] = get<T>(panel.scales(g), c);
          if (f.zero != WoqZero::none)
            a.zeros[n * groups + g] = get<T>(panel.scales(g), kPanel + c);
        }
      });
      uint8_t* codes = a.codes + n * a.k;
      for (int64_t i = 0; i < f.k; ++i) {
        const int64_t to = column(a.order, i, a.k);
        if (to >= 0) codes[to] = static_cast<uint8_t>(panel.code(i, c));
      }
    }
  }
}

void woq_values(const WoqValuesArgs& a, int64_t begin, int64_t end) {
  const WoqFormat& f = a.format;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = a.rows ? a.rows[r] : r, c = n % kPanel;
    const Panel<const char> panel(f, a.packed, n / kPanel);
    float* y = a.y + r * a.k;
    for (WoqBlocks blocks(f, woq_block(f)); blocks; ++blocks) {
      const WoqBlock block(*blocks, panel.data);
      const WoqScales s = load_scales(f, block, middle(f));
      alignas(64) float scale[kPanel], zero[kPanel], offset[kPanel], q[kWoqBlock], value[kWoqBlock];
      for (int v = 0; v < kVecs; ++v) {
        store(scale + v * kLanes, s.scale[v]);
        store(zero + v * kLanes, s.zero[v]);
        store(offset + v * kLanes, s.offset[v]);
      }
      const int64_t k = f.k - block.k0 < block.k ? f.k - block.k0 : block.k;
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t code = panel.code(block.k0 + i, c);
        switch (f.kind) {
          case WoqKind::int8:
            q[i] = static_cast<float>(static_cast<int8_t>(code));
            break;
          case WoqKind::int4:
            q[i] = static_cast<float>(code);
            break;
          case WoqKind::nf4:
            q[i] = kNf4[code];
            break;
          case WoqKind::fp8: {
            const e4m3_t byte{static_cast<uint8_t>(code)};
            q[i] = get<e4m3_t>(reinterpret_cast<const char*>(&byte), 0);
            break;
          }
        }
      }
      map(value, k, [&](int64_t i, auto l) {
        if (f.zero == WoqZero::offset)
          return fma(load(q + i, l), broadcast(scale[c]), broadcast(offset[c]));
        return (load(q + i, l) - broadcast(zero[c])) * broadcast(scale[c]);
      });
      for (int64_t i = 0; i < k; ++i) {
        const int64_t to = column(a.order, block.k0 + i, a.k);
        if (to >= 0) y[to] = value[i];
      }
    }
  }
}

}  // namespace lmfuse::LMFUSE_ISA
