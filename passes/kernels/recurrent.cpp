// The steps of a recurrent layer, one after the other: what its input contributes to the gates is there already.
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
#include <memory>
#include <vector>

namespace {

using at::BFloat16;
using Numbers = at::vec::Vectorized<float>;

constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 64;   // sequences of a block
constexpr int64_t kUnits = 64;  // of a panel, at most
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
  int64_t depth;  // even for 16-bit numbers
  int64_t width;
  Number* data;

  static constexpr int64_t kPair = sizeof(Number) == 2 ? 2 : 1;
  Number* panel(int64_t p) const { return data + p * depth * width; }

  // Fills columns of panel p, from `column` on, with as many rows of a matrix.
  void fill_transposed(int64_t p, int64_t column, const Number* source, int64_t rows) const {
    // A square at a time: distances of a power of two would use few places of the first-level cache.
    Number square[kLanes][kLanes];
    for (int64_t n = 0; n < rows; n += kLanes) {
      const int64_t across = std::min(kLanes, rows - n);
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int64_t down = std::min(kLanes, depth - k);
        for (int64_t i = 0; i < across; i++)
          std::copy_n(source + (n + i) * depth + k, down, square[i]);
        for (int64_t i = 0; i < down; i++)
          for (int64_t j = 0; j < across; j++) *at(p, k + i, column + n + j) = square[j][i];
      }
    }
  }

  // Fills columns of panel p, from the first on, with columns of a matrix.
  void fill(int64_t p, const Number* source, int64_t leading, int64_t columns) const {
    for (int64_t k = 0; k < depth; k++)
      for (int64_t n = 0; n < columns; n++) *at(p, k, n) = source[k * leading + n];
  }

  void clear(int64_t p) const { std::fill_n(panel(p), depth * width, Number(0)); }

  Number* at(int64_t p, int64_t row, int64_t column) const {
    return panel(p) + (row / kPair * width + column) * kPair + row % kPair;
  }

  // sums = left @ panel p.
  void multiply(int64_t p, const Number* left, int64_t rows, float* sums) const {
    at::native::cpublas::brgemm(rows, width, depth, depth, width, width, /*add_C=*/false, left,
                                panel(p), sums, /*is_vnni=*/kPair == 2);
  }
};

// The kinds of layers, with the gates in PyTorch's order.
enum Kind {
  kLstm,  // input, forget, cell, output
  kGru,   // reset, update, new
  kTanh,  // an Elman network's one
  kRelu,
};

template <Kind kKind>
constexpr int64_t kGates = kKind == kLstm ? 4 : kKind == kGru ? 3 : 1;
// What the backward pass needs of a step: the gates' values, and of a GRU what the reset gate multiplies.
template <Kind kKind>
constexpr int64_t kSaved = kKind == kLstm || kKind == kGru ? 4 : 1;

template <typename Number>
struct Layer {
  Steps steps;
  int64_t hidden;        // units; even for 16-bit numbers
  const Number* weight;  // (gates * hidden, hidden)
  const float* bias;     // added as `saved` is laid out, (kSaved * hidden,); or null
  Number* saved;         // (rows, kSaved * hidden); null if not wanted
  Number* previous;      // (rows, hidden): the state before each step
  float* cells;          // LSTM: (rows, hidden): the memory after each step
  const float* first_cell;  // LSTM: (sequences, hidden)

  float* cell(int64_t place, int64_t row) const {
    return cells + (steps.first(place) + row) * hidden;
  }
  // The memory before a step.
  const float* cell_before(int64_t place, int64_t row) const {
    if (row < steps.shared(place, -1)) return cell(place - 1, row);
    return first_cell + row * hidden;
  }
};

template <typename Number, Kind kKind>
struct Forward : Layer<Number> {
  using Layer<Number>::steps, Layer<Number>::hidden, Layer<Number>::weight, Layer<Number>::bias;
  using Layer<Number>::saved, Layer<Number>::previous;
  const Number* inputs;       // (rows, gates * hidden): what the layer's input contributes
  const Number* first_state;  // (sequences, hidden)
  Number* output;             // (rows, hidden)
  Number* last_state;         // (sequences, hidden)
  float* last_cell;           // LSTM: (sequences, hidden)

