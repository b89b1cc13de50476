// Attention on BF16 and its backward, a block of queries of one head at a time, so that the scores stay in the
// caches.
//
// Scores lie in memory transposed, a row for each key: what belongs to a query stands in the lanes then, and
// the probabilities are the left matrix of the products over queries as they are. For those over keys they
// are transposed in registers on the way.
//
// Source: FlashAttention (arXiv 2205.14135), algorithms 1 and 4; FlashAttention-2 (arXiv 2307.08691).

#include <c10/util/Exception.h>

#include <cmath>
#include <exception>
#include <string>

#include "attention_blocks.h"

namespace {

// With the probabilities P = exp(scale * Q K^T + mask - logsumexp):
// dV = P^T dO, dS = scale * P * (dO V^T - rowsum(dO * O)), dQ = dS K, dK = dS^T Q.
struct Backward {
  const Call& call;

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
    take(s.keys, blocks(keys, 2) * call.sizes.wide());
    for (pair** rows : {&s.queries, &s.d_out}) take(*rows, kQueries / 2 * call.sizes.wide());
    for (pair** columns : {&s.query_columns, &s.d_out_columns})
      take(*columns, up_to(blocks(width, 2), kLanes) * kQueries);
    return s;
  }

  void one(const Head& head, const Scratch& s) const {
    const int64_t width = call.sizes.width, all = call.sizes.keys * width;
    std::fill_n(s.d_key, all, 0.0f);
    std::fill_n(s.d_value, all, 0.0f);
    pairs_of_rows(head.row(call.key, 0), call.key.row, call.sizes.keys, width, s.keys, call.sizes.wide());
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
    pairs_of_rows(head.row(call.query, q), call.query.row, count, width, s.queries, call.sizes.wide());
    pairs_of_rows(head.row(call.d_out, q), call.d_out.row, count, width, s.d_out, call.sizes.wide());
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
      product(keys, width, depth, s.probabilities, kQueries, s.d_out, call.sizes.wide(), s.d_value + k * width,
              width, true);
      product(keys, width, depth, s.d_scores, kQueries, s.queries, call.sizes.wide(), s.d_key + k * width,
              width, true);
      product(count, width, up_to(keys, 2), s.d_scores_by_query, kKeys, s.keys + k / 2 * call.sizes.wide(),
              call.sizes.wide(), s.d_query, width, true);
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

// O = P V over blocks of keys, where P is relative to the largest score so far.
struct Forward {
  const Call& call;

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
    take(s.values, blocks(call.sizes.keys, 2) * call.sizes.wide());
    take(s.query_columns, up_to(blocks(call.sizes.width, 2), kLanes) * kQueries);
    return s;
  }

  void one(const Head& head, const Scratch& s) const {
    const Sizes& sizes = call.sizes;
    pairs_of_rows(head.row(call.value, 0), call.value.row, sizes.keys, sizes.width, s.values, sizes.wide());
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
      product(count, width, up_to(keys, 2), s.probabilities_by_query, kKeys,
              s.values + k / 2 * call.sizes.wide(), call.sizes.wide(), s.out, width, true);
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
