// The result of a product: what is added to the sums, and how they are stored.

#pragma once

#include "pairs.h"

namespace {

inline __attribute__((always_inline)) __m512 widened(__m256i numbers) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

inline __attribute__((always_inline)) __m512i rounded(const __m512* numbers) {
  return (__m512i)_mm512_cvtne2ps_pbh(numbers[1], numbers[0]);
}

// Stores what is present of V vectors of a row.
template <int V>
inline __attribute__((always_inline)) void store(const __m512* numbers, const __mmask16* present,
                                                 float* target) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) _mm512_mask_storeu_ps(target + v * kLanes, present[v], numbers[v]);
}

template <int V>
inline __attribute__((always_inline)) void store(const __m512* numbers, const __mmask16* present,
                                                 bf16* target) {
#pragma GCC unroll 2
  for (int v = 0; v < V; v += 2)
    _mm512_mask_storeu_epi16(target + v * kLanes, _mm512_kunpackw(present[v + 1], present[v]),
                             rounded(numbers + v));
}

// Stores V whole vectors of a row past the caches.
template <int V>
inline __attribute__((always_inline)) void stream(const __m512* numbers, float* target) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) _mm512_stream_ps(target + v * kLanes, numbers[v]);
}

template <int V>
inline __attribute__((always_inline)) void stream(const __m512* numbers, bf16* target) {
#pragma GCC unroll 2
  for (int v = 0; v < V; v += 2)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + v * kLanes), rounded(numbers + v));
}

// A row-major result of `rows` x `columns` numbers.
template <typename Number>
struct Result {
  static constexpr int64_t kStreamed = 4 << 20;  // bytes; a smaller result may be read from the caches

  const float* bias;     // of each column, or null
  const bf16* residual;  // of the result's shape, or null
  bool relu;
  Number* numbers;
  int64_t rows, columns;

  // Whether whole vectors of it are stored past the caches.
  bool streamed() const {
    constexpr int64_t size = sizeof(Number);
    const bool aligned = reinterpret_cast<uintptr_t>(numbers) % 64 == 0 && columns * size % 64 == 0;
    return aligned && rows * columns * size >= kStreamed;
  }

  // Writes R rows of V vectors of sums, past the caches if `past_caches`.
  template <int R, int V>
  inline __attribute__((always_inline)) void write(__m512 (&sums)[R][V], int64_t row, int64_t column,
                                                   bool past_caches) const {
    const int64_t distance = columns;
    __mmask16 present[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      present[v] = static_cast<__mmask16>(first(distance - column - v * kLanes));
    if (bias != nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const __m512 added = _mm512_maskz_loadu_ps(present[v], bias + column + v * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sums[r][v] += added;
      }
    }
    if (residual != nullptr) {
      const bf16* source = residual + row * distance + column;
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
          sums[r][v] += widened(_mm256_maskz_loadu_epi16(present[v],
                                                         source + r * distance + v * kLanes));
    }
    if (relu) {
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
          sums[r][v] = _mm512_max_ps(_mm512_setzero_ps(), sums[r][v]);  // keeps NaN
    }
    Number* target = numbers + row * distance + column;
    if (past_caches && column + V * kLanes <= distance) {
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) stream<V>(sums[r], target + r * distance);
    } else {
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) store<V>(sums[r], present, target + r * distance);
    }
  }
};

}  // namespace
