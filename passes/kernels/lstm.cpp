// The steps of an LSTM layer, one after the other: what its input contributes to the gates is there already.
//
// A task is a panel of hidden units, with all their gates, times a block of sequences. A thread has the same
// panels in all steps, so that the weights stay in its second-level cache, and ends the units whose gates it
// has multiplied while they are in the first. Between two steps all threads wait for each other once.

#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace {

using at::BFloat16;
using Numbers = at::vec::Vectorized<float>;

constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 64;   // sequences of a block
constexpr int64_t kUnits = 64;  // of a panel, at most
constexpr int64_t kGates = 4;   // input, forget, cell, output
constexpr int64_t kAhead = 4;   // rows; the processor does not foresee where pieces of rows lie

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

Numbers get(const float* source, int64_t count) { return Numbers::loadu(source, count); }

Numbers get(const BFloat16* source, int64_t count) {
  const auto present = static_cast<__mmask16>((1u << count) - 1);
  const __m256i narrow = _mm256_maskz_loadu_epi16(present, source);
  return Numbers(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16)));
}

void put(Numbers numbers, float* target, int64_t count) { numbers.store(target, count); }

void put(Numbers numbers, BFloat16* target, int64_t count) {
  const auto present = static_cast<__mmask16>((1u << count) - 1);
  _mm256_mask_storeu_epi16(target, present, at::vec::cvtfp32_bf16(numbers));
}

// Fetches a cache line, to be written if `W`; addresses beyond the end are harmless.
template <int W = 0>
void fetch(const void* line) {
  __builtin_prefetch(line, W);
}

Numbers sigmoid(Numbers x) { return Numbers(1) / (Numbers(1) + x.neg().exp()); }

