// The update step of an optimizer: one pass over memory for all tensors, whatever their number formats.
//
// A group of numbers is decoded to FP32, updated and encoded again (numbers.h): so a rule knows nothing of
// formats, and main memory sees each number once. Blocks, not tensors, are shared out among the threads, so
// that many small tensors keep them as busy as a few large ones.

#include "numbers.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

// One parameter in one step, with all that its rule needs; optcpu/optim/rules.py describes it, and
// optcpu/optim/native.py mirrors this structure.
struct Parameter {
  Stored weight, gradient, first, second, maximum, slow;
  int64_t size;
  float gradient_scale;  // for clipping; negative to maximise
  float coupled_decay;   // times the weight, added to the gradient
  float shrink;          // what weights are multiplied by first (decoupled decay)
  float update_decay;    // LAMB: times the weight, added to the update
  float beta1, beta2;    // SGD: beta1 is the momentum
  float rest1, rest2;    // 1 - beta1 and 1 - beta2 without FP32's rounding; SGD: rest1 is 1 - dampening
  float epsilon;
  float lr;              // LAMB: the learning rate
  float step_size;       // the learning rate (LAMB: 1), by the first bias correction
  float root_scale;      // 1 / the square root of the second bias correction
  float ratio_limit;     // LAMB: the largest trust ratio; negative: it is one
  float slow_step;       // Lookahead's alpha
  int32_t nesterov;
};

