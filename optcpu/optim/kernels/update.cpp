// The update step of an optimizer: one pass over memory for all tensors, whatever their number formats.
//
// Every tensor is cut into blocks. A block is decoded to FP32 on the stack, where it stays in the first
// cache, updated there, and encoded again; so a rule knows nothing of formats, and main memory sees
// each number once. Blocks, not tensors, are shared out among the threads, so that many small tensors
// keep them as busy as a few large ones.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The numbers of a tensor; optcpu/optim/native.py mirrors these two structures.
struct Stored {
  void* data;      // null where a rule has no use for it
  int16_t* low;    // the lower halves of split numbers
  int32_t format;  // see Format
  uint32_t seed;   // of the random bits that round this tensor in this step
};

// One parameter in one step, with all that its rule needs; optcpu/optim/rules.py describes it.
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

enum Format : int32_t { kFloat, kSplit, kStochastic, kNearest };

namespace {

// A block is 256 bytes of each of its tensors, as many lines as the processor can ask memory for at once.
constexpr int64_t kBlock = 128;  // of 2-byte numbers
constexpr int64_t kFloatBlock = 64;
constexpr int64_t kLongBlock = 1024;  // of numbers that are not copied into a Block

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Random bits for the two elements at 2 * pair, a function of seed and place alone: the same for any number
// of threads. The mixing function is "lowbias32" of C. Wellons' hash prospector.
uint32_t random_bits(uint32_t seed, uint32_t pair) {
  uint32_t x = pair ^ seed;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

void prefetch(const void* data, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  const char* first = static_cast<const char*>(data);
  for (int64_t offset = 0; offset < bytes; offset += kCacheLine) __builtin_prefetch(first + offset);
}

// A block is read at once and then computed with for long; unless the next one is asked for meanwhile,
// memory idles while the processor computes and the processor while memory is read.
void prefetch_next(const Stored& from, int64_t start, int64_t n) {
  const int64_t next = start + n, width = from.format == kFloat ? 4 : 2;
  prefetch(static_cast<const char*>(from.data) + next * width, n * width);
  if (from.format == kSplit) prefetch(from.low + next, n * sizeof(int16_t));
}

void decode(const Stored& from, int64_t start, int64_t n, float* __restrict to) {
  prefetch_next(from, start, n);
  if (from.format == kFloat) {
    std::memcpy(to, static_cast<const float*>(from.data) + start, n * sizeof(float));
    return;
  }
  const uint16_t* high = static_cast<const uint16_t*>(from.data) + start;
  if (from.format == kSplit) {
    const int16_t* low = from.low + start;
    for (int64_t i = 0; i < n; i++)
      to[i] = as_float((uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i])));
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = as_float(uint32_t(high[i]) << 16);
  }
}

void encode(const Stored& to, int64_t start, int64_t n, const float* __restrict from) {
  if (to.format == kFloat) {
    std::memcpy(static_cast<float*>(to.data) + start, from, n * sizeof(float));
    return;
  }
  uint16_t* __restrict high = static_cast<uint16_t*>(to.data) + start;
  if (to.format == kSplit) {
    int16_t* __restrict rest = to.low + start;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t bits = as_bits(from[i]), upper = (bits + 0x8000u) >> 16;
      high[i] = uint16_t(upper);
      rest[i] = int16_t(bits - (upper << 16));
    }
  } else if (to.format == kStochastic) {
    const uint32_t seed = to.seed, first = uint32_t(start / 2);  // start is even
    uint32_t pairs[kBlock / 2];
    uint16_t bits[kBlock];
    for (uint32_t i = 0; i < kBlock / 2; i++) pairs[i] = random_bits(seed, first + i);
    std::memcpy(bits, pairs, sizeof bits);
    for (int64_t i = 0; i < n; i++) high[i] = uint16_t((as_bits(from[i]) + bits[i]) >> 16);
  } else {
    for (int64_t i = 0; i < n; i++) {
      const uint32_t bits = as_bits(from[i]);
      high[i] = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    }
  }
}

// What a rule works on, in FP32. Loops read constants from locals: a member of Parameter could be one of the
// numbers that are written, as far as the compiler knows, and the loop would not be vectorised.
struct Block {
  alignas(64) float weight[kBlock], gradient[kBlock], first[kBlock], second[kBlock];
  int64_t size;
};

void load_gradient(const Parameter& p, int64_t start, Block& b) {
  decode(p.gradient, start, b.size, b.gradient);
  const float scale = p.gradient_scale, decay = p.coupled_decay;
  if (scale != 1)
    for (int64_t i = 0; i < b.size; i++) b.gradient[i] *= scale;
  if (decay != 0)
    for (int64_t i = 0; i < b.size; i++) b.gradient[i] += decay * b.weight[i];
}

