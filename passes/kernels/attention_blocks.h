// What attention and its backward share: the call, scores and exponentials of a block, and its products.

#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

#include <limits>

#include "result.h"

namespace {

constexpr int64_t kQueries = 64;  // of a block
constexpr int64_t kKeys = 256;    // of a block: its scores stay in the second-level cache
constexpr int64_t kStep = 2 * kLanes;  // keys that are transposed at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t up_to(int64_t length, int64_t block) { return blocks(length, block) * block; }

// What a call reads and writes, as passes/native_attention.py describes it; all distances are in numbers.

// A tensor (batch, heads, length, width), whose rows are contiguous.
struct Heads {
  bf16* numbers;
  int64_t batch, head, row;
};

// A table (batch, heads, queries, keys) of FP32 numbers, or with one column; a mask that is not there has none.
struct Table {
  float* numbers;
  int64_t batch, head, query, key;
};

struct Sizes {
  int64_t batch, heads, queries, keys, width, causal;
  double scale;

  // Between rows of pairs as wide as a head.
  int64_t wide() const { return up_to(width, kColumns); }
};

struct Call {
  Sizes sizes;
  Table mask, logsumexp;
  Heads query, key, value, out;
  Heads d_out, d_query, d_key, d_value;  // of the backward alone
};

// e^x as a power of two by a polynomial, with a relative error of at most 1e-7 |x|; zero where it would be
// subnormal, as those take the processor a hundred times as long.
inline __attribute__((always_inline)) __m512 exp(__m512 x) {
  x *= _mm512_set1_ps(1.44269504f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);  // keeps NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = x - whole;
  __m512 power = _mm512_set1_ps(1.54035304e-4f);
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.33335581e-3f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.61812911e-3f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.55041087e-2f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.40226507e-1f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93147181e-1f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1));
  return _mm512_maskz_scalef_ps(normal, power, whole);
}

// One head of one sequence.
struct Head {
  const Sizes& sizes;
  int64_t batch, head;

  bf16* row(const Heads& tensor, int64_t row) const {
    return tensor.numbers + batch * tensor.batch + head * tensor.head + row * tensor.row;
  }
  float* row(const Table& table, int64_t query) const {
    return table.numbers + batch * table.batch + head * table.head + query * table.query;
  }
  // How many keys the queries up to `end` may see.
  int64_t seen(int64_t end) const {
    return sizes.causal ? std::min(end, sizes.keys) : sizes.keys;
  }
};

// How the products of queries and keys of a block become scores: scaled and masked.
struct Scores {
  const float* mask;  // of the first query and key; null where nothing is added
  int64_t mask_query, mask_key;
  int64_t before;  // so many queries come before the first key; they do not see it
  int64_t queries;
  bool causal;
  float scale;

  Scores(const Head& head, const Table& mask, int64_t query, int64_t key)
      : mask(mask.numbers == nullptr ? nullptr : head.row(mask, query) + key * mask.key),
        mask_query(mask.query),
        mask_key(mask.key),
        before(key - query),
        queries(head.sizes.queries - query),
        causal(head.sizes.causal),
        scale(static_cast<float>(head.sizes.scale)) {}

  // Whether any of `keys` of them is masked.
  bool masked(int64_t keys) const { return mask != nullptr || (causal && before + keys > 1); }

  // Of 16 queries from `lane` on and one key: minus infinity where they may not see it.
  template <bool kMasked>
  inline __attribute__((always_inline)) __m512 at(const float* products, int64_t lane,
                                                  int64_t key) const {
    __m512 scores = _mm512_load_ps(products + key * kQueries + lane) * _mm512_set1_ps(scale);
    if (!kMasked) return scores;
    if (mask != nullptr) scores += added(lane, key);
    if (!causal) return scores;
    const __m512i query = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i hidden = _mm512_set1_epi32(static_cast<int>(before + key - lane));
    return _mm512_mask_mov_ps(scores, _mm512_cmplt_epi32_mask(query, hidden),
                              _mm512_set1_ps(-kInfinity));
  }