namespace {

constexpr int64_t kBlock = 512;  // whole groups, so that random numbers come in whole vectors

template <class At>
INLINE Numbers scaled_gradient(const Parameter& p, At at, const Numbers& weight) {
  Numbers gradient = get(p.gradient, at);
  const float scale = p.gradient_scale, decay = p.coupled_decay;
  if (scale != 1) each([&](auto& g) { g *= scale; }, gradient);
  if (decay != 0) each([&](auto& g, auto w) { g += decay * w; }, gradient, weight);
  return gradient;
}

struct Moments {
  Numbers first, second;
};

template <class At>
INLINE Moments updated_moments(const Parameter& p, At at, const Numbers& gradient) {
  Moments moments{get(p.first, at), get(p.second, at)};
  const float rest1 = p.rest1, beta2 = p.beta2, rest2 = p.rest2;
  each(
      [&](auto g, auto& m, auto& v) {
        m += (g - m) * rest1;
        v = v * beta2 + g * g * rest2;  // of an overflow infinity, not a difference of two
      },
      gradient, moments.first, moments.second);
  put(p.first, at, moments.first);
  put(p.second, at, moments.second);
  return moments;
}

// Stores the weight, after Lookahead's synchronisation where one is due.
template <class At>
INLINE void store_weight(const Parameter& p, At at, Numbers& weight) {
  if (p.slow.data) {
    Numbers slow = get(p.slow, at);
    const float alpha = p.slow_step;
    each([&](auto& w, auto& s) { w = s = s + alpha * (w - s); }, weight, slow);
    put(p.slow, at, slow);
  }
  put(p.weight, at, weight);
}

template <class At>
INLINE void adam_group(const Parameter& p, At at) {
  Numbers weight = get(p.weight, at);
  Moments moments = updated_moments(p, at, scaled_gradient(p, at, weight));
  if (p.maximum.data) {
    const Numbers maximum = get(p.maximum, at);
    each([](auto& v, auto most) { v = larger(most, v); }, moments.second, maximum);
    put(p.maximum, at, moments.second);
  }
  const float shrink = p.shrink, step_size = p.step_size;
  const float root_scale = p.root_scale, epsilon = p.epsilon;
  each(
      [&](auto& w, auto m, auto v) {
        w = w * shrink - step_size * over_root(m, v, root_scale, epsilon);
      },
      weight, moments.first, moments.second);
  store_weight(p, at, weight);
}

template <class At>
INLINE void sgd_group(const Parameter& p, At at) {
  Numbers weight = get(p.weight, at);
  Numbers direction = scaled_gradient(p, at, weight);
  const float momentum = p.beta1, rest = p.rest1, step_size = p.step_size;
  if (p.first.data) {
    Numbers first = get(p.first, at);
    each([&](auto& m, auto g) { m = momentum * m + rest * g; }, first, direction);
    put(p.first, at, first);
    if (p.nesterov)
      each([&](auto& g, auto m) { g += momentum * m; }, direction, first);
    else
      direction = first;
  }
  each([&](auto& w, auto d) { w -= step_size * d; }, weight, direction);
  store_weight(p, at, weight);
}

// Whether all numbers are FP32: there is nothing to decode, and each is read and written where it is.
bool is_all_floats(const Parameter& p) {
  for (const Stored* one : {&p.weight, &p.gradient, &p.first, &p.second})
    if (one->data && one->format != kFloat) return false;
  return !p.maximum.data && !p.slow.data;
}

float* floats(const Stored& of, int64_t start) { return static_cast<float*>(of.data) + start; }

void adam_floats(const Parameter& p, int64_t start, int64_t n) {
  float* __restrict weight = floats(p.weight, start);
  float* __restrict first = floats(p.first, start);
  float* __restrict second = floats(p.second, start);
  const float* __restrict gradient = floats(p.gradient, start);
  const float scale = p.gradient_scale, decay = p.coupled_decay, shrink = p.shrink;
  const float rest1 = p.rest1, beta2 = p.beta2, rest2 = p.rest2;
  const float step_size = p.step_size, root_scale = p.root_scale, epsilon = p.epsilon;
  for (int64_t i = 0; i < n; i++) {
    const float g = gradient[i] * scale + decay * weight[i];
    first[i] += (g - first[i]) * rest1;
    second[i] = second[i] * beta2 + g * g * rest2;
    weight[i] = weight[i] * shrink -
                step_size * first[i] / (std::sqrt(second[i]) * root_scale + epsilon);
  }
}

void sgd_floats(const Parameter& p, int64_t start, int64_t n) {
  float* __restrict weight = floats(p.weight, start);
  const float* __restrict gradient = floats(p.gradient, start);
  const float scale = p.gradient_scale, decay = p.coupled_decay, step_size = p.step_size;
  if (!p.first.data) {
    for (int64_t i = 0; i < n; i++)
      weight[i] -= step_size * (gradient[i] * scale + decay * weight[i]);
    return;
  }
  float* __restrict first = floats(p.first, start);
  const float momentum = p.beta1, rest = p.rest1;
  const bool nesterov = p.nesterov;
  for (int64_t i = 0; i < n; i++) {
    const float g = gradient[i] * scale + decay * weight[i];
    first[i] = momentum * first[i] + rest * g;
    weight[i] -= step_size * (nesterov ? g + momentum * first[i] : first[i]);
  }
}

template <class At>
INLINE Numbers shrunk_weight(const Parameter& p, At at) {
  Numbers weight = get(p.weight, at);
  const float shrink = p.shrink;
  each([&](auto& w) { w *= shrink; }, weight);
  return weight;
}

// The update before it is scaled, from the moments as they were rounded.
template <class At>
INLINE Numbers lamb_update(const Parameter& p, At at, const Numbers& weight) {
  Numbers update = get(p.first, at);
  const Numbers second = get(p.second, at);
  const float decay = p.update_decay, step_size = p.step_size;
  const float root_scale = p.root_scale, epsilon = p.epsilon;
  each(
      [&](auto& m, auto v, auto w) {
        m = step_size * over_root(m, v, root_scale, epsilon) + decay * w;
      },
      update, second, weight);
  return update;
}

// body(p), compiled for these formats, if they are those of p: nothing is asked then number by number.
template <Format kWeight, Format kGradient, class Body>
INLINE bool with_formats(const Parameter& p, const Body& body) {
  const bool fits = p.weight.format == kWeight && p.gradient.format == kGradient &&
                    p.first.format == kNearest && (!p.second.data || p.second.format == kStochastic);
  if (!fits || p.maximum.data || p.slow.data) return false;
  Parameter known = p;
  known.weight.format = kWeight;
  known.gradient.format = kGradient;
  known.first.format = kNearest;
  known.second.format = kStochastic;
  known.maximum.data = known.slow.data = nullptr;
  body(known);
  return true;
}

// body(p, place) for each group of the `size` numbers from `start` on.
template <class Body>
INLINE void for_each_group(const Parameter& p, int64_t start, int64_t size, const Body& body) {
  const int64_t rest = size % kGroup, end = start + size - rest;
  const auto whole_groups = [&](const Parameter& p) INLINED {
    for (int64_t at = start; at < end; at += kGroup) body(p, Place<true>{at, kGroup});
  };
  // What fills a model whose state is BF16; each takes its time to compile.
  const bool done = with_formats<kSplit, kNearest>(p, whole_groups) ||
                    with_formats<kStochastic, kNearest>(p, whole_groups) ||
                    with_formats<kFloat, kFloat>(p, whole_groups);
  if (!done) whole_groups(p);
  if (rest > 0) body(p, Place<false>{end, rest});
}

// The sums of the squares of each of numbers_at(p, place), an array, over a block.
template <size_t kSums, class NumbersAt>
INLINE void sum_squares(const Parameter& p, int64_t start, int64_t size, double* sums,
                        const NumbersAt& numbers_at) {
  Squares squares[kSums];
  std::fill(sums, sums + kSums, 0);
  const auto add_one_by_one = [&](auto at) {
    const std::array<Numbers, kSums> x = numbers_at(p, at);
    for (size_t s = 0; s < kSums; s++)
      for (int64_t i = 0; i < at.size(); i++) sums[s] += double(x[s][i]) * x[s][i];
  };
  for_each_group(p, start, size, [&](const Parameter& p, auto at) INLINED {
    if (at.size() < kGroup) return add_one_by_one(at);
    const std::array<Numbers, kSums> x = numbers_at(p, at);
    for (size_t s = 0; s < kSums; s++) squares[s].add(x[s]);
  });
  bool overflown = false;
  for (size_t s = 0; s < kSums; s++) {
    sums[s] += squares[s].total();
    overflown |= std::isinf(sums[s]);  // or a number is infinite itself
  }
  if (!overflown) return;
  std::fill(sums, sums + kSums, 0);
  for_each_group(p, start, size, [&](const Parameter&, auto at) { add_one_by_one(at); });
}

int64_t blocks_of(const Parameter& p) { return (p.size + kBlock - 1) / kBlock; }

// Calls body(parameter, its number, index of the block among all, first number, size) for every block.
template <class Body>
void for_each_block(const Parameter* parameters, int64_t count, const Body& body) {
  std::vector<int64_t> first(count + 1, 0);
  for (int64_t t = 0; t < count; t++) first[t + 1] = first[t] + blocks_of(parameters[t]);
  at::parallel_for(0, first[count], 1, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t index = begin; index < end; index++) {
      while (index >= first[t + 1]) t++;
      const Parameter p = parameters[t];  // a copy, which no store can change: it stays in registers
      const int64_t start = (index - first[t]) * kBlock;
      body(p, t, index, start, std::min(kBlock, p.size - start));
    }
  });
}

