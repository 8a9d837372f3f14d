// What matmul.cpp, which shares out the work, and the files with the arithmetic of each type say to each other.

#pragma once

#include <ggml.h>

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MATMUL_WITH_AVX2
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define MATMUL_WITH_VNNI
#endif

constexpr int MAX_ROWS = 16;  // computed together

// Rows of activations in 8 bits, up to MAX_ROWS of them: all rows of a block, then the next block. Kernels
// choose how a block lies there.
struct Pass {
    int8_t * at;
    int n;  // rows of this pass
};

struct MatmulKernel {
    int block;                // weights that share a scale: a row's length is a multiple of it
    size_t block_bytes;       // in the file
    size_t activation_bytes;  // of a row's block in a pass
    int columns;              // computed together, a multiple of which the tensor has

    // A row of activations becomes row `row` of a pass.
    void (*quantize)(const float * x, int64_t n_blocks, const Pass & pass, int row);
    // Some columns of the product for all rows of a pass. `to`: the first one's place in the first row of the
    // result, whose rows are `stride` bytes apart.
    void (*multiply)(const ggml_tensor * weights, int64_t column, const Pass & pass, float * to, size_t stride);
};

extern const MatmulKernel matmul_q4_0, matmul_iq4_nl, matmul_q4_1, matmul_q5_0, matmul_q5_1, matmul_q8_0;
extern const MatmulKernel matmul_q4_k, matmul_q5_k, matmul_q6_k;

#endif
