// Operands of a product, and how they are brought into pairs: two BF16 numbers that follow each other along the
// summed dimension, in 32 bits.

#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

using bf16 = c10::BFloat16;
using pair = uint32_t;

namespace {

// A tile of the result lies in registers while it is summed: 24 of 32 registers.
constexpr int kRows = 6;
constexpr int kVectors = 4;
constexpr int kLanes = 16;
constexpr int kColumns = kVectors * kLanes;

int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// A mask of the first `count` lanes, of 32 at most.
__mmask32 first(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(count, 0, 32)) - 1);
}

// The low or high half of 32 numbers, each in the lower half of 32 bits.
__m512i half(__m512i numbers, bool high) {
  return _mm512_cvtepu16_epi32(high ? _mm512_extracti64x4_epi64(numbers, 1)
                                    : _mm512_castsi512_si256(numbers));
}

// A matrix as it is given: `leading` numbers lie between its rows, or between its columns if transposed.
struct Matrix {
  const bf16* numbers;
  int64_t leading;
  bool transposed;

  const bf16* at(int64_t row, int64_t column) const {
    return numbers + (transposed ? column * leading + row : row * leading + column);
  }
};

// Where a panel of pairs has them: pair p of column 16 g + c is at numbers + g * group + p * next + c.
struct Panel {
  pair* numbers;
  int64_t group, next;
};

// Pair p of a column is (source[2p][column], source[2p + 1][column]), for `depth` rows and `columns` columns;
// what lies beyond them is zero.
void pair_rows(const bf16* source, int64_t leading, int64_t depth, int64_t columns, Panel panel) {
  const __mmask32 present[] = {first(columns), first(columns - 2 * kLanes)};
  for (int64_t p = 0; p < blocks(depth, 2); p++, source += 2 * leading) {
    const bool has_second = 2 * p + 1 < depth;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const int64_t lane = i * 2 * kLanes;
      const __m512i low = _mm512_maskz_loadu_epi16(present[i], source + lane);
      const __m512i high =
          _mm512_maskz_loadu_epi16(has_second ? present[i] : 0, source + leading + lane);
#pragma GCC unroll 2
      for (int upper = 0; upper < 2; upper++)
        _mm512_store_si512(panel.numbers + (2 * i + upper) * panel.group + p * panel.next,
                           _mm512_or_si512(half(low, upper),
                                           _mm512_slli_epi32(half(high, upper), 16)));
    }
  }
}

// Transposes 16 x 16 pairs.
inline __attribute__((always_inline)) void transpose(__m512i (&rows)[kLanes]) {
  __m512i mixed[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    mixed[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    mixed[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    mixed[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    mixed[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    mixed[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    mixed[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(mixed[i + 4], mixed[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(mixed[i + 4], mixed[i + 12], 0xdd);
  }
}

// The same from the transposed source: pair p of a column is (source[column][2p], source[column][2p + 1]).
void pair_columns(const bf16* source, int64_t leading, int64_t depth, int64_t columns,
                  Panel panel) {
  const int64_t pairs = blocks(depth, 2);
  for (int64_t lane = 0; lane < kColumns; lane += kLanes, source += kLanes * leading) {
    for (int64_t p = 0; p < pairs; p += kLanes) {
      const __mmask32 present = first(depth - 2 * p);
      __m512i rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        rows[i] = _mm512_maskz_loadu_epi16(lane + i < columns ? present : 0,
                                           source + i * leading + 2 * p);
      transpose(rows);
      pair* target = panel.numbers + lane / kLanes * panel.group + p * panel.next;
      const int64_t count = pairs - p;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        if (i < count) _mm512_store_si512(target + i * panel.next, rows[i]);
    }
  }
}

// The left matrix, as a tile reads it: pair p of row r of tile i is at numbers + i * tile + r * row + p * next.
struct Left {
  const bf16* numbers;
  int64_t tile, row, next;
};

// How many there are in a left matrix that is brought into tiles.
int64_t pairs_of_left(int64_t rows, int64_t depth) {
  return blocks(rows, kRows) * kRows * blocks(depth, 2);
}

// The left matrix in tiles of pairs, from a transposed one; `tiles` holds them.
Left paired_left(const Matrix& matrix, int64_t rows, int64_t depth, pair* tiles) {
  constexpr int64_t kNear = 32;  // pairs whose cache lines, shared by several tiles, are still near
  const int64_t pairs = blocks(depth, 2);
  at::parallel_for(0, blocks(rows, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t from = 0; from < pairs; from += kNear)
      for (int64_t tile = begin; tile < end; tile++) {
        const auto present = static_cast<__mmask16>(first(std::min<int64_t>(kRows, rows - tile * kRows)));
        for (int64_t p = from; p < std::min(pairs, from + kNear); p++) {
          const bf16* even = matrix.at(tile * kRows, 2 * p);
          const __mmask16 paired = 2 * p + 1 < depth ? present : 0;
          const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, even));
          const __m512i high =
              _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(paired, even + matrix.leading));
          _mm512_mask_storeu_epi32(tiles + (tile * pairs + p) * kRows,
                                   static_cast<__mmask16>(first(kRows)),
                                   _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
  });
  return {reinterpret_cast<const bf16*>(tiles), 2 * pairs * kRows, 2, 2 * kRows};
}

}  // namespace
