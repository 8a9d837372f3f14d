// Weights in blocks of 32, Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1 and Q8_0, times several rows of activations, on CPUs with
// AVX2.
//
// Why it is here. llama.cpp's kernel for Q4_0, which it keeps repacked, treats weights as signed bytes, which AVX2
// cannot multiply with signed bytes: each product costs two more instructions for the sign, and each pair of products
// one for widening. Here weights stay what Q4_0 stores, 0 to 15, which AVX2 multiplies with signed bytes as they are;
// the 8 that is to be taken off each weight is taken off the sum, as 8 times the sum of the activations. And four
// products of 15 * 127 fit 16 bits, so that a block of 32 is added up in 16 bits and widened once. With rows in 16s
// the weights are unpacked once for all. The sums are exact integers, and what is done to them in floats is what
// llama.cpp does, in its order: results are the same to the last bit, also as those of a single row, which llama.cpp's
// kernel computes here.
//
// IQ4_NL stores places in a table of signed bytes of up to 127. A product of these and of an activation fits 16 bits,
// a sum of four does not. So a value is taken apart: 127 more than it, 0 to 240, is 16 times one number below 16 plus
// another, and each is added up in 16 bits like Q4_0's. Eight columns have twice the registers then, so that four
// columns are computed after the other four.
//
// The other types llama.cpp computes as so many single rows, unpacking a column's weights anew for each. Here they are
// unpacked once for eight rows; again in its order of sums.
//
// The layout of Q4_0 is ggml's block_q4_0x8 (repack.h there): of 8 neighbouring columns, 8 scales in 16-bit
// floats, then 128 bytes, 8 of each column by turns; low halves are the first 16 weights of a block, high halves
// the others, with the top bit of each half turned over. The other types are as they are in the file: a block of one
// column has a scale, for Q4_1 and Q5_1 the lowest weight, for Q5_0 and Q5_1 the fifth bits, and the weights' other bits,
// in halves of bytes low ones first.

#include "rows_32.h"

#if defined(MATMUL_WITH_AVX2) && !defined(MATMUL_WITH_VNNI)

namespace {

// Eight columns of the product, for R rows from `first` on.
template <int R>
inline void rows_of_block(const __m256i * w, __m256 scale, const Pass & pass, int64_t b, int first, __m256 * acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    const float * scale_of = scales(pass, b) + first;
    const int32_t * sum_of = sums(pass, b) + first;
    for (int r = 0; r < R; r++) {
        const int64_t * x = (const int64_t *) values(pass, b, first + r);
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
        sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(sum_of[r]));
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(scale_of[r]));
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, acc[r]);
    }
}

void eight_columns(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const uint8_t * weights = (const uint8_t *) tensor->data + column / 8 * n_blocks * BLOCK_0X8;
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
    const __m256i low_half = _mm256_set1_epi8(0x0f), turned = _mm256_set1_epi8(int8_t(0x88));
    __m256 acc[MAX_ROWS];
    for (int r = 0; r < pass.n; r++) acc[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, weights += BLOCK_0X8) {
        _mm_prefetch((const char *) weights + 8 * BLOCK_0X8, _MM_HINT_T0);
        _mm_prefetch((const char *) weights + 8 * BLOCK_0X8 + 64, _MM_HINT_T0);
        __m256i w[8];  // w[2 * i]: weights 8 i to 8 i + 7 of columns 0 to 3, w[2 * i + 1] of columns 4 to 7
        for (int i = 0; i < 4; i++) {
            const __m256i raw = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) (weights + 16 + i * 32)), turned);
            w[i] = _mm256_and_si256(raw, low_half);
            w[i + 4] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low_half);
        }
        const __m256 in_order = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) weights));
        const __m256 scale = _mm256_permutevar8x32_ps(in_order, order);
        int r = 0;
        for (; r + 4 <= pass.n; r += 4) rows_of_block<4>(w, scale, pass, b, r, acc + r);
        for (; r < pass.n; r++) rows_of_block<1>(w, scale, pass, b, r, acc + r);
    }
    for (int r = 0; r < pass.n; r++) {
        _mm256_storeu_ps((float *) ((char *) to + r * stride), _mm256_permutevar8x32_ps(acc[r], order));
    }
}

