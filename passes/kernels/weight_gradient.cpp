// The weight gradient of a linear layer from BF16 operands, accumulated in FP32 and rounded once, or not.
//
// What batch rows 2p and 2p + 1 hold of a column is one pair of 32 bits, which a dot-product instruction
// multiplies and adds at once. Both operands are brought into panels of such pairs; then no other number
// is read twice from beyond the caches, and the result, far larger than either, is written once, past them.

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

constexpr int64_t kDepth = 512;      // pairs that are summed before the next tile: a panel of 128 KiB
constexpr int64_t kTilesDown = 16;   // tiles that share a panel of x while it lies in the caches
constexpr int64_t kTilesAcross = 4;
constexpr int64_t kStreamed = 4 << 20;  // bytes; a smaller result may be read from the caches

using Tile = __m512[kRows][kVectors];

int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// A mask of the first `count` lanes, of 32 at most.
__mmask32 first(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(count, 0, 32)) - 1);
}

// panels[column / width][p][column % width] = (source[2p][column], source[2p + 1][column]); what lies
// beyond the source is zero.
void pair_rows(const bf16* source, int64_t rows, int64_t columns, int64_t width, pair* panels) {
  const int64_t pairs = blocks(rows, 2);
  at::parallel_for(0, blocks(columns, width), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      pair* target = panels + panel * pairs * width;
      for (int64_t p = 0; p < pairs; p++, target += width) {
        const bf16* even = source + 2 * p * columns;
        const bf16* odd = even + columns;
        for (int64_t lane = 0; lane < width; lane += kLanes) {
          const int64_t column = panel * width + lane;
          const auto present = static_cast<__mmask16>(first(columns - column));
          const __mmask16 paired = 2 * p + 1 < rows ? present : 0;
          const __m512i low =
              _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, even + column));
          const __m512i high =
              _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(paired, odd + column));
          _mm512_mask_storeu_epi32(target + lane, static_cast<__mmask16>(first(width - lane)),
                                   _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
    }
  });
}

// tile += gradient^T x, over `pairs` pairs of rows of one panel of each.
inline __attribute__((always_inline)) void multiply(const pair* gradient, const pair* x,
                                                    int64_t pairs, Tile& tile) {
  for (int64_t p = 0; p < pairs; p++, gradient += kRows, x += kColumns) {
    __m512i columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) columns[v] = _mm512_loadu_si512(x + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(gradient[r]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        tile[r][v] = _mm512_dpbf16_ps(tile[r][v], (__m512bh)row, (__m512bh)columns[v]);
    }
  }
}

// Stores the first `columns` numbers of a row of a tile, past the caches if `streamed`: then all are there.
void store(const __m512 (&row)[kVectors], int64_t columns, bool streamed, float* target) {
  for (int v = 0; v < kVectors; v++, target += kLanes) {
    if (streamed)
      _mm512_stream_ps(target, row[v]);
    else
      _mm512_mask_storeu_ps(target, static_cast<__mmask16>(first(columns - v * kLanes)), row[v]);
  }
}

void store(const __m512 (&row)[kVectors], int64_t columns, bool streamed, bf16* target) {
  for (int v = 0; v < kVectors; v += 2, target += 2 * kLanes) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(row[v + 1], row[v]);
    if (streamed)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target), rounded);
    else
      _mm512_mask_storeu_epi16(target, first(columns - v * kLanes), rounded);
  }
}

// The panels of both operands, and where their product goes.
template <typename Number>
struct Product {
  const pair* gradient;
  const pair* x;
  Number* result;
  int64_t pairs, out, in;
  bool streamed;

  // Tiles (down, across) for all in [down, down_end) x [across, across_end), summed over all pairs.
  void tiles(int64_t down, int64_t down_end, int64_t across, int64_t across_end,
             __m512* sums) const {
    int64_t start = 0;
    do {  // once at least: without rows the sums are zero
      __m512* sum = sums;
      for (int64_t j = across; j < across_end; j++)
        for (int64_t i = down; i < down_end; i++, sum += kRows * kVectors)
          tile(i, j, start, sum);
    } while ((start += kDepth) < pairs);
  }

  void tile(int64_t i, int64_t j, int64_t start, __m512* sum) const {
    Tile numbers;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        numbers[r][v] = start > 0 ? sum[r * kVectors + v] : _mm512_setzero_ps();
    multiply(gradient + (i * pairs + start) * kRows, x + (j * pairs + start) * kColumns,
             std::min(kDepth, pairs - start), numbers);
    if (start + kDepth < pairs) {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[r * kVectors + v] = numbers[r][v];
      return;
    }
    const bool whole = (j + 1) * kColumns <= in;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; r++) {
      const int64_t row = i * kRows + r;
      if (row >= out) continue;
      store(numbers[r], in - j * kColumns, streamed && whole, result + row * in + j * kColumns);
    }
  }

  void multiply_all() const {
    const int64_t tiles_down = blocks(out, kRows), tiles_across = blocks(in, kColumns);
    at::parallel_for(0, tiles_down, 1, [&](int64_t begin, int64_t end) {
      static thread_local __m512 sums[kTilesDown * kTilesAcross * kRows * kVectors];
      for (int64_t across = 0; across < tiles_across; across += kTilesAcross)
        for (int64_t down = begin; down < end; down += kTilesDown)
          tiles(down, std::min(end, down + kTilesDown), across,
                std::min(tiles_across, across + kTilesAcross), sums);
      _mm_sfence();  // who reads the result next sees what was streamed
    });
  }
};

template <typename Number>
void weight_gradient(const bf16* gradient, const bf16* x, Number* result, int64_t batch,
                     int64_t out, int64_t in, pair* gradient_panels, pair* x_panels) {
  pair_rows(gradient, batch, out, kRows, gradient_panels);
  pair_rows(x, batch, in, kColumns, x_panels);
  constexpr int64_t size = sizeof(Number);
  const bool aligned = reinterpret_cast<uintptr_t>(result) % 64 == 0 && in * size % 64 == 0;
  Product<Number>{gradient_panels, x_panels,           result,
                  blocks(batch, 2), out, in, aligned && out * in * size >= kStreamed}
      .multiply_all();
}

}  // namespace

// result[out][in] = gradient^T x, for gradient[batch][out] and x[batch][in], all row-major.
// The panels hold, in pairs, half the batch times the columns, each rounded up: the batch to an even number,
// the columns to rows_of_tile() and columns_of_tile().
extern "C" void weight_gradient_bf16(const bf16* gradient, const bf16* x, bf16* result,
                                     int64_t batch, int64_t out, int64_t in,
                                     pair* gradient_panels, pair* x_panels) {
  weight_gradient(gradient, x, result, batch, out, in, gradient_panels, x_panels);
}

extern "C" void weight_gradient_fp32(const bf16* gradient, const bf16* x, float* result,
                                     int64_t batch, int64_t out, int64_t in,
                                     pair* gradient_panels, pair* x_panels) {
  weight_gradient(gradient, x, result, batch, out, in, gradient_panels, x_panels);
}

extern "C" int64_t rows_of_tile() { return kRows; }
extern "C" int64_t columns_of_tile() { return kColumns; }
