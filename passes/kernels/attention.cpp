// Attention on BF16 and its backward, a block of queries of one head at a time, so that the scores stay in the
// caches.
//
// Scores lie in memory transposed, a row for each key: what belongs to a query stands in the lanes then, and
// the probabilities are the left matrix of the products over queries as they are. For those over keys they
// are transposed in registers on the way.
//
// Source: FlashAttention (arXiv 2205.14135), algorithms 1 and 4; FlashAttention-2 (arXiv 2307.08691).

#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <exception>
#include <limits>
#include <string>

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

struct Backward {
  const Call& call;

  int64_t wide() const { return up_to(call.sizes.width, kColumns); }

  // What a thread works in.
  struct Scratch {
    float *scores, *d_probabilities, *d_query, *d_key, *d_value, *logsumexp, *row_sums;
    bf16 *probabilities, *d_scores, *d_scores_by_query;
    pair *keys, *queries, *d_out, *query_columns, *d_out_columns;
  };
  template <typename Take>
  Scratch scratch(Take&& take) const {
    const int64_t width = call.sizes.width, keys = call.sizes.keys;
    Scratch s;
    for (float** block : {&s.scores, &s.d_probabilities}) take(*block, kKeys * kQueries);
    take(s.d_query, kQueries * width);
    for (float** all : {&s.d_key, &s.d_value}) take(*all, keys * width);
    for (float** row : {&s.logsumexp, &s.row_sums}) take(*row, kQueries);
    for (bf16** block : {&s.probabilities, &s.d_scores, &s.d_scores_by_query})
      take(*block, kKeys * kQueries);
    take(s.keys, blocks(keys, 2) * wide());
    for (pair** rows : {&s.queries, &s.d_out}) take(*rows, kQueries / 2 * wide());
    for (pair** columns : {&s.query_columns, &s.d_out_columns})
      take(*columns, up_to(blocks(width, 2), kLanes) * kQueries);
    return s;
  }

  void one(const Head& head, const Scratch& s) const {
    const int64_t width = call.sizes.width, all = call.sizes.keys * width;
    std::fill_n(s.d_key, all, 0.0f);
    std::fill_n(s.d_value, all, 0.0f);
    pairs_of_rows(head.row(call.key, 0), call.key.row, call.sizes.keys, width, s.keys, wide());
    for (int64_t q = 0; q < call.sizes.queries; q += kQueries)
      block(head, s, q, std::min(kQueries, call.sizes.queries - q));
    rounded_rows(s.d_key, width, call.sizes.keys, width, head, call.d_key, 0);
    rounded_rows(s.d_value, width, call.sizes.keys, width, head, call.d_value, 0);
  }

  void block(const Head& head, const Scratch& s, int64_t q, int64_t count) const {
    const int64_t width = call.sizes.width, lanes = up_to(count, kLanes), depth = up_to(count, 2);
    const int64_t seen = head.seen(q + count);
    pairs_of_columns(head.row(call.query, q), call.query.row, width, count, s.query_columns);
    pairs_of_columns(head.row(call.d_out, q), call.d_out.row, width, count, s.d_out_columns);
    pairs_of_rows(head.row(call.query, q), call.query.row, count, width, s.queries, wide());
    pairs_of_rows(head.row(call.d_out, q), call.d_out.row, count, width, s.d_out, wide());
    sums_of_rows(head, s, q, count);
    std::fill_n(s.d_query, kQueries * width, 0.0f);
    for (int64_t k = 0; k < seen; k += kKeys) {
      const int64_t keys = std::min(kKeys, seen - k);
      scores_of(head, call.key, k, keys, lanes, width, s.query_columns, s.scores);
      scores_of(head, call.value, k, keys, lanes, width, s.d_out_columns, s.d_probabilities);
      const Scores scores(head, call.mask, q, k);
      if (scores.masked(keys))
        gradients<true>(scores, s, lanes, keys);
      else
        gradients<false>(scores, s, lanes, keys);
      product(keys, width, depth, s.probabilities, kQueries, s.d_out, wide(), s.d_value + k * width,
              width, true);
      product(keys, width, depth, s.d_scores, kQueries, s.queries, wide(), s.d_key + k * width,
              width, true);
      product(count, width, up_to(keys, 2), s.d_scores_by_query, kKeys, s.keys + k / 2 * wide(),
              wide(), s.d_query, width, true);
    }
    rounded_rows(s.d_query, width, count, width, head, call.d_query, q);
  }