void load_moments(const Parameter& p, int64_t start, Block& b) {
  decode(p.first, start, b.size, b.first);
  decode(p.second, start, b.size, b.second);
}

// Stores the weight, after Lookahead's synchronisation where one is due.
void store_weight(const Parameter& p, int64_t start, Block& b) {
  if (p.slow.data) {
    float* slow = b.gradient;  // done with
    decode(p.slow, start, b.size, slow);
    const float alpha = p.slow_step;
    for (int64_t i = 0; i < b.size; i++)
      b.weight[i] = slow[i] = slow[i] + alpha * (b.weight[i] - slow[i]);
    encode(p.slow, start, b.size, slow);
  }
  encode(p.weight, start, b.size, b.weight);
}

void update_moments(const Parameter& p, int64_t start, Block& b) {
  load_moments(p, start, b);
  const float rest1 = p.rest1, beta2 = p.beta2, rest2 = p.rest2;
  for (int64_t i = 0; i < b.size; i++) {
    const float g = b.gradient[i];
    b.first[i] += (g - b.first[i]) * rest1;
    b.second[i] = b.second[i] * beta2 + g * g * rest2;
  }
  encode(p.first, start, b.size, b.first);
  encode(p.second, start, b.size, b.second);
}

void adam_block(const Parameter& p, int64_t start, Block& b) {
  decode(p.weight, start, b.size, b.weight);
  load_gradient(p, start, b);
  update_moments(p, start, b);
  if (p.maximum.data) {
    float* maximum = b.gradient;  // done with
    decode(p.maximum, start, b.size, maximum);
    for (int64_t i = 0; i < b.size; i++)
      b.second[i] = maximum[i] = std::max(maximum[i], b.second[i]);
    encode(p.maximum, start, b.size, maximum);
  }
  const float shrink = p.shrink, step_size = p.step_size;
  const float root_scale = p.root_scale, epsilon = p.epsilon;
  for (int64_t i = 0; i < b.size; i++)
    b.weight[i] = b.weight[i] * shrink -
                  step_size * b.first[i] / (std::sqrt(b.second[i]) * root_scale + epsilon);
  store_weight(p, start, b);
}

void sgd_block(const Parameter& p, int64_t start, Block& b) {
  decode(p.weight, start, b.size, b.weight);
  load_gradient(p, start, b);
  float* direction = b.gradient;
  if (p.first.data) {
    decode(p.first, start, b.size, b.first);
    const float momentum = p.beta1, rest = p.rest1;
    for (int64_t i = 0; i < b.size; i++)
      b.first[i] = momentum * b.first[i] + rest * b.gradient[i];
    encode(p.first, start, b.size, b.first);
    if (p.nesterov)
      for (int64_t i = 0; i < b.size; i++) b.gradient[i] += momentum * b.first[i];
    else
      direction = b.first;
  }
  const float step_size = p.step_size;
  for (int64_t i = 0; i < b.size; i++) b.weight[i] -= step_size * direction[i];
  store_weight(p, start, b);
}

// The same where all numbers are FP32: there is nothing to decode, and each is read and written where it is.
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
  const float momentum = p.beta1, rest = p.rest1, ahead = p.nesterov ? momentum : 1;
  const float of_gradient = p.nesterov ? 1 : 0;
  for (int64_t i = 0; i < n; i++) {
    const float g = gradient[i] * scale + decay * weight[i];
    first[i] = momentum * first[i] + rest * g;
    weight[i] -= step_size * (of_gradient * g + ahead * first[i]);
  }
}

// The update before it is scaled, in place of the gradient. Shrinks the weight.
void lamb_update(const Parameter& p, Block& b) {
  const float shrink = p.shrink, decay = p.update_decay, step_size = p.step_size;
  const float root_scale = p.root_scale, epsilon = p.epsilon;
  for (int64_t i = 0; i < b.size; i++) {
    b.weight[i] *= shrink;
    b.gradient[i] = step_size * b.first[i] / (std::sqrt(b.second[i]) * root_scale + epsilon) +
                    decay * b.weight[i];
  }
}

double sum_of_squares(const float* x, int64_t n) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
  double total = 0;
  for (; i < n; i++) total += double(x[i]) * x[i];
  for (float sum : sums) total += sum;
  if (std::isinf(total)) {  // more than FP32 can hold, if no number is infinite itself
    total = 0;
    for (i = 0; i < n; i++) total += double(x[i]) * x[i];
  }
  return total;
}

int64_t block_size(const Parameter& p) {
  const bool has_floats = p.weight.format == kFloat || (p.first.data && p.first.format == kFloat);
  return has_floats ? kFloatBlock : kBlock;
}