  inline __attribute__((always_inline)) __m512 added(int64_t lane, int64_t key) const {
    const float* source = mask + lane * mask_query + key * mask_key;
    if (mask_query == 0) return _mm512_set1_ps(*source);
    alignas(64) float numbers[kLanes] = {};
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, queries - lane); i++)
      numbers[i] = source[i * mask_query];
    return _mm512_load_ps(numbers);
  }
};

// Two rows of 16 numbers as pairs.
inline __attribute__((always_inline)) __m512i paired(__m512 even, __m512 odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Writes 16 numbers that `of_row` gives for each of 32 rows, as far as there are, to 16 rows of `target`.
template <typename OfRow>
inline __attribute__((always_inline)) void transposed(const OfRow& of_row, int64_t begin, int64_t end,
                                                      bf16* target) {
  __m512i pairs[kLanes];
  if (begin + kStep <= end) {
#pragma GCC unroll 2
    for (int p = 0; p < kLanes; p++) pairs[p] = paired(of_row(begin + 2 * p), of_row(begin + 2 * p + 1));
  } else {
    const __m512 none = _mm512_setzero_ps();
    for (int64_t p = 0, row = begin; p < kLanes; p++, row += 2)
      pairs[p] = paired(row < end ? of_row(row) : none, row + 1 < end ? of_row(row + 1) : none);
  }
  transpose(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) _mm512_store_si512(target + i * kKeys, pairs[i]);
}

inline __attribute__((always_inline)) void store_rounded(__m512 numbers, bf16* target) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh(numbers));
}

// Rows of a matrix of any width in pairs of rows, 64 columns at a time; `leading` pairs lie between them.
void pairs_of_rows(const bf16* source, int64_t distance, int64_t rows, int64_t columns, pair* target,
                   int64_t leading) {
  for (int64_t column = 0; column < columns; column += kColumns)
    pair_rows(source + column, distance, rows, std::min<int64_t>(kColumns, columns - column),
              {target + column, kLanes, leading});
}

// Columns that are given as rows, at most kQueries, in pairs.
void pairs_of_columns(const bf16* source, int64_t distance, int64_t depth, int64_t columns, pair* target) {
  for (int64_t column = 0; column < columns; column += kColumns)
    pair_columns(source + column * distance, distance, depth, std::min<int64_t>(kColumns, columns - column),
                 {target + column, kLanes, kQueries});
}

void rounded_rows(const float* source, int64_t leading, int64_t rows, int64_t columns,
                  const Head& head, const Heads& target, int64_t first_row) {
  for (int64_t r = 0; r < rows; r++) {
    bf16* row = head.row(target, first_row + r);
    for (int64_t c = 0; c < columns; c += kLanes)
      store_rounded(_mm512_load_ps(source + r * leading + c), row + c);
  }
}

// The product of a left matrix with one in pairs.
void product(int64_t rows, int64_t columns, int64_t depth, const bf16* left, int64_t left_row,
             const pair* right, int64_t right_row, float* result, int64_t result_row, bool adds) {
  at::native::cpublas::brgemm(rows, columns, depth, left_row, right_row, result_row, adds, left,
                              reinterpret_cast<const bf16*>(right), result);
}

// The products of rows `k` to `k + keys` of a tensor with `lanes` queries.
void scores_of(const Head& head, const Heads& tensor, int64_t k, int64_t keys, int64_t lanes, int64_t width,
               const pair* queries, float* result) {
  product(keys, lanes, width, head.row(tensor, k), tensor.row, queries, kQueries, result, kQueries, false);
}

// Memory that a thread works in, piece by piece.
class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(c10::GetCPUAllocator()->allocate(bytes)) {
    next_ = static_cast<char*>(data_.get());
  }
  template <typename Number>
  Number* take(int64_t count) {
    auto* piece = reinterpret_cast<Number*>(next_);
    next_ += bytes<Number>(count);
    return piece;
  }
  template <typename Number>
  static int64_t bytes(int64_t count) {
    return up_to(count * static_cast<int64_t>(sizeof(Number)), 64);
  }

 private:
  c10::DataPtr data_;
  char* next_;
};

}  // namespace
