// Q4_0, IQ4_NL and Q4_1 times several rows of activations on CPUs with AVX-512 and VNNI.
//
// Why it is here. vpdpbusd multiplies four unsigned with four signed bytes and adds them to 32 bits at once. llama.cpp
// gives it eight neighbouring columns with eight weights of each, so that two lanes hold what belongs together and the
// floats of a block are computed for eight columns at a time. Here a lane is a column: four weights each of sixteen
// columns, from two groups of eight, times four activations that the instruction itself spreads over all lanes. A
// block of 32 is eight such instructions and three on floats for sixteen columns. IQ4_NL differs by a table only: its
// values and 127 are unsigned bytes. Of Q4_1, whose eight sums of a column stay apart to its end, two columns fill a
// vector.
//
// As in matmul_32.cpp, which tells how weights lie there, what makes them unsigned is taken off the sum, integers are
// exact, and floats are computed as llama.cpp does: same bits.

#include "rows_32.h"

#ifdef MATMUL_WITH_VNNI

#include <cmath>
#include <cstring>

namespace {

constexpr int COLUMNS = 16;  // computed together: two groups of eight

// Of Q4_0 the stored halves with the top bit turned over.
struct AsStored {
    static __m512i halves(__m512i raw) { return _mm512_xor_si512(raw, _mm512_set1_epi8(int8_t(0x88))); }
    static __m512i weights(__m512i half) { return half; }
};

// Of IQ4_NL places in a table: its values and 127.
struct ByTable {
    static __m512i halves(__m512i raw) { return raw; }
    static __m512i weights(__m512i half) {
        const __m128i table = _mm_setr_epi8(0, 23, 44, 62, 78, 92, 105, 117, int8_t(128), int8_t(140), int8_t(152),
                                            int8_t(165), int8_t(180), int8_t(196), int8_t(216), int8_t(240));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), half);
    }
};

// A block of sixteen columns: w[k] has weights 4 k to 4 k + 3 of each.
template <class Type>
inline void unpack(const uint8_t * left, const uint8_t * right, __m512i * w) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1)), low_half = _mm512_set1_epi8(0x0f);
    for (int i = 0; i < 2; i++) {
        const __m512i a = _mm512_loadu_si512(left + 64 * i), b = _mm512_loadu_si512(right + 64 * i);
        for (int k = 0; k < 2; k++) {
            const __m512i raw = Type::halves(_mm512_permutex2var_epi32(a, k ? odd : even, b));
            w[2 * i + k] = Type::weights(_mm512_and_si512(raw, low_half));
            w[2 * i + k + 4] = Type::weights(_mm512_and_si512(_mm512_srli_epi16(raw, 4), low_half));
        }
    }
}

inline __m256 eight_floats(const uint8_t * from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from)); }

// Sixteen columns of the product, for R rows from `first` on.
template <int R>
inline void rows_of_block(const __m512i * w, __m512 scale, const Pass & pass, int64_t b, int first, __m512 * acc) {
    const float * scale_of = scales(pass, b) + first;
    const int32_t * sum_of = sums(pass, b) + first;
    __m512i sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm512_set1_epi32(-sum_of[r]);
    for (int k = 0; k < 8; k++) {
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, values(pass, b, first + r) + 4 * k, sizeof four);
            sum[r] = _mm512_dpbusd_epi32(sum[r], w[k], _mm512_set1_epi32(four));
        }
    }
    for (int r = 0; r < R; r++) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scale_of[r]));
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), both, acc[r]);
    }
}