int64_t blocks_of(const Parameter& p, int64_t length) { return (p.size + length - 1) / length; }

// Calls body(tensor, index of the block among all, first element, block) for every block; length_of(tensor)
// is the size of its blocks.
template <class Body, class Length>
void for_each_block(const Parameter* parameters, int64_t count, const Length& length_of, const Body& body) {
  std::vector<int64_t> first(count + 1, 0);
  for (int64_t t = 0; t < count; t++)
    first[t + 1] = first[t] + blocks_of(parameters[t], length_of(parameters[t]));
  at::parallel_for(0, first[count], 1, [&](int64_t begin, int64_t end) {
    Block block;
    int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t index = begin; index < end; index++) {
      while (index >= first[t + 1]) t++;
      const int64_t length = length_of(parameters[t]), start = (index - first[t]) * length;
      block.size = std::min(length, parameters[t].size - start);
      body(parameters[t], index, start, block);
    }
  });
}

// Sums what body(parameter, start, block, sums) found in each block, tensor by tensor and in the order
// of the blocks, so that the result does not depend on the number of threads.
template <int kSums, class Body>
std::vector<double> sum_blocks(const Parameter* parameters, int64_t count, const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < count; t++) total += blocks_of(parameters[t], block_size(parameters[t]));
  std::vector<double> partial(total * kSums), sums(count * kSums, 0);
  for_each_block(parameters, count, block_size, [&](const Parameter& p, int64_t index, int64_t start, Block& block) {
    body(p, start, block, &partial[index * kSums]);
  });
  int64_t index = 0;
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < blocks_of(parameters[t], block_size(parameters[t])); i++, index++)
      for (int s = 0; s < kSums; s++) sums[t * kSums + s] += partial[index * kSums + s];
  return sums;
}

// Calls of_floats(parameter, start, size) or of_block(parameter, start, block), whichever fits a parameter.
template <class OfFloats, class OfBlock>
void update(const Parameter* parameters, int64_t count, const OfFloats& of_floats, const OfBlock& of_block) {
  const auto length_of = [](const Parameter& p) { return is_all_floats(p) ? kLongBlock : block_size(p); };
  for_each_block(parameters, count, length_of, [&](const Parameter& p, int64_t, int64_t start, Block& block) {
    if (is_all_floats(p)) of_floats(p, start, block.size);
    else of_block(p, start, block);
  });
}

}  // namespace

extern "C" void adam(const Parameter* parameters, int64_t count) {
  update(parameters, count, adam_floats, adam_block);
}

extern "C" void sgd(const Parameter* parameters, int64_t count) {
  update(parameters, count, sgd_floats, sgd_block);
}

// The norms need all of a tensor before any of it may change: one pass for the moments and norms, one
// for the weights, in which the update is computed once more rather than kept.
extern "C" void lamb(const Parameter* parameters, int64_t count) {
  const auto squares = sum_blocks<2>(
      parameters, count, [](const Parameter& p, int64_t start, Block& block, double* sums) {
        decode(p.weight, start, block.size, block.weight);
        load_gradient(p, start, block);
        update_moments(p, start, block);
        if (p.ratio_limit < 0) return;
        load_moments(p, start, block);  // as rounded: what the second pass will see
        lamb_update(p, block);
        sums[0] = sum_of_squares(block.weight, block.size);
        sums[1] = sum_of_squares(block.gradient, block.size);
      });
  std::vector<float> scale(count);
  for (int64_t t = 0; t < count; t++) {
    const double weight = std::sqrt(squares[2 * t]), update = std::sqrt(squares[2 * t + 1]);
    const double limit = parameters[t].ratio_limit;
    const bool adapts = limit >= 0 && weight > 0 && update > 0;
    scale[t] = float(parameters[t].lr * (adapts ? std::min(weight / update, limit) : 1));
  }
  for_each_block(parameters, count, block_size, [&](const Parameter& p, int64_t, int64_t start, Block& block) {
    decode(p.weight, start, block.size, block.weight);
    load_moments(p, start, block);
    lamb_update(p, block);
    const float factor = scale[&p - parameters];
    for (int64_t i = 0; i < block.size; i++) block.weight[i] -= factor * block.gradient[i];
    store_weight(p, start, block);
  });
}

// The sum of the squares of all gradients, unscaled.
extern "C" double gradient_squares(const Parameter* parameters, int64_t count) {
  const auto squares = sum_blocks<1>(
      parameters, count, [](const Parameter& p, int64_t start, Block& block, double* sums) {
        decode(p.gradient, start, block.size, block.gradient);
        sums[0] = sum_of_squares(block.gradient, block.size);
      });
  double total = 0;
  for (double square : squares) total += square;
  return total;
}