// As in Cephes' tanhf, which is as exact as the library's and takes a third of its time.
Numbers tanh(Numbers x) {
  const Numbers size = x.abs(), square = x * x, one(1);
  Numbers series(-5.70498872745e-3f);
  for (float coefficient : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    series = series * square + Numbers(coefficient);
  const Numbers large = one - Numbers(2) / ((size + size).exp() + one);
  const Numbers signed_large = large | (x & Numbers(-0.0f));
  return Numbers::blendv(signed_large, x + x * square * series, size < Numbers(0.625f));
}

// The steps of all sequences. Those of one step are rows that follow each other, longest sequence first.
struct Steps {
  const int64_t* sizes;    // how many sequences have step t
  const int64_t* offsets;  // the first row of step t
  int64_t count;
  bool reverse;  // whether the last step comes first

  int64_t at(int64_t place) const { return reverse ? count - 1 - place : place; }
  // How many sequences of the step in `place` have the one in `place + way` as well.
  int64_t shared(int64_t place, int64_t way) const {
    const int64_t other = place + way;
    if (other < 0 || other >= count) return 0;
    return std::min(sizes[at(place)], sizes[at(other)]);
  }
  int64_t rows(int64_t place) const { return sizes[at(place)]; }
  int64_t first(int64_t place) const { return offsets[at(place)]; }
};

// Who works on what.
struct Tasks {
  int64_t panels, row_blocks;

  // Runs `task(panel, row block)` for what is the calling thread's.
  template <class Task>
  void run(int64_t active_blocks, Task task) const {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t all = panels * row_blocks;
    const int64_t begin = all * thread / threads, end = all * (thread + 1) / threads;
    for (int64_t i = begin; i < end; i++)
      if (i % row_blocks < active_blocks) task(i / row_blocks, i % row_blocks);
  }
};

// The right matrix of a product as `brgemm` wants it: panels of columns, 16-bit numbers in pairs of rows.
template <typename Number>
struct Panels {
  int64_t depth, width;
  Number* data;

  static constexpr int64_t kPair = sizeof(Number) == 2 ? 2 : 1;
  int64_t padded() const { return blocks(depth, kPair) * kPair; }
  Number* panel(int64_t p) const { return data + p * padded() * width; }

  // Fills columns of panel p, from `column` on, with as many rows of a transposed matrix.
  void fill_transposed(int64_t p, int64_t column, const Number* source, int64_t leading,
                       int64_t rows) const {
    // A square at a time: distances of a power of two would use few places of the first-level cache.
    Number square[kLanes][kLanes];
    for (int64_t n = 0; n < rows; n += kLanes) {
      const int64_t across = std::min(kLanes, rows - n);
      for (int64_t k = 0; k < padded(); k += kLanes) {
        const int64_t down = std::min(kLanes, padded() - k), given = std::min(kLanes, depth - k);
        for (int64_t i = 0; i < across; i++) {
          std::copy_n(source + (n + i) * leading + k, given, square[i]);
          std::fill_n(square[i] + given, down - given, Number(0));
        }
        for (int64_t i = 0; i < down; i++)
          for (int64_t j = 0; j < across; j++) *at(p, k + i, column + n + j) = square[j][i];
      }
    }
  }

  // Fills columns of panel p, from the first on.
  void fill(int64_t p, const Number* source, int64_t leading, int64_t columns) const {
    for (int64_t k = 0; k < depth; k++)
      for (int64_t n = 0; n < columns; n++) *at(p, k, n) = source[k * leading + n];
  }

  void clear(int64_t p) const { std::fill_n(panel(p), padded() * width, Number(0)); }

  Number* at(int64_t p, int64_t row, int64_t column) const {
    return panel(p) + (row / kPair * width + column) * kPair + row % kPair;
  }

  // sums (+)= left @ panel p.
  void multiply(int64_t p, const Number* left, int64_t leading, int64_t rows, bool add,
                float* sums) const {
    at::native::cpublas::brgemm(rows, width, padded(), leading, width, width, add, left, panel(p),
                                sums, /*is_vnni=*/kPair == 2);
  }
};

template <typename Number>
struct Layer {
  Steps steps;
  int64_t hidden;   // units
  int64_t leading;  // distance of rows of `previous`, even for 16-bit numbers
  const Number* weight;  // (4 hidden, hidden)
  Number* gates;         // (rows, 4 hidden): their values; null if not wanted
  Number* previous;      // (rows, leading): the state before each step
  float* cells;          // (rows, hidden): the memory after each step
  const float* first_cell;  // (sequences, hidden)

  float* cell(int64_t place, int64_t row) const {
    return cells + (steps.first(place) + row) * hidden;
  }
  // The memory before a step.
  const float* cell_before(int64_t place, int64_t row) const {
    if (row < steps.shared(place, -1)) return cell(place - 1, row);
    return first_cell + row * hidden;
  }
};

template <typename Number>
struct Forward : Layer<Number> {
  using Layer<Number>::steps, Layer<Number>::hidden, Layer<Number>::leading;
  using Layer<Number>::weight, Layer<Number>::gates, Layer<Number>::previous;
  const Number* inputs;  // (rows, 4 hidden): what the layer's input contributes to the gates
  const Number* first_state;  // (sequences, hidden)
  Number* output;        // (rows, hidden)
  Number* last_state;    // (sequences, hidden)
  float* last_cell;      // (sequences, hidden)

  void run(int64_t units, Number* packed) {
    const int64_t most = *std::max_element(steps.sizes, steps.sizes + steps.count);
    const Tasks tasks{blocks(hidden, units), blocks(most, kRows)};
    const Panels<Number> panels{hidden, kGates * units, packed};
#pragma omp parallel num_threads(at::get_num_threads())
    {
      std::vector<float> sums(kRows * kGates * units);
      int64_t packed_last = -1;
      tasks.run(tasks.row_blocks, [&](int64_t p, int64_t) {
        if (p == packed_last) return;
        packed_last = p;
        const int64_t present = std::min(units, hidden - p * units);
        if (present < units) panels.clear(p);
        for (int64_t gate = 0; gate < kGates; gate++)
          panels.fill_transposed(p, gate * units, weight + (gate * hidden + p * units) * hidden,
                                 hidden, present);
      });
#pragma omp for
      for (int64_t place = 0; place < steps.count; place++) begin(place);
      for (int64_t place = 0; place < steps.count; place++) {
        const int64_t rows = steps.rows(place);
        tasks.run(blocks(rows, kRows), [&](int64_t p, int64_t block) {
          const int64_t row = block * kRows, height = std::min(kRows, rows - row);
          panels.multiply(p, previous + (steps.first(place) + row) * leading, leading, height, false,
                          sums.data());
          for (int64_t r = 0; r < height; r++)
            finish(place, row + r, p * units, std::min(units, hidden - p * units),
                   sums.data() + r * kGates * units, units);
        });
#pragma omp barrier
      }
      at::native::cpublas::brgemm_release(Panels<Number>::kPair == 2);
    }
  }

  // The state before the first step of the sequences that have their first in `place`.
  void begin(int64_t place) {
    for (int64_t row = steps.shared(place, -1); row < steps.rows(place); row++)
      std::copy_n(first_state + row * hidden, hidden,
                  previous + (steps.first(place) + row) * leading);
  }

  void finish(int64_t place, int64_t row, int64_t unit, int64_t units, const float* sums,
              int64_t width) {
    const int64_t at = steps.first(place) + row;
    const float* before = this->cell_before(place, row) + unit;
    float* cell = this->cell(place, row) + unit;
    Number* result = output + at * hidden + unit;
    // Where the state goes to: the next step, or what the layer returns.
    const bool goes_on = row < steps.shared(place, 1);
    Number* state = goes_on ? previous + (steps.first(place + 1) + row) * leading + unit
                            : last_state + row * hidden + unit;
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t count = std::min(kLanes, units - u);
      fetch<1>(cell + kAhead * hidden + u);
      fetch<1>(result + kAhead * hidden + u);
      fetch<1>(state + kAhead * leading + u);
      Numbers gate[kGates];
      for (int64_t g = 0; g < kGates; g++) {
        const int64_t here = (at * kGates + g) * hidden + unit + u;
        const int64_t later = here + kAhead * kGates * hidden;
        fetch(inputs + later);
        const Numbers sum = Numbers::loadu(sums + g * width + u) + get(inputs + here, count);
        gate[g] = g == 2 ? tanh(sum) : sigmoid(sum);
        if (gates == nullptr) continue;
        fetch<1>(gates + later);
        put(gate[g], gates + here, count);
      }
      const Numbers c = gate[1] * get(before + u, count) + gate[0] * gate[2];
      const Numbers h = gate[3] * tanh(c);
      put(c, cell + u, count);
      put(h, result + u, count);
      put(h, state + u, count);
      if (!goes_on) put(c, last_cell + row * hidden + unit + u, count);
    }
  }
};

