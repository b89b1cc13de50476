// A group of numbers of a tensor: read in whatever format they are stored, held in FP32, written again.

#pragma once

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

// The numbers of a tensor; optcpu/optim/native.py mirrors this structure.
struct Stored {
  void* data;      // null where a rule has no use for it
  int16_t* low;    // the lower halves of split numbers
  int32_t format;  // see Format
  uint32_t seed;   // of the random bits that round this tensor in this step
};

enum Format : int32_t { kFloat, kSplit, kStochastic, kNearest };

#define INLINE inline __attribute__((always_inline))

namespace {

// Where a group lies in its tensors, and how much of it there is: all if kWhole.
template <int kGroup, bool kWhole>
struct PlaceOf {
  int64_t start, given;
  int64_t size() const { return kWhole ? kGroup : given; }
};

// Random bits for the two numbers at 2 * pair, a function of seed and place alone: the same for any number
// of threads. The mixing function is "lowbias32" of C. Wellons' hash prospector.
template <class Bits>
INLINE Bits random_bits(uint32_t seed, Bits pair) {
  Bits x = pair ^ seed;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Asks for the numbers `ahead` of `start`: unless they come while the processor computes, memory idles
// while it does, and the processor while memory is read.
INLINE void prefetch(const Stored& from, int64_t start, int64_t size, int64_t ahead) {
  constexpr int64_t kCacheLine = 64;
  const int64_t width = from.format == kFloat ? 4 : 2;
  const char* data = static_cast<const char*>(from.data) + (start + ahead) * width;
  for (int64_t at = 0; at < size * width; at += kCacheLine) __builtin_prefetch(data + at);
  if (from.format != kSplit) return;
  const char* low = reinterpret_cast<const char*>(from.low + start + ahead);
  for (int64_t at = 0; at < size * width; at += kCacheLine) __builtin_prefetch(low + at);
}

#ifdef __AVX512BW__

// A group is two vectors, which stay in registers from the first read to the last write.
constexpr int kVector = 16;
constexpr int kGroup = 2 * kVector;
constexpr int64_t kAhead = 128;

using Floats = float __attribute__((vector_size(kVector * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kVector * sizeof(uint32_t))));

template <bool kWhole>
using Place = PlaceOf<kGroup, kWhole>;

// In the order of memory.
struct Numbers {
  Floats a, b;
  float operator[](int64_t i) const { return i < kVector ? a[i] : b[i - kVector]; }
};

template <bool kWhole>
INLINE __mmask32 mask(Place<kWhole> at) {
  return kWhole ? ~0u : (1u << at.size()) - 1;
}

template <bool kWhole>
INLINE __m512i halves(const void* data, Place<kWhole> at) {
  return _mm512_maskz_loadu_epi16(mask(at), static_cast<const int16_t*>(data) + at.start);
}

template <bool kWhole>
INLINE void store_halves(void* data, Place<kWhole> at, __m512i numbers) {
  int16_t* target = static_cast<int16_t*>(data) + at.start;
  if (kWhole)
    _mm512_storeu_si512(target, numbers);
  else
    _mm512_mask_storeu_epi16(target, mask(at), numbers);
}

constexpr int kSecond = 32;  // in an index of permuted halves: of the second operand

// For permutations: `first`, and each index `step` behind the one before.
INLINE __m512i every(int first, int step) {
  alignas(64) int16_t index[kGroup];
  for (int i = 0; i < kGroup; i++) index[i] = int16_t(first + i * step);
  return _mm512_load_si512(index);
}

// Indices from `first` on at even places, from `second` on at odd ones.
INLINE __m512i alternating(int first, int second) {
  alignas(64) int16_t index[kGroup];
  for (int i = 0; i < kGroup; i++) index[i] = int16_t((i % 2 ? second : first) + i / 2);
  return _mm512_load_si512(index);
}

// Pairs (low, high) as sixteen 32-bit numbers: those of the first or of the second half of a group.
INLINE Floats paired(__m512i low, __m512i high, int half) {
  const int first = half * kVector;
  return (Floats)_mm512_permutex2var_epi16(low, alternating(first, first + kSecond), high);
}

INLINE __m512i upper_halves(Numbers x) {
  return _mm512_permutex2var_epi16((__m512i)x.a, every(1, 2), (__m512i)x.b);
}

INLINE __m512i lower_halves(Numbers x) {
  return _mm512_permutex2var_epi16((__m512i)x.a, every(0, 2), (__m512i)x.b);
}

INLINE Numbers add_bits(Numbers x, Bits a, Bits b) {
  return {(Floats)((Bits)x.a + a), (Floats)((Bits)x.b + b)};
}

template <bool kWhole>
INLINE Numbers get(const Stored& from, Place<kWhole> at) {
  if (kWhole) prefetch(from, at.start, kGroup, kAhead);
  if (from.format == kFloat) {
    const float* data = static_cast<const float*>(from.data) + at.start;
    return {(Floats)_mm512_maskz_loadu_ps(__mmask16(mask(at)), data),
            (Floats)_mm512_maskz_loadu_ps(__mmask16(mask(at) >> kVector), data + kVector)};
  }
  const __m512i high = halves(from.data, at);
  if (from.format != kSplit) {
    const __m512i zero = _mm512_setzero_si512();
    return {paired(zero, high, 0), paired(zero, high, 1)};
  }
  // The upper half was rounded: the lower one is negative where that went up.
  const __m512i low = _mm512_xor_si512(halves(from.low, at), _mm512_set1_epi16(int16_t(0x8000)));
  const Bits half = Bits{} - 0x8000u;
  return add_bits({paired(low, high, 0), paired(low, high, 1)}, half, half);
}

template <bool kWhole>
INLINE void put(const Stored& to, Place<kWhole> at, Numbers x) {
  if (to.format == kFloat) {
    float* data = static_cast<float*>(to.data) + at.start;
    _mm512_mask_storeu_ps(data, __mmask16(mask(at)), (__m512)x.a);
    _mm512_mask_storeu_ps(data + kVector, __mmask16(mask(at) >> kVector), (__m512)x.b);
    return;
  }
  if (to.format == kSplit) {
    store_halves(to.low, at, lower_halves(x));
    x = add_bits(x, Bits{} + 0x8000u, Bits{} + 0x8000u);
  } else if (to.format == kStochastic) {
    Bits pairs = Bits{} + uint32_t(at.start / 2);
    for (int i = 0; i < kVector; i++) pairs[i] += i;
    const __m512i bits = (__m512i)random_bits(to.seed, pairs), zero = _mm512_setzero_si512();
    x = add_bits(x, (Bits)paired(bits, zero, 0), (Bits)paired(bits, zero, 1));
  } else {
    x = add_bits(x, 0x7fffu + (((Bits)x.a >> 16) & 1), 0x7fffu + (((Bits)x.b >> 16) & 1));
  }
  store_halves(to.data, at, upper_halves(x));
}

INLINE Floats root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }

INLINE Floats larger(Floats x, Floats y) { return x > y ? x : y; }

// f on the first vectors of all arguments, then on the second ones.
template <class F, class... N>
INLINE void each(const F& f, N&... numbers) {
  f(numbers.a...);
  f(numbers.b...);
}

// The sum of squares, in FP32.
struct Squares {
  Floats sums = {};
  INLINE void add(const Numbers& x) { sums += x.a * x.a + x.b * x.b; }
  double total() const {
    double total = 0;
    for (int i = 0; i < kVector; i++) total += sums[i];
    return total;
  }
};

#else

// A group lies on the stack, where it stays in the first cache: 256 bytes of each of its tensors, as many
// lines as the processor can ask memory for at once. Its loops are for the compiler to vectorise.
constexpr int kGroup = 128;
constexpr int kSums = 16;

template <bool kWhole>
using Place = PlaceOf<kGroup, kWhole>;

// In the order of memory; zero where there are none.
struct Numbers {
  alignas(64) float x[kGroup];
  float operator[](int64_t i) const { return x[i]; }
};

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <bool kWhole>
INLINE Numbers get(const Stored& from, Place<kWhole> at) {
  if (kWhole) prefetch(from, at.start, kGroup, kGroup);
  Numbers to;
  const int64_t n = at.size();
  if (!kWhole) std::memset(&to, 0, sizeof to);
  if (from.format == kFloat) {
    std::memcpy(to.x, static_cast<const float*>(from.data) + at.start, n * sizeof(float));
    return to;
  }
  const uint16_t* high = static_cast<const uint16_t*>(from.data) + at.start;
  if (from.format == kSplit) {
    const int16_t* low = from.low + at.start;
    for (int64_t i = 0; i < n; i++)
      to.x[i] = as_float((uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i])));
  } else {
    for (int64_t i = 0; i < n; i++) to.x[i] = as_float(uint32_t(high[i]) << 16);
  }
  return to;
}