  static constexpr int64_t gates = kGates<kKind>;

  void run(int64_t units, Number* packed) {
    const int64_t most = *std::max_element(steps.sizes, steps.sizes + steps.count);
    const Tasks tasks{blocks(hidden, units), blocks(most, kRows)};
    const Panels<Number> panels{hidden, gates * units, packed};
#pragma omp parallel num_threads(at::get_num_threads())
    {
      std::vector<float> sums(kRows * gates * units);
      int64_t packed_last = -1;
      tasks.run(tasks.row_blocks, [&](int64_t p, int64_t) {
        if (p == packed_last) return;
        packed_last = p;
        const int64_t present = std::min(units, hidden - p * units);
        if (present < units) panels.clear(p);
        for (int64_t gate = 0; gate < gates; gate++)
          panels.fill_transposed(p, gate * units, weight + (gate * hidden + p * units) * hidden,
                                 present);
      });
#pragma omp for
      for (int64_t place = 0; place < steps.count; place++) begin(place);
      for (int64_t place = 0; place < steps.count; place++) {
        const int64_t rows = steps.rows(place);
        tasks.run(blocks(rows, kRows), [&](int64_t p, int64_t block) {
          const int64_t row = block * kRows, height = std::min(kRows, rows - row);
          panels.multiply(p, previous + (steps.first(place) + row) * hidden, height, sums.data());
          for (int64_t r = 0; r < height; r++)
            finish(place, row + r, p * units, std::min(units, hidden - p * units),
                   sums.data() + r * gates * units, units);
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
                  previous + (steps.first(place) + row) * hidden);
  }

  // Ends a step of one sequence for `units` units; the sums of a gate are `width` numbers apart.
  void finish(int64_t place, int64_t row, int64_t unit, int64_t units, const float* sums,
              int64_t width) {
    const int64_t at = steps.first(place) + row;
    const Number* given = inputs + at * gates * hidden + unit;
    const Number* before = previous + at * hidden + unit;
    Number* kept = saved ? saved + at * kSaved<kKind> * hidden + unit : nullptr;
    Number* result = output + at * hidden + unit;
    // Where the state goes to: the next step, or what the layer returns.
    const bool goes_on = row < steps.shared(place, 1);
    Number* state = goes_on ? previous + (steps.first(place + 1) + row) * hidden + unit
                            : last_state + row * hidden + unit;
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t count = std::min(kLanes, units - u);
      fetch<1>(result + kAhead * hidden + u);
      fetch<1>(state + kAhead * hidden + u);
      for (int64_t g = 0; g < gates; g++) fetch(given + (kAhead * gates + g) * hidden + u);
      const auto biased = [&](int64_t g, Numbers value) {
        return bias ? value + get(bias + g * hidden + unit + u, count) : value;
      };
      const auto input = [&](int64_t g) { return biased(g, get(given + g * hidden + u, count)); };
      const auto product = [&](int64_t g) { return Numbers::loadu(sums + g * width + u); };
      const auto sum = [&](int64_t g) { return product(g) + input(g); };
      const auto keep = [&](int64_t g, Numbers value) {
        if (kept == nullptr) return;
        fetch<1>(kept + (kAhead * kSaved<kKind> + g) * hidden + u);
        put(value, kept + g * hidden + u, count);
      };
      Numbers h;
      if constexpr (kKind == kLstm) {
        const Numbers i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = tanh(sum(2)), o = sigmoid(sum(3));
        const Numbers c =
            f * get(this->cell_before(place, row) + unit + u, count) + i * g;
        float* cell = this->cell(place, row) + unit + u;
        fetch<1>(cell + kAhead * hidden);
        put(c, cell, count);
        if (!goes_on) put(c, last_cell + row * hidden + unit + u, count);
        keep(0, i), keep(1, f), keep(2, g), keep(3, o);
        h = o * tanh(c);
      } else if constexpr (kKind == kGru) {
        const Numbers r = sigmoid(sum(0)), z = sigmoid(sum(1));
        const Numbers reset = biased(3, product(2)), n = tanh(input(2) + r * reset);
        keep(0, r), keep(1, z), keep(2, n), keep(3, reset);
        h = n + z * (get(before + u, count) - n);
      } else {
        h = kKind == kTanh ? tanh(sum(0)) : at::vec::maximum(sum(0), Numbers(0));
        keep(0, h);
      }
      put(h, result + u, count);
      put(h, state + u, count);
    }
  }
};

template <typename Number, Kind kKind>
struct Backward : Layer<Number> {
  using Layer<Number>::steps, Layer<Number>::hidden, Layer<Number>::weight, Layer<Number>::saved;
  using Layer<Number>::previous;
  const Number* output;      // gradient of the output, (rows, hidden)
  const Number* last_state;  // its gradient, (sequences, hidden)
  Number* inputs;            // gradient of the gates' inputs, (rows, gates * hidden)
  Number* products;          // GRU: of the products, likewise; else the same as `inputs`
  // What goes back past the products, (sequences, hidden): the gradient of the memory (LSTM; before, that
  // of the last one) or a part of the state's (GRU; before, zeros).
  float* carried;

  static constexpr int64_t gates = kGates<kKind>;

  void run(int64_t units, Number* packed) {
    const int64_t most = *std::max_element(steps.sizes, steps.sizes + steps.count);
    const Tasks tasks{blocks(hidden, units), blocks(most, kRows)};
    const Panels<Number> panels{gates * hidden, units, packed};
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
            panels.multiply(p, products + (steps.first(place + 1) + row) * gates * hidden,
                            going_on, sums.data());
          for (int64_t r = 0; r < height; r++)
            finish(place, row + r, p * units, std::min(units, hidden - p * units),
                   r < going_on ? sums.data() + r * units : nullptr);
        });
#pragma omp barrier
      }
      at::native::cpublas::brgemm_release(Panels<Number>::kPair == 2);
    }
  }

  // `sums` is the gradient that comes from the next step's products, if there is one.
  void finish(int64_t place, int64_t row, int64_t unit, int64_t units, const float* sums) {
    const Numbers one(1);
    const int64_t at = steps.first(place) + row;
    const Number* kept = saved + at * kSaved<kKind> * hidden + unit;
    const Number* given = output + at * hidden + unit;
    Number* of_inputs = inputs + at * gates * hidden + unit;
    Number* of_products = products + at * gates * hidden + unit;
    float* past = carried + row * hidden + unit;
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t count = std::min(kLanes, units - u);
      fetch(given + kAhead * hidden + u);
      for (int64_t g = 0; g < kSaved<kKind>; g++)
        fetch(kept + (kAhead * kSaved<kKind> + g) * hidden + u);
      for (int64_t g = 0; g < gates; g++)
        fetch<1>(of_inputs + (kAhead * gates + g) * hidden + u);
      const auto value = [&](int64_t g) { return get(kept + g * hidden + u, count); };
      const auto give = [&](int64_t g, Numbers gradient) {
        put(gradient, of_inputs + g * hidden + u, count);
        if (kKind == kGru) put(gradient, of_products + g * hidden + u, count);
      };
      Numbers dh = get(given + u, count);
      dh = dh + (sums ? Numbers::loadu(sums + u)
                      : get(last_state + row * hidden + unit + u, count));
      if constexpr (kKind == kLstm) {
        const Numbers i = value(0), f = value(1), g = value(2), o = value(3);
        const float* cell = this->cell(place, row) + unit + u;
        fetch(cell + kAhead * hidden);
        const Numbers c = tanh(get(cell, count));
        const Numbers before = get(this->cell_before(place, row) + unit + u, count);
        const Numbers dc = get(past + u, count) + dh * o * (one - c * c);
        give(0, dc * g * i * (one - i));
        give(1, dc * before * f * (one - f));
        give(2, dc * i * (one - g * g));
        give(3, dh * c * o * (one - o));
        put(dc * f, past + u, count);
      } else if constexpr (kKind == kGru) {
        const Numbers r = value(0), z = value(1), n = value(2), reset = value(3);
        const Numbers before = get(previous + at * hidden + unit + u, count);
        dh = dh + get(past + u, count);
        const Numbers dn = dh * (one - z) * (one - n * n);
        give(0, dn * reset * r * (one - r));
        give(1, dh * (before - n) * z * (one - z));
        give(2, dn);
        put(dn * r, of_products + 2 * hidden + u, count);
        put(dh * z, past + u, count);
      } else if constexpr (kKind == kTanh) {
        const Numbers h = value(0);
        give(0, dh * (one - h * h));
      } else {
        give(0, Numbers::blendv(Numbers(0), dh, value(0) > Numbers(0)));
      }
    }
  }
};