template <typename Number>
struct Backward : Layer<Number> {
  using Layer<Number>::steps, Layer<Number>::hidden, Layer<Number>::weight, Layer<Number>::gates;
  const Number* output;      // gradient of the output, (rows, hidden)
  const Number* last_state;  // its gradient, (sequences, hidden)
  const float* last_cell;    // its gradient, (sequences, hidden)
  Number* inputs;            // gradient of the gates' inputs, (rows, 4 hidden)
  float* first_cell_gradient;  // (sequences, hidden); meanwhile, of the memory behind the step

  void run(int64_t units, Number* packed) {
    const int64_t most = *std::max_element(steps.sizes, steps.sizes + steps.count);
    const Tasks tasks{blocks(hidden, units), blocks(most, kRows)};
    const Panels<Number> panels{kGates * hidden, units, packed};
    std::copy_n(last_cell, most * hidden, first_cell_gradient);
#pragma omp parallel num_threads(at::get_num_threads())
    {
      std::vector<float> sums(kRows * units);
      int64_t packed_last = -1;
      tasks.run(tasks.row_blocks, [&](int64_t p, int64_t) {
        if (p == packed_last) return;
        packed_last = p;
        const int64_t present = std::min(units, hidden - p * units);
        if (present < units) panels.clear(p);
        panels.fill(p, weight + p * units, hidden, present);
      });
#pragma omp barrier
      for (int64_t place = steps.count - 1; place >= 0; place--) {
        const int64_t rows = steps.rows(place), shared = steps.shared(place, 1);
        tasks.run(blocks(rows, kRows), [&](int64_t p, int64_t block) {
          const int64_t row = block * kRows, height = std::min(kRows, rows - row);
          const int64_t going_on = std::min(height, shared - row);
          if (going_on > 0)
            panels.multiply(p, inputs + (steps.first(place + 1) + row) * kGates * hidden,
                            kGates * hidden, going_on, false, sums.data());
          for (int64_t r = 0; r < height; r++)
            finish(place, row + r, p * units, std::min(units, hidden - p * units),
                   r < going_on ? sums.data() + r * units : nullptr);
        });
#pragma omp barrier
      }
      at::native::cpublas::brgemm_release(Panels<Number>::kPair == 2);
    }
  }

