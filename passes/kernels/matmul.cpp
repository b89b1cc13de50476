// Products of BF16 matrices, summed in FP32 and rounded once, or not.
//
// Two numbers that follow each other along the summed dimension are one pair of 32 bits, which a dot-product
// instruction multiplies and adds at once. A panel of the right matrix, 64 columns wide, is brought into
// such pairs by the thread that multiplies it; all rows of a block are multiplied by it while it lies in the
// second-level cache, and meanwhile what comes next is fetched. A row-major left matrix has its pairs already.

#include <c10/core/CPUAllocator.h>

#include <limits>
#include <memory>

#include "result.h"

using unaligned_pair [[gnu::aligned(2), gnu::may_alias]] = uint32_t;
using half_pair [[gnu::may_alias]] = uint16_t;

namespace {

constexpr int64_t kDepth = 512;  // pairs that are summed before the next tile: a panel of 128 KiB
constexpr int64_t kMostTiles = 128;  // tiles, one below the other, that share a panel
constexpr int64_t kLeastTiles = 8;   // with fewer, bringing a panel into pairs would take too long
constexpr int64_t kLine = 32;           // BF16 numbers in a cache line

// What a thread works in, both in its second-level cache.
struct Scratch {
  alignas(64) pair panel[kDepth * kColumns];
  __m512 sums[kMostTiles * kRows * kVectors];  // of a block that are not complete yet
};

template <typename Number>
struct Product {
  Left left;
  Matrix right;
  Result<Number> result;
  int64_t depth;
  bool streamed;

  int64_t across() const { return blocks(result.columns, kColumns); }