// IQ4_NL's values and 127, taken apart; twice, as AVX2 looks up 16 bytes at a time.
struct Table {
    alignas(32) uint8_t high[32], low[32];

    constexpr Table() : high(), low() {
        constexpr int VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        for (int i = 0; i < 32; i++) {
            high[i] = uint8_t((VALUES[i % 16] + OFFSET_NL) / 16);
            low[i] = uint8_t((VALUES[i % 16] + OFFSET_NL) % 16);
        }
    }
};
constexpr Table TABLE;

// Four columns of a block of eight, 0 to 3 or 4 to 7 from `weights` on, times each row: in pairs of 32 bits, two a
// column.
inline void four_columns(const uint8_t * weights, const Pass & pass, int64_t b, __m256i * pairs) {
    const __m256i low_half = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
    const __m256i high_of = _mm256_load_si256((const __m256i *) TABLE.high);
    const __m256i low_of = _mm256_load_si256((const __m256i *) TABLE.low);
    __m256i high[4], low[4];  // weights 8 i to 8 i + 7 of each column
    for (int i = 0; i < 2; i++) {
        const __m256i raw = _mm256_loadu_si256((const __m256i *) (weights + i * 64));
        const __m256i first = _mm256_and_si256(raw, low_half);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low_half);
        high[i] = _mm256_shuffle_epi8(high_of, first);
        low[i] = _mm256_shuffle_epi8(low_of, first);
        high[i + 2] = _mm256_shuffle_epi8(high_of, second);
        low[i + 2] = _mm256_shuffle_epi8(low_of, second);
    }
    for (int r = 0; r < pass.n; r++) {
        const int64_t * x = (const int64_t *) values(pass, b, r);
        __m256i sixteenth = _mm256_setzero_si256(), rest = sixteenth;  // in 16 bits
        for (int i = 0; i < 4; i++) {
            int64_t eight;
            memcpy(&eight, x + i, sizeof eight);
            const __m256i a = _mm256_set1_epi64x(eight);
            sixteenth = _mm256_add_epi16(sixteenth, _mm256_maddubs_epi16(high[i], a));
            rest = _mm256_add_epi16(rest, _mm256_maddubs_epi16(low[i], a));
        }
        pairs[r] = _mm256_add_epi32(_mm256_madd_epi16(sixteenth, sixteens), _mm256_madd_epi16(rest, ones));
    }
}

void eight_columns_by_table(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const uint8_t * weights = (const uint8_t *) tensor->data + column / 8 * n_blocks * BLOCK_0X8;
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
    __m256i first[MAX_ROWS], second[MAX_ROWS];
    __m256 acc[MAX_ROWS];
    for (int r = 0; r < pass.n; r++) acc[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, weights += BLOCK_0X8) {
        _mm_prefetch((const char *) weights + 8 * BLOCK_0X8, _MM_HINT_T0);
        _mm_prefetch((const char *) weights + 8 * BLOCK_0X8 + 64, _MM_HINT_T0);
        const __m256 in_order = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) weights));
        const __m256 scale = _mm256_permutevar8x32_ps(in_order, order);
        four_columns(weights + 16, pass, b, first);
        four_columns(weights + 48, pass, b, second);
        for (int r = 0; r < pass.n; r++) {
            const __m256i sum = _mm256_sub_epi32(_mm256_hadd_epi32(first[r], second[r]),
                                                 _mm256_set1_epi32(sums(pass, b)[r]));
            const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(scales(pass, b)[r]));
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, acc[r]);
        }
    }
    for (int r = 0; r < pass.n; r++) {
        _mm256_storeu_ps((float *) ((char *) to + r * stride), _mm256_permutevar8x32_ps(acc[r], order));
    }
}

