// New keys and values into a cache, converted on the way.
#include "attention_pack.h"

namespace lmfuse::LMFUSE_ISA {
namespace {

// x to fp8, rounded to nearest even, saturated; NaN stays NaN. By way of the bits: kMantissa
// fraction bits, exponent bias kBias, the largest finite value kLargest.
template <int kMantissa, int kBias>
LMFUSE_INLINE uint8_t to_fp8(float x, float largest) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80;
  float a = __builtin_fabsf(x);
  if (x != x) return static_cast<uint8_t>(sign | 0x7f);
  if (a > largest) a = largest;
  // Below the smallest normal: adding this leaves the bits that fp8 keeps, rounded.
  constexpr int kShift = 23 - kMantissa;
  const float smallest = bit_cast<float>(static_cast<uint32_t>(128 - kBias) << 23);
  uint32_t magnitude;
  if (a < smallest) {
    const float magic = bit_cast<float>(static_cast<uint32_t>(128 - kBias + kShift) << 23);
    magnitude = bit_cast<uint32_t>(a + magic) - bit_cast<uint32_t>(magic);
  } else {
    const uint32_t m = bit_cast<uint32_t>(a);
    magnitude = (m + ((1u << (kShift - 1)) - 1) + (m >> kShift & 1u)) >> kShift;
    magnitude -= static_cast<uint32_t>(127 - kBias) << kMantissa;
  }
  return static_cast<uint8_t>(sign | magnitude);
}

// A row as it is, bit by bit: in words of fp32, unless it is an odd number of halves.
template <class T>
LMFUSE_INLINE void copy_row(bool stream, T* to, const T* from, int64_t n) {
  const int64_t size = n * static_cast<int64_t>(sizeof(T));
  if (size % 4) {
    __builtin_memcpy(to, from, size);
  } else {
    const float* words = reinterpret_cast<const float*>(from);
    map(stream, reinterpret_cast<float*>(to), size / 4,
        [&](int64_t i, auto l) { return load(words + i, l); });
  }
}

// max |x|; NaN does not count.
template <class T>
LMFUSE_INLINE float largest(const T* x, int64_t n) {
  Vec most = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max(abs(load(x + i)), most);
  if (i < n) most = max(abs(load(x + i, Lanes::first(n - i))), most);
  return max(most);
}

// One row of a head; the loops over bytes are left to the compiler's vectorizer.
template <class From>
void write_row(const CacheArgs& a, const CacheArgs::Side& s, const From* from, char* to,
               float* scale) {
  auto* bytes = reinterpret_cast<uint8_t*>(to);
  const auto each = [&](auto prepare, auto code) LMFUSE_LAMBDA {
    constexpr int64_t kPart = 64;
    float wide[kPart];
    for (int64_t i = 0; i < s.dim; i += kPart) {
      const int64_t n = s.dim - i < kPart ? s.dim - i : kPart;
      map(wide, n, [&](int64_t j, auto l) { return prepare(load(from + i + j, l)); });
      for (int64_t j = 0; j < n; ++j) bytes[i + j] = code(wide[j]);
    }
  };
  const auto scaled = [&](Vec x) { return x * broadcast(s.inverse_scale); };
  switch (a.to_type) {
    case KvType::f32:
    case KvType::bf16:
    case KvType::f16:
      return copy_row(a.stream, reinterpret_cast<From*>(to), from, s.dim);
    case KvType::e5m2:
      return each(scaled, [](float x) { return to_fp8<2, 15>(x, 57344.0f); });
    case KvType::e4m3:
      return each(scaled, [](float x) { return to_fp8<3, 7>(x, 448.0f); });
    case KvType::i8: {
      const float most = largest(from, s.dim);
      *scale = most / 127.0f;
      const Vec factor = broadcast(most > 0.0f ? 127.0f / most : 0.0f);
      // Rounded to even by the bits that fp32 has no room for.
      return each(
          [&](Vec x) {
            const Vec bounded = max(min(x * factor, broadcast(127.0f)), broadcast(-127.0f));
            return bounded + broadcast(12582912.0f);
          },
          [](float x) { return static_cast<uint8_t>(bit_cast<uint32_t>(x)); });
    }
  }
}

// Tokens [begin, end). The next one is fetched while one is written: on Zen 4, with slots in any
// order, 78 to 89 % of the copy bandwidth.
void write_side(const CacheArgs& a, const CacheArgs::Side& s, int64_t begin, int64_t end) {
  const int64_t size = kv_bytes(a.to_type);
  with_type(a.from_type, [&](auto t) {
    using From = decltype(t);
    const auto* from = static_cast<const From*>(s.from);
    const int64_t next = s.from_stride_t, row = s.dim * static_cast<int64_t>(sizeof(From));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = a.slots[i], block = slot / a.block, in_block = slot % a.block;
      if (slot < 0) continue;
      char* to =
          static_cast<char*>(s.to) + (block * s.stride.block + in_block * s.stride.token) * size;
      float* scale = s.scale
                         ? s.scale + block * s.scale_stride.block + in_block * s.scale_stride.token
                         : nullptr;
      for (int64_t h = 0; h < a.heads; ++h) {
        const From* mine = from + i * next + h * s.from_stride_h;
        if (i + 1 < end)
          for (int64_t b = 0; b < row; b += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(mine + next) + b);
        write_row(a, s, mine, to + h * s.stride.head * size,
                  scale ? scale + h * s.scale_stride.head : nullptr);
      }
    }
  });
}

}  // namespace

// Keys, then values: one after the other 101 to 108 % of the copy bandwidth, in turns 100 to 104.
void cache_write(const CacheArgs& a, int64_t begin, int64_t end) {
  write_side(a, a.key, begin, end);
  write_side(a, a.value, begin, end);
  if (a.stream) stream_end();
}

}  // namespace lmfuse::LMFUSE_ISA
