// A group of numbers of a tensor: read in whatever format they are stored, held in FP32, written again.

#pragma once

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include <cfloat>
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

#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

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
constexpr int64_t kAhead = 512;

using Floats = float __attribute__((vector_size(kVector * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kVector * sizeof(uint32_t))));

template <bool kWhole>
using Place = PlaceOf<kGroup, kWhole>;

// The numbers at even places and those at odd ones: 16-bit numbers become FP32 and are written again without
// being moved from one place of a register to another, which takes longest.
struct Numbers {
  Floats even, odd;
  float operator[](int64_t i) const { return i % 2 ? odd[i / 2] : even[i / 2]; }
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

constexpr uint32_t kUpper = 0xffff0000u;
constexpr Bits kPlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE Bits shifted_up(__m512i halves) { return (Bits)halves << 16; }

INLINE Bits upper(__m512i halves) { return (Bits)halves & kUpper; }

// Sixteen-bit numbers with their sign as 32-bit ones: those at even places, those at odd ones.
INLINE Bits even_signed(__m512i halves) {
  return (Bits)_mm512_srai_epi32(_mm512_slli_epi32(halves, 16), 16);
}

INLINE Bits odd_signed(__m512i halves) { return (Bits)_mm512_srai_epi32(halves, 16); }

// The lower halves of `even` and the upper ones of `odd`, in the order of memory.
INLINE __m512i together(Bits even, Bits odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)even, (__m512i)odd);
}

INLINE Numbers add_bits(const Numbers& x, Bits even, Bits odd) {
  return {(Floats)((Bits)x.even + even), (Floats)((Bits)x.odd + odd)};
}

INLINE __m512i upper_halves(const Numbers& x) { return together((Bits)x.even >> 16, (Bits)x.odd); }

INLINE __m512i lower_halves(const Numbers& x) { return together((Bits)x.even, (Bits)x.odd << 16); }

// For permutations of two vectors: `first`, `second`, and each pair `step` behind the one before.
INLINE __m512i pairs(int first, int second, int step) {
  alignas(64) int32_t index[kVector];
  for (int i = 0; i < kVector; i++) index[i] = (i % 2 ? second : first) + i / 2 * step;
  return _mm512_load_si512(index);
}

// Numbers whose upper halves are those nearest to x; of two, the even one.
INLINE Floats nearest(Floats x) {
  const __m512i bits = (__m512i)x, most = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  const __m512i below = _mm512_add_epi32(bits, most);
  return (Floats)_mm512_mask_add_epi32(
      below, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), below, one);
}

// With one NaN for all: rounding adds to the bits of a number, and those of the largest would become zero.
INLINE __m512 with_one_nan(__m512 x) {
  constexpr int kBecomesNan = 0x33;  // what is a quiet NaN, and what is a signalling one
  return _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(kBecomesNan), 0);
}

template <bool kWhole>
INLINE Numbers get(const Stored& from, Place<kWhole> at) {
  if (kWhole) prefetch(from, at.start, kGroup, kAhead);
  if (from.format == kFloat) {
    const float* data = static_cast<const float*>(from.data) + at.start;
    const __mmask16 first = mask(at), second = mask(at) >> kVector;
    const __m512 one = with_one_nan(_mm512_maskz_loadu_ps(first, data));
    const __m512 two = with_one_nan(_mm512_maskz_loadu_ps(second, data + kVector));
    return {(Floats)_mm512_permutex2var_ps(one, pairs(0, 2, 4), two),
            (Floats)_mm512_permutex2var_ps(one, pairs(1, 3, 4), two)};
  }
  const __m512i high = halves(from.data, at);
  const Numbers rounded{(Floats)shifted_up(high), (Floats)upper(high)};
  if (from.format != kSplit) return rounded;
  const __m512i low = halves(from.low, at);  // negative where the upper half was rounded up
  return add_bits(rounded, even_signed(low), odd_signed(low));
}

template <bool kWhole>
INLINE void put(const Stored& to, Place<kWhole> at, Numbers x) {
  if (to.format == kFloat) {
    float* data = static_cast<float*>(to.data) + at.start;
    const __m512 even = (__m512)x.even, odd = (__m512)x.odd;
    const __m512 one = _mm512_permutex2var_ps(even, pairs(0, kVector, 1), odd);
    const __m512 two = _mm512_permutex2var_ps(even, pairs(8, kVector + 8, 1), odd);
    _mm512_mask_storeu_ps(data, __mmask16(mask(at)), one);
    _mm512_mask_storeu_ps(data + kVector, __mmask16(mask(at) >> kVector), two);
    return;
  }
  if (to.format == kSplit) {
    store_halves(to.low, at, lower_halves(x));
    x = add_bits(x, Bits{} + 0x8000u, Bits{} + 0x8000u);
  } else if (to.format == kStochastic) {
    const Bits bits = random_bits(to.seed, kPlaces + uint32_t(at.start / 2));
    x = add_bits(x, bits & 0xffffu, bits >> 16);
  } else {
    x = {nearest(x.even), nearest(x.odd)};
  }
  store_halves(to.data, at, upper_halves(x));
}

// x / (sqrt(square) * scale + epsilon) within a unit or two in the last place: the reciprocal is an estimate
// of 14 bits, made twice as exact by a step of Newton's method. A division would keep the unit busy that
// has the square root to do, and both would take longer than memory.
INLINE Floats over_root(Floats x, Floats square, float scale, float epsilon) {
  const Floats divisor = (Floats)_mm512_sqrt_ps((__m512)square) * scale + epsilon;
  const Floats estimate = (Floats)_mm512_rcp14_ps((__m512)divisor);
  const Floats correction = 2.0f - divisor * estimate;  // no number if the divisor is infinite
  const __mmask16 finite =
      _mm512_cmp_ps_mask((__m512)divisor, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return x * (Floats)_mm512_maskz_mul_ps(finite, (__m512)estimate, (__m512)correction);
}

INLINE Floats larger(Floats x, Floats y) { return x > y ? x : y; }

// f on the even numbers of all arguments, then on the odd ones.
template <class F, class... N>
INLINE void each(const F& f, N&... numbers) {
  f(numbers.even...);
  f(numbers.odd...);
}

// The sum of squares, in FP32.
struct Squares {
  Floats sums = {};
  INLINE void add(const Numbers& x) { sums += x.even * x.even + x.odd * x.odd; }
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
    // One NaN for all: rounding adds to the bits of a number, and those of the largest would become zero.
    for (int i = 0; i < kGroup; i++) to.x[i] = to.x[i] == to.x[i] ? to.x[i] : NAN;
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

INLINE float larger(float x, float y) { return x > y ? x : y; }

INLINE float over_root(float x, float square, float scale, float epsilon) {
  return x / (std::sqrt(square) * scale + epsilon);
}

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
