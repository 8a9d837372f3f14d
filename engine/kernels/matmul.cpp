// Weights in Q4_0 or Q4_1 times several rows of activations, on CPUs with AVX2 and nothing better.
//
// Why it is here. llama.cpp's kernel for Q4_0, which it keeps repacked, treats weights as signed bytes, which AVX2 cannot multiply
// with signed bytes: each product costs two more instructions for the sign, and each pair of products one for
// widening. Here weights stay what Q4_0 stores, 0 to 15, which AVX2 multiplies with signed bytes as they are; the
// 8 that is to be taken off each weight is taken off the sum, as 8 times the sum of the activations. And four
// products of 15 * 127 fit 16 bits, so that a block of 32 is added up in 16 bits and widened once. With rows in
// 16s the weights are unpacked once for all. The sums are exact integers, and what is done to them in floats is
// what llama.cpp does, in its order: results are the same to the last bit, also as those of a single row, which
// llama.cpp's kernel computes (it waits for memory, not for instructions).
//
// Q4_1 llama.cpp computes as so many single rows, unpacking a column's weights anew for each. Here they are
// unpacked once for eight rows; again in its order of sums.
//
// The layout of Q4_0 is ggml's block_q4_0x8 (repack.h there): of 8 neighbouring columns, 8 scales in 16-bit
// floats, then 128 bytes, 8 of each column by turns; low halves are the first 16 weights of a block, high halves
// the others, with the top bit of each half turned over. Q4_1 is as it is in the file: a block of one column has a
// scale, the lowest weight, and 16 bytes, low halves first.

#include "plugin.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#include <immintrin.h>

namespace {

constexpr int QK = 32;        // weights of a block
constexpr int BLOCK_1 = 20;   // bytes of a block of Q4_1
constexpr int COLUMNS = 8;    // interleaved
constexpr int BLOCK = 144;    // bytes of 8 columns' block
constexpr int MAX_ROWS = 16;  // computed together
constexpr int MIN_ROWS = 2;   // below, llama.cpp's kernel is as fast
constexpr int32_t OFFSET = 8; // of a stored weight

// Rows of activations in 8 bits, MAX_ROWS together, of which block after block: first the values of each row,
// then a scale and the sum of each row: 8 times the integers for Q4_0, scaled in 16 bits for Q4_1.
struct Pass {
    int8_t * at;
    int n;  // rows of this pass

    size_t block_bytes() const { return size_t(n) * (QK + 2 * sizeof(float)); }
    int8_t * values(int64_t block, int row) const { return at + block * block_bytes() + row * QK; }
    float * scales(int64_t block) const { return (float *) (at + block * block_bytes() + n * QK); }
    int32_t * sums(int64_t block) const { return (int32_t *) (scales(block) + n); }
    float * scaled_sums(int64_t block) const { return scales(block) + n; }
};

struct Shape {
    const ggml_tensor *weights, *rows, *dst;
    int64_t k, n_columns, n_rows, n_blocks;

    explicit Shape(const ggml_tensor * op) : weights(op->src[0]), rows(op->src[1]), dst(op) {
        k = weights->ne[0];
        n_columns = weights->ne[1];
        n_rows = rows->ne[1];
        n_blocks = k / QK;
    }

    size_t row_bytes() const { return n_blocks * (QK + 2 * sizeof(float)); }
    size_t work() const { return n_rows * row_bytes() + 64; }

    Pass pass(int64_t first, void * work) const {
        return {(int8_t *) work + first * row_bytes(), int(std::min<int64_t>(MAX_ROWS, n_rows - first))};
    }
};

inline float in_16_bits(float x) { return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

// As ggml quantizes to Q8_0 and Q8_1: the largest becomes 127, the scale is kept in 16 bits.
void quantize(const float * x, int64_t n_blocks, const Pass & pass, int row, bool scaled) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t b = 0; b < n_blocks; b++, x += QK) {
        __m256 v[4];
        __m256 top = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + i * 8);
            top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
        }
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        const float most = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
        const __m256 by = _mm256_set1_ps(most != 0 ? 127.0f / most : 0.0f);
        __m256i q[4], total = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            q[i] = _mm256_cvtps_epi32(_mm256_round_ps(_mm256_mul_ps(v[i], by), _MM_FROUND_TO_NEAREST_INT));
            total = _mm256_add_epi32(total, q[i]);
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *) pass.values(b, row), _mm256_permutevar8x32_epi32(packed, order));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        s = _mm_hadd_epi32(s, s);
        const int32_t sum = _mm_cvtsi128_si32(_mm_hadd_epi32(s, s));
        const float scale = most / 127.0f;
        if (scaled) {
            pass.scaled_sums(b)[row] = in_16_bits(scale * sum);
        } else {
            pass.sums(b)[row] = OFFSET * sum;
        }
        pass.scales(b)[row] = in_16_bits(scale);
    }
}

