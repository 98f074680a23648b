// The vocabulary of simd.h in plain C++, for any architecture: 8 lanes that a compiler may map to
// what the machine has.
#pragma once

namespace lmfuse::LMFUSE_ISA {
namespace {

constexpr int64_t kLanes = 8;

struct Vec {
  float v[kLanes];
};
struct Mask {
  bool v[kLanes];
};

struct Lanes {
  int64_t n;
  static LMFUSE_INLINE Lanes all() { return {kLanes}; }
  static LMFUSE_INLINE Lanes first(int64_t n) { return {n}; }
};

template <class F>
LMFUSE_INLINE Vec each(F f) {
  Vec r;
  for (int64_t i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}

LMFUSE_INLINE Vec broadcast(float x) {
  return each([&](int64_t) { return x; });
}
LMFUSE_INLINE Vec operator+(Vec a, Vec b) {
  return each([&](int64_t i) { return a.v[i] + b.v[i]; });
}
LMFUSE_INLINE Vec operator-(Vec a, Vec b) {
  return each([&](int64_t i) { return a.v[i] - b.v[i]; });
}
LMFUSE_INLINE Vec operator*(Vec a, Vec b) {
  return each([&](int64_t i) { return a.v[i] * b.v[i]; });
}
LMFUSE_INLINE Vec operator/(Vec a, Vec b) {
  return each([&](int64_t i) { return a.v[i] / b.v[i]; });
}
// Two roundings: a fused one costs a library call where the hardware has none.
LMFUSE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int64_t i) { return a.v[i] * b.v[i] + c.v[i]; });
}
LMFUSE_INLINE Vec min(Vec a, Vec b) {
  return each([&](int64_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
LMFUSE_INLINE Vec max(Vec a, Vec b) {
  return each([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
LMFUSE_INLINE Vec sqrt(Vec a) {
  return each([&](int64_t i) { return __builtin_sqrtf(a.v[i]); });
}
LMFUSE_INLINE Vec abs(Vec a) {
  return each([&](int64_t i) { return __builtin_fabsf(a.v[i]); });
}
// 1.5 * 2^23: adding it leaves no fraction bits, so the addition rounds to nearest even.
LMFUSE_INLINE Vec round(Vec a) {
  return each([&](int64_t i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
LMFUSE_INLINE Mask operator<(Vec a, Vec b) {
  Mask m;
  for (int64_t i = 0; i < kLanes; ++i) m.v[i] = a.v[i] < b.v[i];
  return m;
}
LMFUSE_INLINE uint32_t bits(Mask m) {
  uint32_t all = 0;
  for (int64_t i = 0; i < kLanes; ++i) all |= (m.v[i] ? 1u : 0u) << i;
  return all;
}
LMFUSE_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return each([&](int64_t i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}
LMFUSE_INLINE Vec keep(Vec a, Lanes l) {
  return each([&](int64_t i) { return i < l.n ? a.v[i] : 0.0f; });
}
LMFUSE_INLINE Vec scale2(Vec a, Vec n) {
  return each([&](int64_t i) {
    // Clamped before the conversion, which is undefined for NaN and for what no int holds.
    const float bounded = n.v[i] > -252.0f ? (n.v[i] < 252.0f ? n.v[i] : 252.0f) : -252.0f;
    const int e = static_cast<int>(bounded), e1 = e >> 1, e2 = e - e1;
    return a.v[i] * bit_cast<float>((e1 + 127) << 23) * bit_cast<float>((e2 + 127) << 23);
  });
}

LMFUSE_INLINE float sum(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
LMFUSE_INLINE float max(Vec a) {
  float m = a.v[0];
  for (int64_t i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

LMFUSE_INLINE float widen(float x) { return x; }
LMFUSE_INLINE float widen(bf16_t x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
LMFUSE_INLINE float widen(f16_t x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  const uint32_t shifted = rest << 13;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | shifted);  // infinity, NaN
  // 2^112 moves the exponent from fp16's bias to fp32's, subnormals included.
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(shifted) * 0x1p112f) | sign);
}
LMFUSE_INLINE float widen(i8_t x) { return x.bits; }
// fp8 by way of fp16: e5m2 is its upper byte; e4m3, but for NaN, has an exponent 8 lower there.
LMFUSE_INLINE float widen(e5m2_t x) { return widen(f16_t{static_cast<uint16_t>(x.bits << 8)}); }
LMFUSE_INLINE float widen(e4m3_t x) {
  const int rest = x.bits & 0x7f, magnitude = rest == 0x7f ? 0x7e00 : rest << 7;
  return widen(f16_t{static_cast<uint16_t>((x.bits & 0x80) << 8 | magnitude)}) * 256.0f;
}
LMFUSE_INLINE void narrow(float* p, float x) { *p = x; }
LMFUSE_INLINE void narrow(i8_t* p, float x) { p->bits = static_cast<int8_t>(x); }
LMFUSE_INLINE void narrow(bf16_t* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  p->bits = static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
}
LMFUSE_INLINE void narrow(f16_t* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u,
                 rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | (rest >> 13 & 0x3ffu);  // NaN
  } else if (rest >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and more: infinity
  } else if (rest < 0x38800000u) {
    // Below 2^-14, subnormal: adding 0.5 leaves the ten bits that fp16 keeps, rounded to even.
    half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

// Any address will do, as for the instructions of the other levels.
template <class T>
LMFUSE_INLINE float read(const T* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return widen(value);
}
template <class T>
LMFUSE_INLINE void write(T* p, float x) {
  T value;
  narrow(&value, x);
  __builtin_memcpy(p, &value, sizeof(T));
}

template <class T>
LMFUSE_INLINE Vec load(const T* p, Lanes l) {
  return each([&](int64_t i) { return i < l.n ? read(p + i) : 0.0f; });
}
template <class T>
LMFUSE_INLINE Vec load(const T* p) {
  return each([&](int64_t i) { return read(p + i); });
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a, Lanes l) {
  for (int64_t i = 0; i < l.n; ++i) write(p + i, a.v[i]);
}
template <class T>
LMFUSE_INLINE void store(T* p, Vec a) {
  for (int64_t i = 0; i < kLanes; ++i) write(p + i, a.v[i]);
}

template <class T>
LMFUSE_INLINE void stream(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}
LMFUSE_INLINE void stream_end() {}

LMFUSE_INLINE void deinterleave(Vec a, Vec b, Vec& even, Vec& odd) {
  constexpr int64_t h = kLanes / 2;
  even = each([&](int64_t i) { return i < h ? a.v[2 * i] : b.v[2 * (i - h)]; });
  odd = each([&](int64_t i) { return i < h ? a.v[2 * i + 1] : b.v[2 * (i - h) + 1]; });
}
LMFUSE_INLINE void interleave(Vec even, Vec odd, Vec& a, Vec& b) {
  constexpr int64_t h = kLanes / 2;
  a = each([&](int64_t i) { return i % 2 ? odd.v[i / 2] : even.v[i / 2]; });
  b = each([&](int64_t i) { return i % 2 ? odd.v[h + i / 2] : even.v[h + i / 2]; });
}

// v[i] = the words at row[0 … kLanes - 1] + offset + 4 i.
constexpr int64_t kTurned = kLanes / 2;
LMFUSE_INLINE void load_turned(const char* const* row, int64_t offset, Vec (&v)[kTurned]) {
  for (int64_t r = 0; r < kLanes; ++r) {
    const auto* words = reinterpret_cast<const float*>(row[r] + offset);
    for (int64_t i = 0; i < kTurned; ++i) v[i].v[r] = words[i];
  }
}

LMFUSE_INLINE void split_pairs(Vec pairs, Vec& first, Vec& second) {
  const auto bits = [&](int64_t i) { return bit_cast<uint32_t>(pairs.v[i]); };
  first = each([&](int64_t i) { return bit_cast<float>(bits(i) << 16); });
  second = each([&](int64_t i) { return bit_cast<float>(bits(i) & 0xffff0000u); });
}
LMFUSE_INLINE void load_pairs(const bf16_t* p, Vec& first, Vec& second) {
  first = each([&](int64_t i) { return widen(p[2 * i]); });
  second = each([&](int64_t i) { return widen(p[2 * i + 1]); });
}

LMFUSE_INLINE void transpose(Vec (&v)[kLanes]) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = i + 1; j < kLanes; ++j) {
      const float x = v[i].v[j];
      v[i].v[j] = v[j].v[i];
      v[j].v[i] = x;
    }
}

LMFUSE_INLINE void zip(const bf16_t* a, const bf16_t* b, bf16_t* to) {
  for (int64_t i = 0; i < 2 * kLanes; ++i) {
    to[2 * i] = a[i];
    to[2 * i + 1] = b[i];
  }
}

LMFUSE_INLINE void zip(const i8_t* a, const i8_t* b, bf16_t* to) {
  for (int64_t i = 0; i < 2 * kLanes; ++i) {
    narrow(to + 2 * i, widen(a[i]));
    narrow(to + 2 * i + 1, widen(b[i]));
  }
}

template <class T>
LMFUSE_INLINE void store_low(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

struct Words {
  uint32_t v[kLanes];
};
LMFUSE_INLINE Words load_words(const void* p) {
  Words w;
  __builtin_memcpy(w.v, p, sizeof(w.v));
  return w;
}
LMFUSE_INLINE void store_words(void* p, Words w) { __builtin_memcpy(p, w.v, sizeof(w.v)); }
LMFUSE_INLINE Words operator>>(Words w, int bits) {
  for (uint32_t& word : w.v) word >>= bits;
  return w;
}
LMFUSE_INLINE Words operator<<(Words w, int bits) {
  for (uint32_t& word : w.v) word <<= bits;
  return w;
}
LMFUSE_INLINE Words operator&(Words w, uint32_t mask) {
  for (uint32_t& word : w.v) word &= mask;
  return w;
}
LMFUSE_INLINE Words byte(Words w, int i) {
  for (uint32_t& word : w.v) word = static_cast<uint32_t>(static_cast<int8_t>(word >> 8 * i));
  return w;
}
LMFUSE_INLINE Words top(Words w, int i) { return w << (24 - 8 * i) & 0xff000000u; }
LMFUSE_INLINE Vec number(Words w) {
  return each([&](int64_t i) { return static_cast<float>(static_cast<int32_t>(w.v[i])); });
}
LMFUSE_INLINE Vec lookup(const float* table, Words w) {
  return each([&](int64_t i) { return table[w.v[i] & 15]; });
}
LMFUSE_INLINE Vec e4m3(Words w) {
  return each([&](int64_t i) { return widen(e4m3_t{static_cast<uint8_t>(w.v[i])}); });
}

}  // namespace
}  // namespace lmfuse::LMFUSE_ISA