// Calls body(parameter, place) for every group of every block, or of_floats(parameter, start, size) for a
// block that is all FP32.
template <class OfFloats, class Body>
void update(const Parameter* parameters, int64_t count, const OfFloats& of_floats, const Body& body) {
  for_each_block(parameters, count,
                 [&](const Parameter& p, int64_t, int64_t, int64_t start, int64_t size) {
                   if (is_all_floats(p)) return of_floats(p, start, size);
                   for_each_group(p, start, size, body);
                 });
}

// Sums what body(parameter, start, size, sums) found in each block, tensor by tensor and in the order
// of the blocks, so that the result does not depend on the number of threads.
template <int kSums, class Body>
std::vector<double> sum_blocks(const Parameter* parameters, int64_t count, const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < count; t++) total += blocks_of(parameters[t]);
  std::vector<double> partial(total * kSums), sums(count * kSums, 0);
  for_each_block(parameters, count,
                 [&](const Parameter& p, int64_t, int64_t index, int64_t start, int64_t size) {
                   body(p, start, size, &partial[index * kSums]);
                 });
  int64_t index = 0;
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < blocks_of(parameters[t]); i++, index++)
      for (int s = 0; s < kSums; s++) sums[t * kSums + s] += partial[index * kSums + s];
  return sums;
}

}  // namespace

extern "C" void adam(const Parameter* parameters, int64_t count) {
  update(parameters, count, adam_floats,
         [](const Parameter& p, auto at) INLINED { adam_group(p, at); });
}

extern "C" void sgd(const Parameter* parameters, int64_t count) {
  update(parameters, count, sgd_floats,
         [](const Parameter& p, auto at) INLINED { sgd_group(p, at); });
}

// The norms need all of a tensor before any of it may change: one pass for the moments and norms, one
// for the weights, in which the update is computed once more rather than kept.
extern "C" void lamb(const Parameter* parameters, int64_t count) {
  const auto squares = sum_blocks<2>(
      parameters, count, [](const Parameter& p, int64_t start, int64_t size, double* sums) {
        for_each_group(p, start, size, [](const Parameter& p, auto at) INLINED {
          const Numbers weight = p.coupled_decay == 0 ? Numbers{} : get(p.weight, at);
          updated_moments(p, at, scaled_gradient(p, at, weight));
        });
        if (p.ratio_limit < 0) return;
        sum_squares<2>(p, start, size, sums, [](const Parameter& p, auto at) INLINED {
          const Numbers weight = shrunk_weight(p, at);
          return std::array{weight, lamb_update(p, at, weight)};
        });
      });
  std::vector<float> scale(count);
  for (int64_t t = 0; t < count; t++) {
    const double weight = std::sqrt(squares[2 * t]), update = std::sqrt(squares[2 * t + 1]);
    const double limit = parameters[t].ratio_limit;
    const bool adapts = limit >= 0 && weight > 0 && update > 0;
    scale[t] = float(parameters[t].lr * (adapts ? std::min(weight / update, limit) : 1));
  }
  for_each_block(parameters, count,
                 [&](const Parameter& p, int64_t t, int64_t, int64_t start, int64_t size) {
                   const float factor = scale[t];
                   for_each_group(p, start, size, [&](const Parameter& p, auto at) INLINED {
                     Numbers weight = shrunk_weight(p, at);
                     const Numbers step = lamb_update(p, at, weight);
                     each([&](auto& w, auto u) { w -= factor * u; }, weight, step);
                     store_weight(p, at, weight);
                   });
                 });
}

// The sum of the squares of all gradients, unscaled.
extern "C" double gradient_squares(const Parameter* parameters, int64_t count) {
  const auto squares = sum_blocks<1>(
      parameters, count, [](const Parameter& p, int64_t start, int64_t size, double* sums) {
        sum_squares<1>(p, start, size, sums, [](const Parameter& p, auto at) INLINED {
          return std::array{get(p.gradient, at)};
        });
      });
  double total = 0;
  for (double square : squares) total += square;
  return total;
}