template <bool kWhole>
INLINE void put(const Stored& to, Place<kWhole> at, const Numbers& from) {
  const int64_t n = at.size();
  if (to.format == kFloat) {
    std::memcpy(static_cast<float*>(to.data) + at.start, from.x, n * sizeof(float));
    return;
  }
  uint16_t* __restrict high = static_cast<uint16_t*>(to.data) + at.start;
  if (to.format == kSplit) {
    int16_t* __restrict low = to.low + at.start;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t bits = as_bits(from.x[i]), upper = (bits + 0x8000u) >> 16;
      high[i] = uint16_t(upper);
      low[i] = int16_t(bits - (upper << 16));
    }
  } else if (to.format == kStochastic) {
    const uint32_t seed = to.seed, first = uint32_t(at.start / 2);  // start is even
    uint32_t pairs[kGroup / 2];
    uint16_t bits[kGroup];
    for (uint32_t i = 0; i < kGroup / 2; i++) pairs[i] = random_bits(seed, first + i);
    std::memcpy(bits, pairs, sizeof bits);
    for (int64_t i = 0; i < n; i++) high[i] = uint16_t((as_bits(from.x[i]) + bits[i]) >> 16);
  } else {
    for (int64_t i = 0; i < n; i++) {
      const uint32_t bits = as_bits(from.x[i]);
      high[i] = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    }
  }
}

INLINE float root(float x) { return std::sqrt(x); }

INLINE float larger(float x, float y) { return x > y ? x : y; }

// f on the first number of all arguments, then on the second ones, and so on.
template <class F, class... N>
INLINE void each(const F& f, N&... numbers) {
  for (int i = 0; i < kGroup; i++) f(numbers.x[i]...);
}

// The sum of squares, in FP32.
struct Squares {
  float sums[kSums] = {};
  INLINE void add(const Numbers& from) {
    for (int i = 0; i < kGroup; i += kSums)
      for (int j = 0; j < kSums; j++) sums[j] += from.x[i + j] * from.x[i + j];
  }
  double total() const {
    double total = 0;
    for (float sum : sums) total += sum;
    return total;
  }
};

#endif

}  // namespace
