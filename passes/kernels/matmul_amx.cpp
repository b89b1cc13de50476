// Products of BF16 matrices by the matrix unit (AMX), summed in FP32 and rounded once, or not.
//
// The unit multiplies a tile of 16 rows and 16 pairs by one of 16 pairs and 16 columns. The left matrix is
// brought into such tiles first; so is the right one, in panels of 64 columns, or each of its panels by the
// thread that multiplies it, where that is the only one to do so. Two by two tiles of the result are summed at
// a time: half a panel stays in the first-level cache while all rows of a block, which lie in the second-level
// one, are multiplied by it.

#include <c10/core/CPUAllocator.h>

#include <limits>
#include <memory>

#include "result.h"

namespace {

constexpr int kSide = 16;              // rows of a tile, and columns of the right matrix in it
constexpr int kTile = kSide * kLanes;  // pairs in a tile
constexpr int kBlock = 2 * kSide;      // rows and columns that are summed at a time
constexpr int64_t kLine = 32;          // BF16 numbers in a cache line, or in a row of a tile

// With more pairs half a panel would leave the first-level cache, with fewer sums would come and go too often.
constexpr int64_t kDepth = 128;                // pairs that are summed before the next rows
constexpr int64_t kPanel = kDepth * kColumns;  // pairs in a panel, as far as it is summed in one go
constexpr int64_t kNumbersOfBlock = 1 << 18;   // of the left matrix: half a megabyte
// Where not all pairs are summed in one go, sums take room, too.
constexpr int64_t kLeastRows = 128, kMostRows = 512;
constexpr int64_t kFewUnits = 4;  // of kBlock rows: a panel would be fetched for too little work

int64_t up_to(int64_t length, int64_t block) { return blocks(length, block) * block; }

// Tells the unit that all tiles are whole, and puts back what was set before.
class Tiles {
 public:
  Tiles() {
    is_used_by_instruction(before_);
    _tile_storeconfig(&before_);
    Configuration whole{};
    whole.palette = 1;
    for (int tile = 0; tile < 8; tile++) whole.bytes[tile] = 64, whole.rows[tile] = kSide;
    load(whole);
  }
  ~Tiles() { load(before_); }

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);

  static void load(const Configuration& configuration) {
    is_used_by_instruction(configuration);
    _tile_loadconfig(&configuration);
  }

  // All of it is to be in memory: GCC's intrinsics tell the compiler of eight bytes.
  static void is_used_by_instruction(const Configuration& configuration) {
    asm volatile("" ::"r"(&configuration) : "memory");
  }

  Configuration before_{};
};

// The left matrix in tiles. Those that are summed in one go follow each other, and behind them come those of
// the next rows: what lies in the cache together comes from one piece of memory.
struct Tiled {
  pair* numbers;
  int64_t tall, deep;  // rows of tiles, and pairs that are summed in one go

  static int64_t height(int64_t rows) { return up_to(rows, kBlock) / kSide; }
  static int64_t depth(int64_t pairs) { return std::min(kDepth, up_to(pairs, kSide)); }
  static int64_t size(int64_t rows, int64_t pairs) {
    return blocks(pairs, kDepth) * height(rows) * depth(pairs) * kSide;
  }

  pair* tile(int64_t row, int64_t start) const {
    return numbers + (start / kDepth * tall + row / kSide) * deep * kSide;
  }
};

// Brings numbers [begin, depth) of 16 rows of a row-major matrix into tiles; zero where there are none.
void tiles_of_rows(const Matrix& matrix, int64_t row, int64_t rows, int64_t begin, int64_t depth,
                   pair* target) {
  for (; begin < depth; begin += kLine, target += kTile) {
    const __mmask32 present = first(depth - begin);
#pragma GCC unroll 16
    for (int r = 0; r < kSide; r++)
      _mm512_store_si512(target + r * kLanes,
                         _mm512_maskz_loadu_epi16(row + r < rows ? present : 0,
                                                  matrix.at(row + r, begin)));
  }
}

// The same of a column-major one.
void tiles_of_columns(const Matrix& matrix, int64_t row, int64_t rows, int64_t begin, int64_t depth,
                      pair* target) {
  const auto present = static_cast<__mmask16>(first(std::min<int64_t>(kSide, rows - row)));
  for (; begin < depth; begin += kLine, target += kTile) {
    __m512i pairs[kLanes];
#pragma GCC unroll 16
    for (int p = 0; p < kLanes; p++) {
      const int64_t even = begin + 2 * p;
      const __m512i low = _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(even < depth ? present : 0, matrix.at(row, even)));
      const __m512i high = _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(even + 1 < depth ? present : 0, matrix.at(row, even + 1)));
      pairs[p] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    transpose(pairs);
#pragma GCC unroll 16
    for (int r = 0; r < kSide; r++) _mm512_store_si512(target + r * kLanes, pairs[r]);
  }
}

