// Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1 and Q8_0 times rows of activations on CPUs with AVX-512 and VNNI.
//
// Why it is here. vpdpbusd multiplies four unsigned with four signed bytes and adds them to 32 bits at once. llama.cpp
// gives it eight neighbouring columns with eight weights of each, so that two lanes hold what belongs together and the
// floats of a block are computed for eight columns at a time. Here a lane is a column: four weights each of sixteen
// columns, from two groups of eight, times four activations that the instruction itself spreads over all lanes. A
// block of 32 is eight such instructions and three on floats for sixteen columns. IQ4_NL differs by a table only: its
// values and 127 are unsigned bytes. Of the others, whose eight sums of a column stay apart to its end, two columns fill a
// vector; weights of Q5_0 and Q8_0 have signs, so there it is activations that are made unsigned.
//
// A single row waits for the weights: llama.cpp's kernels for it leave a third of what memory could give unused. Asking
// for lines some way ahead is what ours gain by.
//
// As in matmul_32.cpp, which tells how weights lie there, what makes them unsigned is taken off the sum, integers are
// exact, and floats are computed as llama.cpp does: same bits.

#include "rows_32.h"

#ifdef MATMUL_WITH_VNNI

namespace {

constexpr int COLUMNS = 16;       // computed together: two groups of eight
constexpr uint8_t TURNED = 0x80;  // bit of an activation that makes it unsigned, 128 more
constexpr int AHEAD = 3072;       // bytes: from where weights of a single row are asked for early

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

// Two columns' blocks side by side.
inline __m512i both(__m256i left, __m256i right) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
}

inline __mmask64 fifth_bits(const uint8_t * left, const uint8_t * right) {
    return fifth_bits(left) | __mmask64(fifth_bits(right)) << 32;
}

// The 32 weights of two columns' blocks as bytes.
struct Q4_1 : BlockQ4_1 {
    static __m512i weights(const uint8_t * left, const uint8_t * right) {
        return both(halves_of(left + HALVES), halves_of(right + HALVES));
    }
};

struct Q5_1 : BlockQ5_1 {
    static __m512i weights(const uint8_t * left, const uint8_t * right) {
        const __m512i sixteens = _mm512_maskz_set1_epi8(fifth_bits(left + FIFTHS, right + FIFTHS), 0x10);
        return _mm512_or_si512(both(halves_of(left + HALVES), halves_of(right + HALVES)), sixteens);
    }
};

struct Q5_0 : BlockQ5_0 {
    static __m512i weights(const uint8_t * left, const uint8_t * right) {
        const __mmask64 below = ~fifth_bits(left + FIFTHS, right + FIFTHS);
        const __m512i less = _mm512_maskz_set1_epi8(below, int8_t(0xf0));  // by 16
        return _mm512_or_si512(both(halves_of(left + HALVES), halves_of(right + HALVES)), less);
    }
};

struct Q8_0 : BlockQ8_0 {
    static __m512i weights(const uint8_t * left, const uint8_t * right) {
        return both(_mm256_loadu_si256((const __m256i *) (left + BYTES)),
                    _mm256_loadu_si256((const __m256i *) (right + BYTES)));
    }
};

inline __m512 two_floats(float left, float right) {
    return _mm512_insertf32x8(_mm512_set1_ps(left), _mm256_set1_ps(right), 1);
}

