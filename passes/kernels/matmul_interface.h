// What Python calls (passes/native.py): products by the multiply() that is defined before this is included.

#pragma once

// result[rows][columns] = left @ right, plus bias[columns] and residual[rows][columns] where they are not
// null, and its positive part if `relu`. A matrix is row-major with `leading` numbers from row to row, or
// column-major if `transposed`. `depth` is summed over.
extern "C" void matmul_bf16(const bf16* left, int64_t left_leading, int64_t left_transposed,
                            const bf16* right, int64_t right_leading, int64_t right_transposed,
                            const float* bias, const bf16* residual, int64_t relu, bf16* result,
                            int64_t rows, int64_t columns, int64_t depth) {
  multiply<bf16>({left, left_leading, left_transposed != 0},
                 {right, right_leading, right_transposed != 0},
                 {bias, residual, relu != 0, result, rows, columns}, depth);
}

// The same without rounding the sums.
extern "C" void matmul_fp32(const bf16* left, int64_t left_leading, int64_t left_transposed,
                            const bf16* right, int64_t right_leading, int64_t right_transposed,
                            const float* bias, const bf16* residual, int64_t relu, float* result,
                            int64_t rows, int64_t columns, int64_t depth) {
  multiply<float>({left, left_leading, left_transposed != 0},
                  {right, right_leading, right_transposed != 0},
                  {bias, residual, relu != 0, result, rows, columns}, depth);
}