  // `sums` is the gradient that comes from the next step, if there is one.
  void finish(int64_t place, int64_t row, int64_t unit, int64_t units, const float* sums) {
    const Numbers one(1);
    const int64_t at = steps.first(place) + row;
    const float* before = this->cell_before(place, row) + unit;
    const float* cell = this->cell(place, row) + unit;
    float* carried = first_cell_gradient + row * hidden + unit;
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t count = std::min(kLanes, units - u);
      int64_t places[kGates];
      for (int64_t gate = 0; gate < kGates; gate++) {
        places[gate] = (at * kGates + gate) * hidden + unit + u;
        fetch(gates + places[gate] + kAhead * kGates * hidden);
        fetch<1>(inputs + places[gate] + kAhead * kGates * hidden);
      }
      fetch(cell + kAhead * hidden + u);
      fetch(output + (at + kAhead) * hidden + unit + u);
      const Numbers i = get(gates + places[0], count), f = get(gates + places[1], count);
      const Numbers g = get(gates + places[2], count), o = get(gates + places[3], count);
      const Numbers c = tanh(get(cell + u, count));
      const Numbers later = sums ? Numbers::loadu(sums + u)
                                 : get(last_state + row * hidden + unit + u, count);
      const Numbers dh = get(output + at * hidden + unit + u, count) + later;
      const Numbers dc = get(carried + u, count) + dh * o * (one - c * c);
      put(dc * g * i * (one - i), inputs + places[0], count);
      put(dc * get(before + u, count) * f * (one - f), inputs + places[1], count);
      put(dc * i * (one - g * g), inputs + places[2], count);
      put(dh * c * o * (one - o), inputs + places[3], count);
      put(dc * f, carried + u, count);
    }
  }
};

int64_t units_of_panel(int64_t hidden, int64_t most) {
  int64_t units = most;
  while (units > kLanes && blocks(hidden, units) < at::get_num_threads()) units /= 2;
  return units;
}

template <typename Number>
void forward(Forward<Number> layer) {
  const int64_t units = units_of_panel(layer.hidden, kUnits / 2);
  std::vector<Number> packed(blocks(layer.hidden, units) * units * kGates * (layer.hidden + 1));
  layer.run(units, packed.data());
}

template <typename Number>
void backward(Backward<Number> layer) {
  const int64_t units = units_of_panel(layer.hidden, kUnits);
  std::vector<Number> packed(blocks(layer.hidden, units) * units * kGates * layer.hidden);
  layer.run(units, packed.data());
}

template <typename Number>
bool multiplies() {
  try {
    std::vector<Number> left(kLanes * kLanes), right(kLanes * kLanes);
    std::vector<float> sums(kLanes * kLanes);
    const Panels<Number> panels{kLanes, kLanes, right.data()};
    panels.multiply(0, left.data(), kLanes, kLanes, false, sums.data());
    at::native::cpublas::brgemm_release(Panels<Number>::kPair == 2);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

extern "C" {

// Whether PyTorch has a kernel here for the small products of a step.
bool multiplies_fp32() { return multiplies<float>(); }
bool multiplies_bf16() { return multiplies<BFloat16>(); }

#define STEPS const int64_t *sizes, const int64_t *offsets, int64_t count, bool reverse
#define LAYER(T) \
  int64_t hidden, int64_t leading, const T *weight, T *gates, T *previous, float *cells, const float *first_cell

#define DEFINE(T, SUFFIX)                                                                          \
  void lstm_forward_##SUFFIX(STEPS, LAYER(T), const T* inputs, const T* first_state, T* output,    \
                             T* last_state, float* last_cell) {                                    \
    forward<T>({{{sizes, offsets, count, reverse}, hidden, leading, weight, gates, previous, cells,  \
                 first_cell}, inputs, first_state, output, last_state, last_cell});                \
  }                                                                                                \
  void lstm_backward_##SUFFIX(STEPS, LAYER(T), const T* output, const T* last_state,               \
                              const float* last_cell, T* inputs, float* first_cell_gradient) {     \
    backward<T>({{{sizes, offsets, count, reverse}, hidden, leading, weight, gates, previous, cells, \
                  first_cell}, output, last_state, last_cell, inputs, first_cell_gradient});       \
  }

DEFINE(float, fp32)
DEFINE(BFloat16, bf16)
}