  // Log-sum-exps, and sums of dO * O over each row; of queries that are not there, or see no key, the former
  // is infinite, which makes the probabilities zero.
  void sums_of_rows(const Head& head, const Scratch& s, int64_t q, int64_t count) const {
    std::fill_n(s.row_sums, kQueries, 0.0f);
    std::fill_n(s.logsumexp, kQueries, kInfinity);
    for (int64_t i = 0; i < count; i++) {
      const float saved = *head.row(call.logsumexp, q + i);
      if (saved != -kInfinity) s.logsumexp[i] = saved;
      __m512 sums = _mm512_setzero_ps();
      for (int64_t c = 0; c < call.sizes.width; c += kLanes)
        sums += wide_at(head.row(call.out, q + i) + c) * wide_at(head.row(call.d_out, q + i) + c);
      s.row_sums[i] = _mm512_reduce_add_ps(sums);
    }
  }

  static __m512 wide_at(const bf16* source) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }

  // From scores and gradients of probabilities: the probabilities, and the gradients of the scores.
  template <bool kMasked>
  void gradients(const Scores scores, const Scratch& s, int64_t lanes, int64_t keys) const {
    const __m512 scale = _mm512_set1_ps(static_cast<float>(call.sizes.scale));
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const __m512 logsumexp = _mm512_load_ps(s.logsumexp + lane);
      const __m512 row_sums = _mm512_load_ps(s.row_sums + lane);
      const auto of_row = [&](int64_t row) {
        const int64_t place = row * kQueries + lane;
        const __m512 probabilities = exp(scores.at<kMasked>(s.scores, lane, row) - logsumexp);
        const __m512 d_scores =
            scale * probabilities * (_mm512_load_ps(s.d_probabilities + place) - row_sums);
        store_rounded(probabilities, s.probabilities + place);
        store_rounded(d_scores, s.d_scores + place);
        return d_scores;
      };
      for (int64_t step = 0; step < keys; step += kStep)
        transposed(of_row, step, keys, s.d_scores_by_query + lane * kKeys + step);
    }
  }
};

struct Forward {
  const Call& call;

  int64_t wide() const { return up_to(call.sizes.width, kColumns); }

  // What a thread works in.
  struct Scratch {
    float *scores, *out, *largest, *sums, *shrinks;
    bf16* probabilities_by_query;
    pair *values, *query_columns;
  };
  template <typename Take>
  Scratch scratch(Take&& take) const {
    Scratch s;
    take(s.scores, kKeys * kQueries);
    take(s.out, kQueries * call.sizes.width);
    for (float** row : {&s.largest, &s.sums, &s.shrinks}) take(*row, kQueries);
    take(s.probabilities_by_query, kKeys * kQueries);
    take(s.values, blocks(call.sizes.keys, 2) * wide());
    take(s.query_columns, up_to(blocks(call.sizes.width, 2), kLanes) * kQueries);
    return s;
  }

  void one(const Head& head, const Scratch& s) const {
    const Sizes& sizes = call.sizes;
    pairs_of_rows(head.row(call.value, 0), call.value.row, sizes.keys, sizes.width, s.values, wide());
    for (int64_t q = 0; q < sizes.queries; q += kQueries)
      block(head, s, q, std::min(kQueries, sizes.queries - q));
  }