// 0x10 for each weight that has its fifth bit.
inline __m256i sixteens(const uint8_t * bits) {
    const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                             3, 3, 3, 3, 3, 3);
    const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(fifth_bits(bits))), byte_of);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
    return _mm256_and_si256(set, _mm256_set1_epi8(0x10));
}

// The 32 weights of a block as bytes.
struct Q4_1 : BlockQ4_1 {
    static __m256i weights(const uint8_t * block) { return halves_of(block + HALVES); }
};

struct Q5_1 : BlockQ5_1 {
    static __m256i weights(const uint8_t * block) {
        return _mm256_or_si256(halves_of(block + HALVES), sixteens(block + FIFTHS));
    }
};

struct Q5_0 : BlockQ5_0 {
    static __m256i weights(const uint8_t * block) {
        const __m256i stored = _mm256_or_si256(halves_of(block + HALVES), sixteens(block + FIFTHS));
        return _mm256_sub_epi8(stored, _mm256_set1_epi8(16));
    }
};

struct Q8_0 : BlockQ8_0 {
    static __m256i weights(const uint8_t * block) { return _mm256_loadu_si256((const __m256i *) (block + BYTES)); }
};

// One column for R rows from `first` on. Weights below 0 pass their sign on to what they are multiplied with.
template <class Type, int R>
inline void rows_of_column(const uint8_t * block, int64_t n_blocks, const Pass & pass, int first, float * to,
                           size_t stride) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[R];
    float lowest[R] = {};
    for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, block += Type::SIZE) {
        const __m256i w = Type::weights(block), size = Type::LOWEST ? w : _mm256_abs_epi8(w);
        const __m256 d = _mm256_set1_ps(half_float(block));
        const float * scale_of = scales(pass, b) + first;
        for (int r = 0; r < R; r++) {
            __m256i x = _mm256_loadu_si256((const __m256i *) values(pass, b, first + r));
            if (!Type::LOWEST) x = _mm256_sign_epi8(x, w);
            const __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(size, x), ones);
            acc[r] = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(scale_of[r])), _mm256_cvtepi32_ps(sum), acc[r]);
        }
        if (Type::LOWEST) {
            const float m = half_float(block + Type::LOWEST), * sum_of = scaled_sums(pass, b) + first;
            for (int r = 0; r < R; r++) lowest[r] = fmaf(m, sum_of[r], lowest[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        *(float *) ((char *) to + (first + r) * stride) = added_up(acc[r]) + lowest[r];
    }
}

template <class Type>
void one_column(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const uint8_t * weights = (const uint8_t *) tensor->data + column * tensor->nb[1];
    int r = 0;
    for (; r + 8 <= pass.n; r += 8) rows_of_column<Type, 8>(weights, n_blocks, pass, r, to, stride);
    for (; r + 4 <= pass.n; r += 4) rows_of_column<Type, 4>(weights, n_blocks, pass, r, to, stride);
    for (; r + 2 <= pass.n; r += 2) rows_of_column<Type, 2>(weights, n_blocks, pass, r, to, stride);
    for (; r < pass.n; r++) rows_of_column<Type, 1>(weights, n_blocks, pass, r, to, stride);
}

template <class Type>
constexpr MatmulKernel by_column = {QK, Type::SIZE, ACTIVATION_BYTES, 1, quantize<0>, one_column<Type>};

}  // namespace

const MatmulKernel matmul_q4_0 = {QK, BLOCK_0, ACTIVATION_BYTES, 8, quantize<OFFSET_0>, eight_columns};
const MatmulKernel matmul_iq4_nl = {QK, BLOCK_0, ACTIVATION_BYTES, 8, quantize<OFFSET_NL>, eight_columns_by_table};
const MatmulKernel matmul_q4_1 = by_column<Q4_1>;
const MatmulKernel matmul_q5_0 = by_column<Q5_0>;
const MatmulKernel matmul_q5_1 = by_column<Q5_1>;
const MatmulKernel matmul_q8_0 = by_column<Q8_0>;

#endif