  // Adds one pair of each row times one of each column; of the row's pair only as many bits as Bits has.
  template <typename Bits, int R>
  inline __attribute__((always_inline)) void multiply(const bf16* factors, const pair* panel,
                                                      __m512 (&sums)[R][kVectors]) const {
    __m512i across[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) across[v] = _mm512_load_si512(panel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const auto* bits = reinterpret_cast<const Bits*>(factors + r * left.row);
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(*bits));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)factor, (__m512bh)across[v]);
    }
  }

  // One tile of R rows: goes on from `sums`, or begins; ends with the result, or with `sums`.
  template <int R>
  void tile_of(int64_t row, int64_t column, int64_t start, const pair* panel, __m512* sums) const {
    __m512 numbers[R][kVectors] = {};
    const int64_t pairs = blocks(depth, 2), end = std::min(pairs, start + kDepth);
    const bool odd = end > depth / 2;
    const bf16* factors = left.numbers + row / kRows * left.tile + start * left.next;
    for (int64_t p = start; p < end - odd; p++, panel += kColumns, factors += left.next)
      multiply<unaligned_pair>(factors, panel, numbers);
    if (odd) multiply<half_pair>(factors, panel, numbers);  // what follows is not this row's
    if (start > 0) {
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) numbers[r][v] += sums[r * kVectors + v];
    }
    if (end == pairs) return result.template write<R, kVectors>(numbers, row, column, streamed);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[r * kVectors + v] = numbers[r][v];
  }

  void tile(int64_t row, int64_t column, int64_t start, const pair* panel, __m512* sums) const {
    switch (std::min<int64_t>(kRows, result.rows - row)) {
      case 6: return tile_of<6>(row, column, start, panel, sums);
      case 5: return tile_of<5>(row, column, start, panel, sums);
      case 4: return tile_of<4>(row, column, start, panel, sums);
      case 3: return tile_of<3>(row, column, start, panel, sums);
      case 2: return tile_of<2>(row, column, start, panel, sums);
      default: return tile_of<1>(row, column, start, panel, sums);
    }
  }

  // The part of the right matrix that begins at pair `start` and belongs to one panel.
  struct Part {
    int64_t start, column;
  };

  void into_pairs(Part part, pair* panel) const {
    const int64_t count = std::min(2 * kDepth, depth - 2 * part.start);
    const auto pair_up = right.transposed ? pair_columns : pair_rows;
    pair_up(right.at(2 * part.start, part.column), right.leading, count, result.columns - part.column,
            {panel, kLanes, kColumns});
  }

  // Fetches the share of a part, [begin, end) of `of`, that is to be in the second-level cache soon.
  // Inline, since GCC drops calls of functions that do nothing but fetch.
  inline __attribute__((always_inline)) void fetch(Part part, int64_t begin, int64_t end,
                                                   int64_t of) const {
    const int64_t deep = std::min(2 * kDepth, depth - 2 * part.start);
    const int64_t wide = std::min<int64_t>(kColumns, result.columns - part.column);
    const int64_t lines = right.transposed ? wide : deep;
    const int64_t numbers = right.transposed ? deep : wide;
    const bf16* source = right.at(2 * part.start, part.column);
    for (int64_t line = lines * begin / of; line < lines * end / of; line++)
      for (int64_t number = 0; number < numbers; number += kLine)
        _mm_prefetch(source + line * right.leading + number, _MM_HINT_T1);
  }

  // The panels [begin, end) of the result's blocks of `height` tiles, counted along one block after another.
  void panels(int64_t begin, int64_t end, int64_t height) const {
    thread_local const auto scratch = std::make_unique<Scratch>();
    pair* const panel = scratch->panel;
    __m512* const sums = scratch->sums;
    const int64_t pairs = blocks(depth, 2);
    for (int64_t index = begin; index < end; index++) {
      const int64_t from = index / across() * height * kRows;
      const int64_t to = std::min(result.rows, from + height * kRows), tiles = blocks(to - from, kRows);
      int64_t start = 0;
      do {  // once at least: a sum of nothing is zero
        const Part part{start, index % across() * kColumns};
        into_pairs(part, panel);
        Part next{start + kDepth, part.column};
        bool more = true;
        if (next.start >= pairs) {
          next = {0, (index + 1) % across() * kColumns};
          more = index + 1 < end;
        }
        for (int64_t i = 0; i < tiles; i++) {
          if (more) fetch(next, i, i + 1, tiles);
          tile(from + i * kRows, part.column, start, panel, sums + i * kRows * kVectors);
        }
        start += kDepth;
      } while (start < pairs);
    }
    _mm_sfence();  // who reads the result next sees what was streamed
  }

  // How many tiles high a block is: as many as may share a panel, or fewer that no thread is idle.
  int64_t height_of_block(int64_t threads) const {
    const int64_t tiles = blocks(result.rows, kRows);
    int64_t best = std::min(tiles, kMostTiles);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t down = blocks(tiles, kMostTiles); down <= std::max<int64_t>(1, tiles / kLeastTiles);
         down++) {
      const int64_t height = blocks(tiles, down), panels = blocks(tiles, height) * across();
      const double longest = static_cast<double>(blocks(panels, threads) * height);
      if (longest < 0.95 * least) best = height, least = longest;
    }
    return best;
  }

  void compute() const {
    const int64_t height = height_of_block(at::get_num_threads());
    const int64_t panels_in_all = blocks(blocks(result.rows, kRows), height) * across();
    at::parallel_for(0, panels_in_all, 1, [&](int64_t begin, int64_t end) {
      panels(begin, end, height);
    });
  }
};

template <typename Number>
void multiply(const Matrix& left, const Matrix& right, const Result<Number>& result, int64_t depth) {
  const auto tiles = c10::GetCPUAllocator()->allocate(
      left.transposed ? sizeof(pair) * pairs_of_left(result.rows, depth) : 0);
  const Left prepared = left.transposed
                            ? paired_left(left, result.rows, depth, static_cast<pair*>(tiles.get()))
                            : Left{left.numbers, kRows * left.leading, left.leading, 2};
  Product<Number>{prepared, right, result, depth, result.streamed()}.compute();
}

}  // namespace

#include "matmul_interface.h"  // by multiply()