// Eight columns of the product, for R rows from `first` on.
template <int R>
inline void rows_of_block(const __m256i * w, __m256 scale, const Pass & pass, int64_t b, int first, __m256 * acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    const float * scales = pass.scales(b) + first;
    const int32_t * sums = pass.sums(b) + first;
    for (int r = 0; r < R; r++) {
        const int64_t * x = (const int64_t *) pass.values(b, first + r);
        __m256i low = _mm256_setzero_si256(), high = low;  // columns 0 to 3 and 4 to 7, in 16 bits
        for (int i = 0; i < 4; i++) {
            int64_t eight;
            memcpy(&eight, x + i, sizeof eight);
            const __m256i a = _mm256_set1_epi64x(eight);
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w[2 * i], a));
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w[2 * i + 1], a));
        }
        // columns 0, 1, 4, 5, 2, 3, 6, 7
        __m256i sum = _mm256_hadd_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
        sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(sums[r]));
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(scales[r]));
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, acc[r]);
    }
}

void eight_columns(const uint8_t * weights, int64_t n_blocks, const Pass & pass, float * to, size_t stride) {
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
    const __m256i low_half = _mm256_set1_epi8(0x0f), turned = _mm256_set1_epi8(int8_t(0x88));
    __m256 acc[MAX_ROWS];
    for (int r = 0; r < pass.n; r++) acc[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, weights += BLOCK) {
        _mm_prefetch((const char *) weights + 8 * BLOCK, _MM_HINT_T0);
        _mm_prefetch((const char *) weights + 8 * BLOCK + 64, _MM_HINT_T0);
        __m256i w[8];  // w[2 * i]: weights 8 i to 8 i + 7 of columns 0 to 3, w[2 * i + 1] of columns 4 to 7
        for (int i = 0; i < 4; i++) {
            const __m256i raw = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) (weights + 16 + i * 32)), turned);
            w[i] = _mm256_and_si256(raw, low_half);
            w[i + 4] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low_half);
        }
        const __m256 scale = _mm256_permutevar8x32_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) weights)), order);
        int r = 0;
        for (; r + 4 <= pass.n; r += 4) rows_of_block<4>(w, scale, pass, b, r, acc + r);
        for (; r < pass.n; r++) rows_of_block<1>(w, scale, pass, b, r, acc + r);
    }
    for (int r = 0; r < pass.n; r++) {
        _mm256_storeu_ps((float *) ((char *) to + r * stride), _mm256_permutevar8x32_ps(acc[r], order));
    }
}

// One column of Q4_1 for R rows from `first` on.
template <int R>
inline void rows_of_column(const uint8_t * weights, int64_t n_blocks, const Pass & pass, int first, float * to, size_t stride) {
    const __m256i low_half = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
    __m256 acc[R];
    float lowest[R] = {};
    for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, weights += BLOCK_1) {
        uint16_t scale, low;
        memcpy(&scale, weights, 2);
        memcpy(&low, weights + 2, 2);
        const __m256 d = _mm256_set1_ps(_cvtsh_ss(scale));
        const float m = _cvtsh_ss(low);
        const __m128i raw = _mm_loadu_si128((const __m128i *) (weights + 4));
        const __m256i w = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(raw, 4), raw), low_half);
        const float *scales = pass.scales(b) + first, *sums = pass.scaled_sums(b) + first;
        for (int r = 0; r < R; r++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) pass.values(b, first + r));
            const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones);
            acc[r] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(scales[r])), _mm256_cvtepi32_ps(sum), acc[r]);
            lowest[r] = fmaf(m, sums[r], lowest[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        __m128 s = _mm_add_ps(_mm256_extractf128_ps(acc[r], 1), _mm256_castps256_ps128(acc[r]));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        s = _mm_add_ss(s, _mm_movehdup_ps(s));
        *(float *) ((char *) to + (first + r) * stride) = _mm_cvtss_f32(s) + lowest[r];
    }
}