template <class Type>
void sixteen_columns(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const uint8_t * left = (const uint8_t *) tensor->data + column / 8 * n_blocks * BLOCK_0X8;
    const uint8_t * right = left + n_blocks * BLOCK_0X8;
    __m512 acc[MAX_ROWS];
    for (int r = 0; r < pass.n; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, left += BLOCK_0X8, right += BLOCK_0X8) {
        for (int line = 0; line < BLOCK_0X8; line += 64) {
            _mm_prefetch((const char *) left + 8 * BLOCK_0X8 + line, _MM_HINT_T0);
            _mm_prefetch((const char *) right + 8 * BLOCK_0X8 + line, _MM_HINT_T0);
        }
        __m512i w[8];
        unpack<Type>(left + 16, right + 16, w);
        const __m512 scale = _mm512_insertf32x8(_mm512_castps256_ps512(eight_floats(left)), eight_floats(right), 1);
        int r = 0;
        for (; r + 8 <= pass.n; r += 8) rows_of_block<8>(w, scale, pass, b, r, acc + r);
        for (; r + 4 <= pass.n; r += 4) rows_of_block<4>(w, scale, pass, b, r, acc + r);
        for (; r + 2 <= pass.n; r += 2) rows_of_block<2>(w, scale, pass, b, r, acc + r);
        for (; r < pass.n; r++) rows_of_block<1>(w, scale, pass, b, r, acc + r);
    }
    for (int r = 0; r < pass.n; r++) _mm512_storeu_ps((float *) ((char *) to + r * stride), acc[r]);
}

// A block of Q4_1: 32 weights, 0 to 15.
inline __m256i weights_of(const uint8_t * block) {
    const __m128i raw = _mm_loadu_si128((const __m128i *) (block + 4));
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(raw, 4), raw), _mm256_set1_epi8(0x0f));
}

// Scale and lowest weight of a block of Q4_1.
inline float half_float(const uint8_t * from) {
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
    return _cvtsh_ss(bits);
}

inline __m512 two_floats(float left, float right) {
    return _mm512_insertf32x8(_mm512_set1_ps(left), _mm256_set1_ps(right), 1);
}

// Two columns of Q4_1 for R rows from `first` on.
template <int R>
inline void rows_of_columns(const uint8_t * left, const uint8_t * right, int64_t n_blocks, const Pass & pass, int first,
                            float * to, size_t stride) {
    __m512 acc[R];
    float lowest[2][R] = {};
    for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, left += BLOCK_1, right += BLOCK_1) {
        const __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(weights_of(left)), weights_of(right), 1);
        const __m512 d = two_floats(half_float(left), half_float(right));
        const float m[2] = {half_float(left + 2), half_float(right + 2)};
        const float *scale_of = scales(pass, b) + first, *sum_of = scaled_sums(pass, b) + first;
        for (int r = 0; r < R; r++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *) values(pass, b, first + r));
            const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_broadcast_i64x4(x));
            acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(scale_of[r])), _mm512_cvtepi32_ps(sum), acc[r]);
        }
        for (int side = 0; side < 2; side++) {
            for (int r = 0; r < R; r++) lowest[side][r] = fmaf(m[side], sum_of[r], lowest[side][r]);
        }
    }
    for (int r = 0; r < R; r++) {
        float * row = (float *) ((char *) to + (first + r) * stride);
        row[0] = added_up(_mm512_castps512_ps256(acc[r])) + lowest[0][r];
        row[1] = added_up(_mm512_extractf32x8_ps(acc[r], 1)) + lowest[1][r];
    }
}

void two_columns(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const uint8_t * left = (const uint8_t *) tensor->data + column * tensor->nb[1];
    const uint8_t * right = left + tensor->nb[1];
    int r = 0;
    for (; r + 8 <= pass.n; r += 8) rows_of_columns<8>(left, right, n_blocks, pass, r, to, stride);
    for (; r + 4 <= pass.n; r += 4) rows_of_columns<4>(left, right, n_blocks, pass, r, to, stride);
    for (; r + 2 <= pass.n; r += 2) rows_of_columns<2>(left, right, n_blocks, pass, r, to, stride);
    for (; r < pass.n; r++) rows_of_columns<1>(left, right, n_blocks, pass, r, to, stride);
}

}  // namespace

const MatmulKernel matmul_q4_0 = {QK, BLOCK_0, ACTIVATION_BYTES, COLUMNS, quantize<OFFSET_0>, sixteen_columns<AsStored>};
const MatmulKernel matmul_iq4_nl = {QK, BLOCK_0, ACTIVATION_BYTES, COLUMNS, quantize<OFFSET_NL>, sixteen_columns<ByTable>};
const MatmulKernel matmul_q4_1 = {QK, BLOCK_1, ACTIVATION_BYTES, 2, quantize<0>, two_columns};

#endif