  void block(const Head& head, const Scratch& s, int64_t q, int64_t count) const {
    const int64_t width = call.sizes.width, lanes = up_to(count, kLanes), seen = head.seen(q + count);
    pairs_of_columns(head.row(call.query, q), call.query.row, width, count, s.query_columns);
    std::fill_n(s.largest, kQueries, -kInfinity);
    std::fill_n(s.sums, kQueries, 0.0f);
    std::fill_n(s.out, kQueries * width, 0.0f);
    for (int64_t k = 0; k < seen; k += kKeys) {
      const int64_t keys = std::min(kKeys, seen - k);
      scores_of(head, call.key, k, keys, lanes, width, s.query_columns, s.scores);
      const Scores scores(head, call.mask, q, k);
      if (scores.masked(keys))
        probabilities<true>(scores, s, lanes, keys);
      else
        probabilities<false>(scores, s, lanes, keys);
      scale_rows(s.out, s.shrinks, count);
      product(count, width, up_to(keys, 2), s.probabilities_by_query, kKeys, s.values + k / 2 * wide(),
              wide(), s.out, width, true);
    }
    for (int64_t i = 0; i < count; i++) {
      *head.row(call.logsumexp, q + i) = s.largest[i] + std::log(s.sums[i]);
      s.shrinks[i] = s.sums[i] == 0 ? 1 : 1 / s.sums[i];  // a query that sees no key has a zero output
    }
    scale_rows(s.out, s.shrinks, count);
    rounded_rows(s.out, width, count, width, head, call.out, q);
  }

  void scale_rows(float* rows, const float* factors, int64_t count) const {
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < call.sizes.width; c++) rows[i * call.sizes.width + c] *= factors[i];
  }

  // Exponentials of the scores less the largest so far, their sums, and by how much what was summed before
  // shrinks.
  template <bool kMasked>
  void probabilities(const Scores scores, const Scratch& s, int64_t lanes, int64_t keys) const {
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const __m512 before = _mm512_load_ps(s.largest + lane);
      __m512 largest = before;
      for (int64_t row = 0; row < keys; row++) {
        const __m512 of_key = scores.at<kMasked>(s.scores, lane, row);
        _mm512_store_ps(s.scores + row * kQueries + lane, of_key);
        largest = _mm512_max_ps(largest, of_key);
      }
      // Infinity less infinity would be no number.
      const __mmask16 sees_none = _mm512_cmpeq_ps_mask(largest, _mm512_set1_ps(-kInfinity));
      const __m512 base = _mm512_mask_mov_ps(largest, sees_none, _mm512_setzero_ps());
      const __m512 shrinks = exp(before - base);
      __m512 sums = _mm512_load_ps(s.sums + lane) * shrinks;
      const auto of_row = [&](int64_t row) {
        const __m512 exponential = exp(_mm512_load_ps(s.scores + row * kQueries + lane) - base);
        sums += exponential;
        return exponential;
      };
      for (int64_t step = 0; step < keys; step += kStep)
        transposed(of_row, step, keys, s.probabilities_by_query + lane * kKeys + step);
      _mm512_store_ps(s.largest + lane, largest);
      _mm512_store_ps(s.shrinks + lane, shrinks);
      _mm512_store_ps(s.sums + lane, sums);
    }
  }
};

// Keeps what went wrong for the caller of this thread.
const char* kept(const char* problem) {
  static thread_local std::string text;
  text = problem;
  return text.c_str();
}

// Runs forward or backward over all heads; returns why it could not, or null. There may be no memory, or none
// of PyTorch's products for this processor.
template <typename Direction>
const char* run(const Direction& direction) try {
  const Sizes& sizes = direction.call.sizes;
  int64_t bytes = 0;
  direction.scratch([&](auto*& piece, int64_t count) {
    bytes += Memory::bytes<std::remove_reference_t<decltype(*piece)>>(count);
  });
  at::parallel_for(0, sizes.batch * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    Memory memory(bytes);
    const auto scratch = direction.scratch([&](auto*& piece, int64_t count) {
      piece = memory.take<std::remove_reference_t<decltype(*piece)>>(count);
    });
    for (int64_t i = begin; i < end; i++)
      direction.one({sizes, i / sizes.heads, i % sizes.heads}, scratch);
    at::native::cpublas::brgemm_release();
  });
  return nullptr;
} catch (const c10::Error& error) {
  return kept(error.what_without_backtrace());
} catch (const std::exception& error) {
  return kept(error.what());
}

}  // namespace

extern "C" {
const char* attention(const Call* call) { return run(Forward{*call}); }
const char* attention_backward(const Call* call) { return run(Backward{*call}); }
}