// The left matrix in tiles; `tiles` holds them.
Tiled tiled(const Matrix& matrix, int64_t rows, int64_t depth, pair* tiles) {
  const int64_t pairs = blocks(depth, 2);
  const Tiled tiled{tiles, Tiled::height(rows), Tiled::depth(pairs)};
  at::parallel_for(0, tiled.tall, 4, [&](int64_t begin, int64_t end) {
    const auto bring = matrix.transposed ? tiles_of_columns : tiles_of_rows;
    for (int64_t start = 0; start < pairs; start += kDepth)
      for (int64_t row = begin * kSide; row < end * kSide; row += kSide)
        bring(matrix, row, rows, 2 * start, std::min(depth, 2 * (start + kDepth)),
              tiled.tile(row, start));
  });
  return tiled;
}

// What a thread works in.
struct Scratch {
  alignas(64) pair panel[kPanel];
  alignas(64) float sums[kMostRows * kColumns];  // of a block that are not complete yet
  alignas(64) float last[4 * kTile];                // that are
};

// A part of a matrix that is to be in the second-level cache soon.
struct Fetching {
  const bf16* line;
  int64_t leading, lines, numbers, number = 0;

  int64_t all() const { return lines * blocks(numbers, kLine); }

  // Inline, since GCC drops calls of functions that do nothing but fetch.
  inline __attribute__((always_inline)) void some(int64_t count) {
    for (; count > 0 && lines > 0; count--) {
      _mm_prefetch(line + number, _MM_HINT_T1);
      number += kLine;
      if (number >= numbers) number = 0, line += leading, lines--;
    }
  }
};

template <typename Number>
struct Product {
  Tiled left;
  Matrix right;
  pair* panels;  // all of the right matrix in tiles, where each is needed more than once; else null
  Result<Number> result;
  int64_t depth;
  bool streamed;

  // The part of the right matrix that begins at pair `start` and belongs to one panel.
  struct Part {
    int64_t start, column;
  };

  int64_t pairs() const { return blocks(depth, 2); }
  int64_t across() const { return blocks(result.columns, kColumns); }
  int64_t numbers_in(Part part) const { return std::min(2 * kDepth, depth - 2 * part.start); }
  int64_t wide(Part part) const { return std::min<int64_t>(kColumns, result.columns - part.column); }

  // Brings it into tiles, the last of them filled up with zeros.
  void into_tiles(Part part, pair* panel) const {
    const int64_t numbers = numbers_in(part), present = blocks(numbers, 2);
    const auto pair_up = right.transposed ? pair_columns : pair_rows;
    pair_up(right.at(2 * part.start, part.column), right.leading, numbers, wide(part),
            {panel, kDepth * kLanes, kLanes});
    for (int64_t group = 0; group < kVectors; group++)
      for (int64_t p = present; p < up_to(present, kSide); p++)
        _mm512_store_si512(panel + (group * kDepth + p) * kLanes, _mm512_setzero_si512());
  }

  // Where it is in tiles already.
  pair* brought(Part part) const {
    return panels + (part.column / kColumns * blocks(pairs(), kDepth) + part.start / kDepth) * kPanel;
  }

  Fetching fetching(Part part) const {
    if (panels != nullptr)
      return {reinterpret_cast<const bf16*>(brought(part)), 0, 1, 2 * kPanel};
    const bf16* source = right.at(2 * part.start, part.column);
    return right.transposed ? Fetching{source, right.leading, wide(part), numbers_in(part)}
                            : Fetching{source, right.leading, numbers_in(part), wide(part)};
  }

