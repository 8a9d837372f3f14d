// Weights times rows of activations, on CPUs with AVX2: which operations our kernels take, and how threads share the
// work. The arithmetic is in matmul_32.cpp (Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1, Q8_0), for CPUs with AVX-512 and VNNI in
// matmul_32_vnni.cpp, and in matmul_256.cpp (Q4_K, Q5_K, Q6_K). However many there are, each row gets the bits that
// llama.cpp's kernel for one row gives it.

#include "matmul.h"
#include "plugin.h"

#ifdef MATMUL_WITH_AVX2

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

// A single row is taken where ours was measured to be faster; with AVX2 alone llama.cpp's was not compared with it.
#ifdef MATMUL_WITH_VNNI
constexpr int MIN_ROWS = 1;
#else
constexpr int MIN_ROWS = 2;
#endif

// Repacked means: as llama.cpp keeps it when the number of columns is a multiple of 8 (repack.cpp there).
struct Type {
    ggml_type type;
    bool repacked;
    const MatmulKernel * kernel;
};

const Type TYPES[] = {
    {GGML_TYPE_Q4_0, true, &matmul_q4_0},
    {GGML_TYPE_IQ4_NL, true, &matmul_iq4_nl},
    {GGML_TYPE_Q4_1, false, &matmul_q4_1},
    {GGML_TYPE_Q5_0, false, &matmul_q5_0},
    {GGML_TYPE_Q5_1, false, &matmul_q5_1},
    {GGML_TYPE_Q8_0, false, &matmul_q8_0},
    {GGML_TYPE_Q4_K, true, &matmul_q4_k},
    {GGML_TYPE_Q5_K, false, &matmul_q5_k},
    {GGML_TYPE_Q6_K, false, &matmul_q6_k},
};

const MatmulKernel * kernel_of(const ggml_tensor * weights) {
    if (!weights->buffer) return nullptr;
    const bool repacked = strcmp(ggml_functions.buffer_name(weights->buffer), "CPU_REPACK") == 0;
    if (!repacked && !ggml_functions.is_host(weights->buffer)) return nullptr;  // packed for AMX, say
    for (const Type & each : TYPES) {
        if (each.type == weights->type && each.repacked == repacked) return each.kernel;
    }
    return nullptr;
}

struct Shape {
    const ggml_tensor *weights, *rows, *dst;
    const MatmulKernel & kernel;
    int64_t n_columns, n_rows, n_blocks;

    explicit Shape(const ggml_tensor * op)
        : weights(op->src[0]), rows(op->src[1]), dst(op), kernel(*kernel_of(weights)), n_columns(weights->ne[1]),
          n_rows(rows->ne[1]), n_blocks(weights->ne[0] / kernel.block) {}

    size_t row_bytes() const { return n_blocks * kernel.activation_bytes; }
    size_t work() const { return n_rows * row_bytes() + 64; }

    Pass pass(int64_t first, void * work) const {
        return {(int8_t *) work + first * row_bytes(), int(std::min<int64_t>(MAX_ROWS, n_rows - first))};
    }
};

std::atomic<int64_t> n_calls{0};

struct Matmul : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = Shape(op).work();
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Shape s(op);
        if (params->wsize < s.work()) abort();  // work_size() asked for it
        void * work = (void *) (((uintptr_t) params->wdata + 63) / 64 * 64);
        for (int64_t row = params->ith; row < s.n_rows; row += params->nth) {
            const int64_t first = row / MAX_ROWS * MAX_ROWS;
            s.kernel.quantize((const float *) ((const char *) s.rows->data + row * s.rows->nb[1]), s.n_blocks,
                              s.pass(first, work), int(row - first));
        }
        if (params->ith == 0) {
            n_calls.fetch_add(1, std::memory_order_relaxed);
            ggml_functions.chunk_set(params->threadpool, params->nth);
        }
        ggml_functions.barrier(params->threadpool);
        // A piece of the weights stays in the cache for all passes.
        const int64_t n_groups = s.n_columns / s.kernel.columns;
        const int64_t piece = std::max<int64_t>(1, (n_groups + 8 * params->nth - 1) / (8 * params->nth));
        for (int64_t at = params->ith; at * piece < n_groups; at = ggml_functions.chunk_add(params->threadpool, 1)) {
            multiply(s, at * piece * s.kernel.columns, std::min(n_groups, (at + 1) * piece) * s.kernel.columns, work);
        }
        return true;
    }

    static void multiply(const Shape & s, int64_t begin, int64_t end, void * work) {
        for (int64_t first = 0; first < s.n_rows; first += MAX_ROWS) {
            const Pass pass = s.pass(first, work);
            float * to = (float *) ((char *) s.dst->data + first * s.dst->nb[1]);
            for (int64_t column = begin; column < end; column += s.kernel.columns) {
                s.kernel.multiply(s.weights, column, pass, to + column, s.dst->nb[1]);
            }
        }
    }
};

Matmul matmul;

bool supported(const ggml_tensor * op) {
    const ggml_tensor *weights = op->src[0], *rows = op->src[1];
    const MatmulKernel * kernel = kernel_of(weights);
    return kernel && rows->type == GGML_TYPE_F32 && rows->ne[1] >= MIN_ROWS && rows->ne[2] == 1
        && rows->ne[3] == 1 && weights->ne[1] % kernel->columns == 0 && weights->ne[2] == 1 && weights->ne[3] == 1
        && weights->nb[0] == kernel->block_bytes
        && weights->nb[1] == weights->ne[0] / kernel->block * kernel->block_bytes  // repacked ones are found by it
        && rows->nb[0] == sizeof(float)
        && op->nb[0] == sizeof(float);
}

}  // namespace

ggml::cpu::tensor_traits * matmul_for(const ggml_tensor * op) { return supported(op) ? &matmul : nullptr; }

// How often it was called: a way to see that it is in use.
extern "C" int64_t matmul_calls() { return n_calls.load(std::memory_order_relaxed); }

extern "C" int64_t matmul_min_rows() { return MIN_ROWS; }

#else

ggml::cpu::tensor_traits * matmul_for(const ggml_tensor *) { return nullptr; }

extern "C" int64_t matmul_calls() { return -1; }  // not for this kind of CPU

extern "C" int64_t matmul_min_rows() { return -1; }

#endif