// Two columns for R rows from `first` on. Where weights have signs, activations have 128 on top (TURNED), which is
// taken off each sum of products from its beginning.
template <class Type, int R>
inline void rows_of_columns(const uint8_t * left, const uint8_t * right, int64_t n_blocks, const Pass & pass, int first,
                            float * to, size_t stride) {
    __m512 acc[R];
    float lowest[2][R] = {};
    for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, left += Type::SIZE, right += Type::SIZE) {
        const __m512i w = Type::weights(left, right), zero = _mm512_setzero_si512();
        const __m512 d = two_floats(half_float(left), half_float(right));
        const float * scale_of = scales(pass, b) + first;
        const __m512i top = _mm512_set1_epi8(int8_t(TURNED));
        const __m512i start = Type::LOWEST ? zero : _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, top, w));
        for (int r = 0; r < R; r++) {
            const __m256i one = _mm256_loadu_si256((const __m256i *) values(pass, b, first + r));
            const __m512i x = _mm512_broadcast_i64x4(one);
            const __m512i sum = Type::LOWEST ? _mm512_dpbusd_epi32(start, w, x) : _mm512_dpbusd_epi32(start, x, w);
            acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(scale_of[r])), _mm512_cvtepi32_ps(sum), acc[r]);
        }
        if (Type::LOWEST) {
            const float m[2] = {half_float(left + Type::LOWEST), half_float(right + Type::LOWEST)};
            const float * sum_of = scaled_sums(pass, b) + first;
            for (int side = 0; side < 2; side++) {
                for (int r = 0; r < R; r++) lowest[side][r] = fmaf(m[side], sum_of[r], lowest[side][r]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        float * row = (float *) ((char *) to + (first + r) * stride);
        row[0] = added_up(_mm512_castps512_ps256(acc[r])) + lowest[0][r];
        row[1] = added_up(_mm512_extractf32x8_ps(acc[r], 1)) + lowest[1][r];
    }
}

// The first two numbers of 16 bits of each of two blocks. Where a type has no lowest weight, the second means nothing.
inline __m128 two_of_each(const uint8_t * left, const uint8_t * right) {
    int32_t of_left, of_right;
    memcpy(&of_left, left, sizeof of_left);
    memcpy(&of_right, right, sizeof of_right);
    return _mm_cvtph_ps(_mm_insert_epi32(_mm_cvtsi32_si128(of_left), of_right, 1));
}

// The same of a single row: a scale and a scaled sum of each of two blocks.
inline __m128 two_of_each(const Pass & pass, int64_t b) {
    const __m128 first = _mm_loadl_pi(_mm_setzero_ps(), (const __m64 *) scales(pass, b));
    return _mm_loadh_pi(first, (const __m64 *) scales(pass, b + 1));
}

// One column for a single row. That waits for memory, so it is read as it lies there, two blocks of the column side by
// side instead of two columns; their floats are added one after the other.
template <class Type>
inline float one_of_column(const uint8_t * block, int64_t n_blocks, const Pass & pass) {
    static_assert(!Type::LOWEST || Type::LOWEST == 2, "two_of_each() takes the lowest weight from behind the scale");
    const __m512i zero = _mm512_setzero_si512(), top = _mm512_set1_epi8(int8_t(TURNED));
    __m256 acc = _mm256_setzero_ps();
    __m128 lowest = _mm_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b += 2, block += 2 * Type::SIZE) {
        const uint8_t * next = block + Type::SIZE;
        _mm_prefetch((const char *) block + AHEAD, _MM_HINT_T0);
        const __m512i w = Type::weights(block, next);
        const __m512i x = both(_mm256_loadu_si256((const __m256i *) values(pass, b, 0)),
                               _mm256_loadu_si256((const __m256i *) values(pass, b + 1, 0)));
        const __m512i sum = Type::LOWEST ? _mm512_dpbusd_epi32(zero, w, x)
                                         : _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, x, w),
                                                            _mm512_dpbusd_epi32(zero, top, w));
        const __m512 products = _mm512_cvtepi32_ps(sum);
        const __m128 of_weights = two_of_each(block, next), of_row = two_of_each(pass, b);
        const __m128 scale = _mm_mul_ps(of_weights, of_row);
        acc = _mm256_fmadd_ps(_mm256_broadcastss_ps(scale), _mm512_castps512_ps256(products), acc);
        const __m256 next_scale = _mm256_broadcastss_ps(_mm_movehl_ps(scale, scale));
        acc = _mm256_fmadd_ps(next_scale, _mm512_extractf32x8_ps(products, 1), acc);
        if (Type::LOWEST) {
            lowest = _mm_fmadd_ss(_mm_movehdup_ps(of_weights), _mm_movehdup_ps(of_row), lowest);
            lowest = _mm_fmadd_ss(_mm_permute_ps(of_weights, 3), _mm_permute_ps(of_row, 3), lowest);
        }
    }
    return added_up(acc) + _mm_cvtss_f32(lowest);
}

template <class Type>
void two_columns(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const uint8_t * left = (const uint8_t *) tensor->data + column * tensor->nb[1];
    const uint8_t * right = left + tensor->nb[1];
    if (pass.n == 1 && n_blocks % 2 == 0) {
        to[0] = one_of_column<Type>(left, n_blocks, pass);
        to[1] = one_of_column<Type>(right, n_blocks, pass);
        return;
    }
    int r = 0;
    for (; r + 8 <= pass.n; r += 8) rows_of_columns<Type, 8>(left, right, n_blocks, pass, r, to, stride);
    for (; r + 4 <= pass.n; r += 4) rows_of_columns<Type, 4>(left, right, n_blocks, pass, r, to, stride);
    for (; r + 2 <= pass.n; r += 2) rows_of_columns<Type, 2>(left, right, n_blocks, pass, r, to, stride);
    for (; r < pass.n; r++) rows_of_columns<Type, 1>(left, right, n_blocks, pass, r, to, stride);
}

template <class Type>
constexpr MatmulKernel by_column = {
    QK, Type::SIZE, ACTIVATION_BYTES, 2, Type::LOWEST ? quantize<0> : quantize<0, TURNED>, two_columns<Type>,
};

}  // namespace

const MatmulKernel matmul_q4_0 = {QK, BLOCK_0, ACTIVATION_BYTES, COLUMNS, quantize<OFFSET_0>, sixteen_columns<AsStored>};
const MatmulKernel matmul_iq4_nl = {QK, BLOCK_0, ACTIVATION_BYTES, COLUMNS, quantize<OFFSET_NL>, sixteen_columns<ByTable>};
const MatmulKernel matmul_q4_1 = by_column<Q4_1>;
const MatmulKernel matmul_q5_0 = by_column<Q5_0>;
const MatmulKernel matmul_q5_1 = by_column<Q5_1>;
const MatmulKernel matmul_q8_0 = by_column<Q8_0>;

#endif