  // Sums two by two tiles over `count` tiles of depth; begins with `sums` unless it is the first time.
  // Meanwhile it fetches: all lines at once would keep the unit waiting.
  static void multiply(const pair* upper, const pair* lower, const pair* one, const pair* other,
                       int64_t count, bool is_first, const float* sums, float* target,
                       Fetching& fetch, int64_t lines) {
    constexpr int64_t row = kLanes * sizeof(pair);
    asm volatile("" ::: "memory");  // which tiles are loaded from, as GCC's intrinsics do not tell
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, row);
      _tile_loadd(1, sums + kTile, row);
      _tile_loadd(2, sums + 2 * kTile, row);
      _tile_loadd(3, sums + 3 * kTile, row);
    }
    for (int64_t i = 0; i < count; i++) {
      _tile_loadd(6, one + i * kTile, row);
      _tile_loadd(4, upper + i * kTile, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, other + i * kTile, row);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lower + i * kTile, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      fetch.some(lines);
    }
    _tile_stored(0, target, row);
    _tile_stored(1, target + kTile, row);
    _tile_stored(2, target + 2 * kTile, row);
    _tile_stored(3, target + 3 * kTile, row);
  }

  // Writes two by two tiles of sums to the result.
  void finish(const float* sums, int64_t row, int64_t column) const {
    const int64_t count = std::min<int64_t>(kBlock, result.rows - row);
    for (int64_t r = 0; r < count; r++) {
      const float* source = sums + r / kSide * 2 * kTile + r % kSide * kLanes;
      __m512 numbers[1][2] = {{_mm512_load_ps(source), _mm512_load_ps(source + kTile)}};
      result.template write<1, 2>(numbers, row + r, column, streamed);
    }
  }

  // The panels [begin, end) of the result's blocks of `height` rows, counted along one block after another.
  void compute(int64_t begin, int64_t end, int64_t height) const {
    thread_local const auto scratch = std::make_unique<Scratch>();
    const Tiles tiles;
    for (int64_t index = begin; index < end; index++) {
      const int64_t from = index / across() * height, to = std::min(result.rows, from + height);
      Part part{0, index % across() * kColumns};
      const int64_t sides = blocks(wide(part), kBlock), down = blocks(to - from, kBlock);
      do {  // once at least: a sum of nothing is zero
        const pair* panel = panels == nullptr ? scratch->panel : brought(part);
        if (panels == nullptr) into_tiles(part, scratch->panel);
        Part next{part.start + kDepth, part.column};
        const bool is_first = part.start == 0, is_last = next.start >= pairs();
        if (is_last) next = {0, (index + 1) % across() * kColumns};
        Fetching fetch{};
        if (!is_last || index + 1 < end) fetch = fetching(next);
        const int64_t count = blocks(numbers_in(part), kLine);
        const int64_t lines = blocks(fetch.all(), std::max<int64_t>(1, sides * down * count));
        float* sums = scratch->sums;
        for (int64_t side = 0; side < sides; side++) {
          const pair* one = panel + side * 2 * kDepth * kLanes;
          for (int64_t row = from; row < to; row += kBlock) {
            float* target = is_last ? scratch->last : sums;
            multiply(left.tile(row, part.start), left.tile(row + kSide, part.start), one,
                     one + kDepth * kLanes, count, is_first, sums, target, fetch, lines);
            if (is_last) finish(target, row, part.column + side * kBlock);
            if (!(is_first && is_last)) sums += 4 * kTile;
          }
        }
        part.start += kDepth;
      } while (part.start < pairs());
    }
    _mm_sfence();  // who reads the result next sees what was streamed
  }
};

// How many rows a block has: as many as fit the cache, or fewer that no thread is idle.
int64_t height_of_block(int64_t rows, int64_t columns, int64_t depth) {
  const int64_t fitting = kNumbersOfBlock / std::max<int64_t>(1, depth) / kBlock * kBlock;
  const int64_t limit = depth <= 2 * kDepth ? kNumbersOfBlock : kMostRows;
  const int64_t most = std::clamp(fitting, kLeastRows, limit);
  const int64_t units = blocks(rows, kBlock), least_down = blocks(rows, most);
  int64_t best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t down = least_down; down <= std::max(least_down, units / kFewUnits); down++) {
    const int64_t height = blocks(units, down);
    const int64_t panels = blocks(units, height) * blocks(columns, kColumns);
    const double longest = static_cast<double>(blocks(panels, at::get_num_threads()) * height);
    if (longest < 0.95 * least) best = height, least = longest;
  }
  return best * kBlock;
}

template <typename Number>
void multiply(const Matrix& left, const Matrix& right, const Result<Number>& result, int64_t depth) {
  const int64_t height = height_of_block(result.rows, result.columns, depth);
  const int64_t down = blocks(result.rows, height), across = blocks(result.columns, kColumns);
  const int64_t parts = blocks(blocks(depth, 2), kDepth);
  const auto memory = [](int64_t pairs) {
    return c10::GetCPUAllocator()->allocate(sizeof(pair) * pairs);
  };
  const auto for_left = memory(Tiled::size(result.rows, blocks(depth, 2)));
  const auto for_right = memory(down > 1 ? across * parts * kPanel : 0);
  const Product<Number> product{
      tiled(left, result.rows, depth, static_cast<pair*>(for_left.get())), right,
      static_cast<pair*>(for_right.get()), result, depth, result.streamed()};
  if (product.panels != nullptr)
    at::parallel_for(0, across * parts, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const typename Product<Number>::Part part{i % parts * kDepth, i / parts * kColumns};
        product.into_tiles(part, product.brought(part));
      }
    });
  at::parallel_for(0, down * across, 1,
                   [&](int64_t begin, int64_t end) { product.compute(begin, end, height); });
}

}  // namespace

// The process must have been given the unit by the system before.
#include "matmul_interface.h"  // by multiply()
