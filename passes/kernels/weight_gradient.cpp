// The weight gradient of a linear layer: BF16 operands, FP32 result written once.
//
// PyTorch's BF16 product rounds the result to BF16, and a second pass over it widens it again: 8 bytes of
// traffic for each weight. Here each tile is accumulated in FP32 by oneDNN's brgemm and stored where it
// belongs: 4 bytes, and no rounding.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

using bf16 = c10::BFloat16;
using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;

namespace {

constexpr int64_t kTileRows = 128;     // of the result; the tile of 128 KiB stays in L2
constexpr int64_t kTileColumns = 256;
constexpr int64_t kDepth = 512;        // batch rows multiplied before the tile is visited again
constexpr int64_t kTransposeBlock = 32;

int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// transposed[n][m] = gradient[m][n]; rows beyond the batch are zero.
void transpose(const bf16* gradient, bf16* transposed, int64_t batch, int64_t padded, int64_t out) {
  at::parallel_for(0, blocks(out, kTransposeBlock), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * kTransposeBlock;
      const int64_t last = std::min(out, first + kTransposeBlock);
      for (int64_t m0 = 0; m0 < batch; m0 += kTransposeBlock) {
        const int64_t m1 = std::min(batch, m0 + kTransposeBlock);
        for (int64_t n = first; n < last; n++)
          for (int64_t m = m0; m < m1; m++) transposed[n * padded + m] = gradient[m * out + n];
      }
      for (int64_t n = first; n < last; n++)
        std::fill(transposed + n * padded + batch, transposed + (n + 1) * padded, bf16(0));
    }
  });
}

// One panel for each kTileColumns columns of x, in the pairwise layout that BF16 dot products read:
// panel[m / 2][k][m % 2] = x[m][k].
void pack(const bf16* x, bf16* panels, int64_t batch, int64_t padded, int64_t in) {
  at::parallel_for(0, blocks(in, kTileColumns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * kTileColumns;
      const int64_t width = std::min(kTileColumns, in - first);
      bf16* panel = panels + block * kTileColumns * padded;
      for (int64_t m = 0; m < padded; m += 2) {
        const bf16* even = x + m * in + first;
        const bool has_odd = m + 1 < batch;
        const bf16* odd = has_odd ? even + in : even;
        bf16* pairs = panel + m * kTileColumns;
        for (int64_t k = 0; k < width; k++) {
          pairs[2 * k] = even[k];
          pairs[2 * k + 1] = has_odd ? odd[k] : bf16(0);
        }
      }
    }
  });
}

}  // namespace

// result[out][in] = gradient^T x, for gradient[batch][out] and x[batch][in], all row-major.
// The workspaces hold out * padded and blocks(in) * kTileColumns * padded elements, where padded is the
// batch rounded up to an even number.
extern "C" void weight_gradient(const bf16* gradient, const bf16* x, float* result, int64_t batch,
                                int64_t out, int64_t in, bf16* transposed, bf16* panels) {
  const int64_t padded = 2 * blocks(batch, 2);
  transpose(gradient, transposed, batch, padded, out);
  pack(x, panels, batch, padded, in);
  at::parallel_for(0, blocks(out, kTileRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTileRows; row < std::min(out, end * kTileRows); row += kTileRows) {
      const int64_t rows = std::min(kTileRows, out - row);
      for (int64_t column = 0; column < in; column += kTileColumns) {
        const int64_t columns = std::min(kTileColumns, in - column);
        const bf16* panel = panels + column * padded;
        for (int64_t m = 0; m < padded; m += kDepth) {
          brgemm(rows, columns, std::min(kDepth, padded - m), padded, kTileColumns, in, m > 0,
                 transposed + row * padded + m, panel + m * kTileColumns,
                 result + row * in + column, /*is_vnni=*/true);
        }
      }
    }
    brgemm_release(/*is_vnni=*/true);
  });
}

extern "C" int64_t tile_columns() { return kTileColumns; }