int64_t units_of_panel(int64_t hidden, int64_t most) {
  int64_t units = most;
  while (units > kLanes && blocks(hidden, units) < at::get_num_threads()) units /= 2;
  return units;
}

template <typename Number, Kind kKind>
void run(Forward<Number, kKind> layer) {
  const int64_t gates = kGates<kKind>, hidden = layer.hidden;
  const int64_t units = units_of_panel(hidden, gates > 2 ? kUnits / 2 : kUnits);
  const std::unique_ptr<Number[]> packed(
      new Number[blocks(hidden, units) * units * gates * hidden]);
  layer.run(units, packed.get());
}

template <typename Number, Kind kKind>
void run(Backward<Number, kKind> layer) {
  const int64_t gates = kGates<kKind>, hidden = layer.hidden;
  const int64_t units = units_of_panel(hidden, kUnits);
  const std::unique_ptr<Number[]> packed(
      new Number[blocks(hidden, units) * units * gates * hidden]);
  layer.run(units, packed.get());
}

template <template <typename, Kind> class Pass, typename Number, class... Arguments>
void run_kind(int64_t kind, const Layer<Number>& layer, Arguments... arguments) {
  switch (kind) {
    case kLstm: return run(Pass<Number, kLstm>{layer, arguments...});
    case kGru: return run(Pass<Number, kGru>{layer, arguments...});
    case kTanh: return run(Pass<Number, kTanh>{layer, arguments...});
    case kRelu: return run(Pass<Number, kRelu>{layer, arguments...});
  }
}