void one_column(const uint8_t * weights, int64_t n_blocks, const Pass & pass, float * to, size_t stride) {
    int r = 0;
    for (; r + 8 <= pass.n; r += 8) rows_of_column<8>(weights, n_blocks, pass, r, to, stride);
    for (; r + 4 <= pass.n; r += 4) rows_of_column<4>(weights, n_blocks, pass, r, to, stride);
    for (; r + 2 <= pass.n; r += 2) rows_of_column<2>(weights, n_blocks, pass, r, to, stride);
    for (; r < pass.n; r++) rows_of_column<1>(weights, n_blocks, pass, r, to, stride);
}

std::atomic<int64_t> n_calls{0};

void columns_of_q4_1(const Shape & s, int64_t column, int64_t first_row, const Pass & pass) {
    for (int64_t end = column + COLUMNS; column < end; column++) {
        one_column((const uint8_t *) s.weights->data + column * s.weights->nb[1], s.n_blocks, pass,
                   (float *) ((char *) s.dst->data + first_row * s.dst->nb[1]) + column, s.dst->nb[1]);
    }
}

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
            quantize((const float *) ((const char *) s.rows->data + row * s.rows->nb[1]), s.n_blocks, s.pass(first, work),
                     int(row - first), s.weights->type == GGML_TYPE_Q4_1);
        }
        const int64_t n_eights = s.n_columns / COLUMNS;
        const int64_t piece = std::max<int64_t>(1, (n_eights + 8 * params->nth - 1) / (8 * params->nth));
        if (params->ith == 0) {
            n_calls.fetch_add(1, std::memory_order_relaxed);
            ggml_functions.chunk_set(params->threadpool, params->nth);
        }
        ggml_functions.barrier(params->threadpool);
        for (int64_t at = params->ith; at * piece < n_eights; at = ggml_functions.chunk_add(params->threadpool, 1)) {
            const int64_t end = std::min(n_eights, (at + 1) * piece);
            for (int64_t first = 0; first < s.n_rows; first += MAX_ROWS) {
                const Pass pass = s.pass(first, work);
                for (int64_t eight = at * piece; eight < end; eight++) {
                    if (s.weights->type == GGML_TYPE_Q4_1) {
                        columns_of_q4_1(s, eight * COLUMNS, first, pass);
                        continue;
                    }
                    eight_columns((const uint8_t *) s.weights->data + eight * s.n_blocks * BLOCK, s.n_blocks, pass,
                                  (float *) ((char *) s.dst->data + first * s.dst->nb[1]) + eight * COLUMNS, s.dst->nb[1]);
                }
            }
        }
        return true;
    }
};

Matmul matmul;

bool supported(const ggml_tensor * op) {
    const ggml_tensor *weights = op->src[0], *rows = op->src[1];
    const bool known = weights->type == GGML_TYPE_Q4_1
                           ? weights->nb[0] == BLOCK_1
                           : weights->type == GGML_TYPE_Q4_0 && weights->buffer
                                 && strcmp(ggml_functions.buffer_name(weights->buffer), "CPU_REPACK") == 0;
    return known && rows->type == GGML_TYPE_F32 && rows->ne[1] >= MIN_ROWS && rows->ne[2] == 1
        && rows->ne[3] == 1 && weights->ne[1] % COLUMNS == 0 && weights->ne[2] == 1 && weights->ne[3] == 1
        && rows->nb[0] == sizeof(float) && op->nb[0] == sizeof(float);
}

}  // namespace

ggml::cpu::tensor_traits * matmul_for(const ggml_tensor * op) { return supported(op) ? &matmul : nullptr; }

// How often it was called: a way to see that it is in use.
extern "C" int64_t matmul_calls() { return n_calls.load(std::memory_order_relaxed); }

#else

ggml::cpu::tensor_traits * matmul_for(const ggml_tensor *) { return nullptr; }

extern "C" int64_t matmul_calls() { return -1; }  // not for this kind of CPU

#endif