template <typename Number>
bool multiplies() {
  try {
    std::vector<Number> left(kLanes * kLanes), right(kLanes * kLanes);
    std::vector<float> sums(kLanes * kLanes);
    const Panels<Number> panels{kLanes, kLanes, right.data()};
    panels.multiply(0, left.data(), kLanes, sums.data());
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

#define LAYER(T)                                                                                 \
  int64_t kind, const int64_t *sizes, const int64_t *offsets, int64_t count, bool reverse,       \
      int64_t hidden, const T *weight, const float *bias, T *saved, T *previous, float *cells,   \
      const float *first_cell
#define THE_LAYER                                                                                \
  {{sizes, offsets, count, reverse}, hidden, weight, bias, saved, previous, cells, first_cell}

#define DEFINE(T, SUFFIX)                                                                        \
  void forward_##SUFFIX(LAYER(T), const T* inputs, const T* first_state, T* output,              \
                        T* last_state, float* last_cell) {                                       \
    run_kind<Forward, T>(kind, THE_LAYER, inputs, first_state, output, last_state, last_cell);   \
  }                                                                                              \
  void backward_##SUFFIX(LAYER(T), const T* output, const T* last_state, T* inputs, T* products, \
                         float* carried) {                                                       \
    run_kind<Backward, T>(kind, THE_LAYER, output, last_state, inputs, products, carried);       \
  }

DEFINE(float, fp32)
DEFINE(BFloat16, bf16)
}
