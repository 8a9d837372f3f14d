// Weights in blocks of 256, Q4_K, Q5_K and Q6_K, times rows of activations.
//
// Why it is here. One row costs llama.cpp little more than the time in which the weights come from memory (asking for
// them ahead gains the rest). More rows cost it their number of unpackings: its kernels for groups of rows start at
// four (Q4_K, which it keeps repacked) and eight (the others), are not much faster, and add up floats in another
// order, so that a row gets other bits beside others than alone. Here a block is unpacked once for up to 16 rows, and
// every row gets the bits that llama.cpp's kernel for one row gives it. For that only the few operations on floats
// must be the same in the same order (per block of 256: integer to float, scale times scale, a fused multiply-add);
// integers are exact however they are added up, as long as nothing overflows:
//
// - Activations are -127 to 127, scaled so that the largest becomes -127 or 127. Which of the two depends on what
//   finds it, but both the integers and the scale change their sign, which cancels out without a rounding.
// - A weight of Q4_K is 0 to 15 times a scale of its sub-block of 32 (6 bits), less a minimum of the sub-block (6
//   bits). maddubs multiplies unsigned with signed bytes and adds up pairs in 16 bits; four of these are at most
//   8 * 15 * 127 = 15,240, so that a sub-block is added up in 16 bits, and madd multiplies by its scale and widens in
//   one. The minimum is multiplied with the sum of the sub-block's activations.
// - A weight of Q6_K is 0 to 63, less 32, times a scale of its 16 weights (8 bits, signed). A pair is at most
//   2 * 63 * 127 = 16,002, and is multiplied by the scale at once. The 32 are taken off as 32 times the scale, which
//   fits 16 bits, times the sum of the 16 activations. llama.cpp keeps eight sums apart to the end of the column and
//   rounds each to a float once a block: sum l has bytes 4 l to 4 l + 3 of each 32, and less what is taken off for
//   the 16s 2 l and 2 l + 1, wherever these lie.
// - A weight of Q5_K is like one of Q4_K, but 0 to 31 and not repacked: it is computed like Q6_K, with its minima as a
//   single number beside the eight sums.

#include "matmul.h"

#ifdef MATMUL_WITH_AVX2

#include <cmath>
#include <cstring>
#include <immintrin.h>

namespace {

// Keeps the compiler from computing products long before they are added up: registers would not suffice (5 to 10 %).
#define IN_ORDER(sum) asm("" : "+x"(sum))

constexpr int QK = 256;  // weights of a block

// A row's block in a pass.
struct alignas(64) Activations {
    int8_t values[QK];
    int16_t sums_of_16[QK / 16];
    int16_t sums_of_32[QK / 32];
    float scale;
};

// ggml's block_q4_Kx8: of 8 neighbouring columns. `quants`: of each 64 weights 8 of each column by turns, low
// halves the first 32, high halves the others. `scales`: 12 bytes a sub-block, see unpack_scales().
struct EightQ4K {
    uint16_t scale[8], min_scale[8];  // 16-bit floats
    uint8_t scales[8][12];
    uint8_t quants[4][4][64];
};
static_assert(sizeof(EightQ4K) == 8 * 144, "as ggml has it");

// ggml's block_q5_K. `scales`: of the first four sub-blocks in the low 6 bits, then their minima; then of the others,
// the low halves of bytes the scales', which have 2 bits at the top of the first four, and so the minima. `low`: 32
// bytes a pair of sub-blocks, `high`: a bit a sub-block.
struct Q5K {
    uint16_t scale, min_scale;  // 16-bit floats
    uint8_t scales[12];
    uint8_t high[32];
    uint8_t low[4][32];
};
static_assert(sizeof(Q5K) == 176, "as ggml has it");

// ggml's block_q6_K. Of each half of the block: 64 bytes `low`, whose low and high halves are the low 4 bits of 64
// weights each, and 32 bytes `high`, each with 2 bits of 4 weights, 32 apart.
struct Q6K {
    uint8_t low[2][2][32];
    uint8_t high[2][32];
    int8_t scales[16];
    uint16_t scale;  // 16-bit float
};
static_assert(sizeof(Q6K) == 210, "as ggml has it");

inline Activations * rows_of(const Pass & pass, int64_t block) { return (Activations *) pass.at + block * pass.n; }

inline __m256i load(const void * from) { return _mm256_loadu_si256((const __m256i *) from); }

inline float largest(__m256 v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// As ggml's quantize_row_q8_K, up to the sign of all of a block.
void quantize(const float * x, int64_t n_blocks, const Pass & pass, int row) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), top_bit = _mm256_set1_epi8(int8_t(0x80));
    for (int64_t b = 0; b < n_blocks; b++, x += QK) {
        Activations & to = rows_of(pass, b)[row];
        __m256 most = _mm256_setzero_ps(), least = most;
        for (int i = 0; i < QK; i += 8) {
            most = _mm256_max_ps(most, _mm256_loadu_ps(x + i));
            least = _mm256_min_ps(least, _mm256_loadu_ps(x + i));
        }
        const float top = largest(most), bottom = largest(_mm256_sub_ps(_mm256_setzero_ps(), least));
        if (top == 0 && bottom == 0) {
            memset(&to, 0, sizeof to);
            continue;
        }
        const float by = -127.0f / (bottom > top ? -bottom : top);
        to.scale = 1.0f / by;
        for (int i = 0; i < QK; i += 32) {
            __m256i q[4];
            for (int j = 0; j < 4; j++) {
                q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + j * 8), _mm256_set1_ps(by)));
            }
            __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
            bytes = _mm256_permutevar8x32_epi32(bytes, order);
            _mm256_store_si256((__m256i *) (to.values + i), bytes);
            const __m256i unsigned_bytes = _mm256_xor_si256(bytes, top_bit);  // 128 more
            int64_t sums[4];  // of 8 each
            _mm256_storeu_si256((__m256i *) sums, _mm256_sad_epu8(unsigned_bytes, _mm256_setzero_si256()));
            to.sums_of_16[i / 16] = int16_t(sums[0] + sums[1] - 16 * 128);
            to.sums_of_16[i / 16 + 1] = int16_t(sums[2] + sums[3] - 16 * 128);
            to.sums_of_32[i / 32] = int16_t(to.sums_of_16[i / 16] + to.sums_of_16[i / 16 + 1]);
        }
    }
}

// 6 bits of 8 columns (Q4_K) or sub-blocks (Q5_K): the first four have them in the low bits of a word, the others 4
// bits in another word and 2 at the top of the first.
inline uint64_t six_bits(uint32_t first, uint32_t second) {
    return (first & 0x3f3f3f3f) | uint64_t((second & 0x0f0f0f0f) | ((first >> 2) & 0x30303030)) << 32;
}

// Scales and minima, a byte a column or sub-block.
inline void unpack_scales(const uint8_t * from, uint64_t & scales, uint64_t & minima) {
    uint32_t word[3];
    memcpy(word, from, sizeof word);
    scales = six_bits(word[0], word[2]);
    minima = six_bits(word[1], word[2] >> 4);
}

// Integer sums of a block: of each column two, to be added, in `low` (columns 0 to 3) and `high`.
struct Sums {
    __m256i low, high;
};

// One sub-block of eight columns for all rows: 32 weights in the low halves of `quants`, or, SHIFT 4, in the high
// ones. `values`: where its activations are in a row's block.
template <int SHIFT>
inline void add_sub_block(const uint8_t (&quants)[4][64], uint64_t scales, const Activations * rows, int n, int values,
                          Sums * sums) {
    __m256i w[8];  // w[2 * i]: weights 8 i to 8 i + 7 of columns 0 to 3, w[2 * i + 1] of columns 4 to 7
    for (int i = 0; i < 8; i++) {
        const __m256i raw = load(quants[i / 2] + i % 2 * 32);
        w[i] = _mm256_and_si256(_mm256_srli_epi16(raw, SHIFT), _mm256_set1_epi8(0x0f));
    }
    const __m256i spread = _mm256_setr_epi8(0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1, -1,
                                            2, -1, 2, -1, 2, -1, 2, -1, 3, -1, 3, -1, 3, -1, 3, -1);
    const __m256i scale_low = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(scales)), spread);
    const __m256i scale_high = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(scales >> 32)), spread);
    for (int r = 0; r < n; r++) {
        __m256i low = _mm256_setzero_si256(), high = low;
        for (int i = 0; i < 4; i++) {
            int64_t eight;
            memcpy(&eight, rows[r].values + values + 8 * i, sizeof eight);
            const __m256i a = _mm256_set1_epi64x(eight);
            low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w[2 * i], a));
            high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w[2 * i + 1], a));
            IN_ORDER(low);
            IN_ORDER(high);
        }
        sums[r].low = _mm256_add_epi32(sums[r].low, _mm256_madd_epi16(low, scale_low));
        sums[r].high = _mm256_add_epi32(sums[r].high, _mm256_madd_epi16(high, scale_high));
    }
}

// The floats of a block, for one row. `minima`: of pairs of sub-blocks, in 16 bits, columns 0 to 7, as `min_scale`;
// `scale` and `acc` are in the order of hadd.
inline void add_floats(const Sums & sums, const __m256i * minima, __m256 scale, __m256 min_scale,
                       const Activations & row, __m256 & acc, __m256 & acc_min) {
    __m256i min_sum = _mm256_setzero_si256();
    for (int pair = 0; pair < 4; pair++) {
        int32_t two;
        memcpy(&two, row.sums_of_32 + 2 * pair, sizeof two);
        min_sum = _mm256_add_epi32(min_sum, _mm256_madd_epi16(_mm256_set1_epi32(two), minima[pair]));
    }
    const __m256i sum = _mm256_hadd_epi32(sums.low, sums.high);
    const __m256 by = _mm256_set1_ps(row.scale);
    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, by), acc);
    acc_min = _mm256_fmadd_ps(_mm256_cvtepi32_ps(min_sum), _mm256_mul_ps(min_scale, by), acc_min);
}

inline __m256 eight_floats(const uint16_t * from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from)); }

void eight_columns(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);  // that hadd leaves columns in; its own inverse
    const int64_t n_blocks = tensor->ne[0] / QK;
    const int n = pass.n;
    const EightQ4K * block = (const EightQ4K *) tensor->data + column / 8 * n_blocks;
    __m256 acc[MAX_ROWS], acc_min[MAX_ROWS];
    for (int r = 0; r < n; r++) acc[r] = acc_min[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, block++) {
        const Activations * rows = rows_of(pass, b);
        Sums sums[MAX_ROWS];
        for (int r = 0; r < n; r++) sums[r].low = sums[r].high = _mm256_setzero_si256();
        __m256i minima[4];
        for (int pair = 0; pair < 4; pair++) {
            for (int i = 0; i < 5; i++) _mm_prefetch((const char *) (block + 2) + (pair * 5 + i) * 64, _MM_HINT_T0);
            uint64_t scales[2], mins[2];
            for (int i = 0; i < 2; i++) unpack_scales(block->scales[2 * pair + i], scales[i], mins[i]);
            const __m128i both = _mm_unpacklo_epi8(_mm_cvtsi64_si128(mins[0]), _mm_cvtsi64_si128(mins[1]));
            minima[pair] = _mm256_cvtepu8_epi16(both);
            add_sub_block<0>(block->quants[pair], scales[0], rows, n, pair * 64, sums);
            add_sub_block<4>(block->quants[pair], scales[1], rows, n, pair * 64 + 32, sums);
        }
        const __m256 scale = _mm256_permutevar8x32_ps(eight_floats(block->scale), order);
        const __m256 min_scale = eight_floats(block->min_scale);
        for (int r = 0; r < n; r++) add_floats(sums[r], minima, scale, min_scale, rows[r], acc[r], acc_min[r]);
    }
    for (int r = 0; r < n; r++) {
        const __m256 sum = _mm256_permutevar8x32_ps(acc[r], order);
        _mm256_storeu_ps((float *) ((char *) to + r * stride), _mm256_sub_ps(sum, acc_min[r]));
    }
}

// The weights of a block, 32 a vector, 0 to 63.
inline void unpack(const Q6K & block, __m256i * w) {
    const __m256i four_bits = _mm256_set1_epi8(0x0f), two_bits = _mm256_set1_epi8(0x30);
    const auto join = [&](__m256i low, __m256i high) {
        return _mm256_or_si256(_mm256_and_si256(low, four_bits), _mm256_and_si256(high, two_bits));
    };
    for (int half = 0; half < 2; half++) {
        const __m256i first = load(block.low[half][0]), second = load(block.low[half][1]);
        const __m256i high = load(block.high[half]);
        w[4 * half] = join(first, _mm256_slli_epi16(high, 4));
        w[4 * half + 1] = join(second, _mm256_slli_epi16(high, 2));
        w[4 * half + 2] = join(_mm256_srli_epi16(first, 4), high);
        w[4 * half + 3] = join(_mm256_srli_epi16(second, 4), _mm256_srli_epi16(high, 2));
    }
}

// Adds a block of one column for R rows to their eight sums each. `scales`: of each 32 weights, in their places.
template <int R>
inline void add_products(const __m256i * w, const __m256i * scales, const Activations * rows, __m256i * sums) {
    for (int i = 0; i < 8; i++) {
        for (int r = 0; r < R; r++) {
            const __m256i products = _mm256_maddubs_epi16(w[i], load(rows[r].values + 32 * i));
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(scales[i], products));
            IN_ORDER(sums[r]);
        }
    }
}

inline __m256 times(__m256 scale, const Activations & row) { return _mm256_mul_ps(scale, _mm256_set1_ps(row.scale)); }

// `offset`: 32 times the scales of the 16s.
template <int R>
inline void add_q6_k(const __m256i * w, const __m256i * scales, __m256i offset, __m256 scale, const Activations * rows,
                     __m256 * acc) {
    __m256i sums[R];
    for (int r = 0; r < R; r++) {
        sums[r] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_madd_epi16(load(rows[r].sums_of_16), offset));
    }
    add_products<R>(w, scales, rows, sums);
    for (int r = 0; r < R; r++) acc[r] = _mm256_fmadd_ps(times(scale, rows[r]), _mm256_cvtepi32_ps(sums[r]), acc[r]);
}

// `minima`: of the sub-blocks, in 16 bits; `lowest` adds up what they take off.
template <int R>
inline void add_q5_k(const __m256i * w, const __m256i * scales, __m128i minima, __m256 scale, float min_scale,
                     const Activations * rows, __m256 * acc, float * lowest) {
    __m256i sums[R];
    for (int r = 0; r < R; r++) sums[r] = _mm256_setzero_si256();
    add_products<R>(w, scales, rows, sums);
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_fmadd_ps(times(scale, rows[r]), _mm256_cvtepi32_ps(sums[r]), acc[r]);
        __m128i taken = _mm_madd_epi16(minima, _mm_load_si128((const __m128i *) rows[r].sums_of_32));
        taken = _mm_add_epi32(taken, _mm_shuffle_epi32(taken, 0x4e));
        taken = _mm_add_epi32(taken, _mm_shuffle_epi32(taken, 0xb1));
        lowest[r] = fmaf(-rows[r].scale * min_scale, float(_mm_cvtsi128_si32(taken)), lowest[r]);
    }
}

inline float added_up(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float & result(float * to, size_t stride, int row) { return *(float *) ((char *) to + row * stride); }

void column_of_q6_k(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const int n = pass.n;
    const Q6K * block = (const Q6K *) ((const char *) tensor->data + column * tensor->nb[1]);
    const __m128i even_then_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    __m256 acc[MAX_ROWS];
    for (int r = 0; r < n; r++) acc[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++, block++) {
        const Activations * rows = rows_of(pass, b);
        for (int i = 0; i < 4; i++) _mm_prefetch((const char *) (block + 8) + i * 64, _MM_HINT_T0);
        __m256i w[8], scales[8];
        unpack(*block, w);
        const __m128i bytes = _mm_loadu_si128((const __m128i *) block->scales);
        const __m256i offset = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 5);
        const __m256i halves = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, even_then_odd));
        for (int i = 0; i < 8; i++) {
            scales[i] = _mm256_shuffle_epi8(halves, _mm256_set1_epi16(int16_t((2 * i + 1) << 8 | 2 * i)));
        }
        const __m256 scale = _mm256_set1_ps(_cvtsh_ss(block->scale));
        int r = 0;
        for (; r + 2 <= n; r += 2) add_q6_k<2>(w, scales, offset, scale, rows + r, acc + r);
        for (; r < n; r++) add_q6_k<1>(w, scales, offset, scale, rows + r, acc + r);
    }
    for (int r = 0; r < n; r++) result(to, stride, r) = added_up(acc[r]);
}

// The weights of a block, 32 a vector, 0 to 31.
inline void unpack(const Q5K & block, __m256i * w) {
    const __m256i four_bits = _mm256_set1_epi8(0x0f), fifth_bit = _mm256_set1_epi8(0x10), high = load(block.high);
    for (int i = 0; i < 8; i++) {
        const __m256i low = _mm256_srli_epi16(load(block.low[i / 2]), i % 2 * 4);
        const __m256i bit = i < 4 ? _mm256_slli_epi16(high, 4 - i) : _mm256_srli_epi16(high, i - 4);
        w[i] = _mm256_or_si256(_mm256_and_si256(low, four_bits), _mm256_and_si256(bit, fifth_bit));
    }
}

void column_of_q5_k(const ggml_tensor * tensor, int64_t column, const Pass & pass, float * to, size_t stride) {
    const int64_t n_blocks = tensor->ne[0] / QK;
    const int n = pass.n;
    const Q5K * block = (const Q5K *) ((const char *) tensor->data + column * tensor->nb[1]);
    __m256 acc[MAX_ROWS];
    float lowest[MAX_ROWS];
    for (int r = 0; r < n; r++) acc[r] = _mm256_setzero_ps(), lowest[r] = 0;
    for (int64_t b = 0; b < n_blocks; b++, block++) {
        const Activations * rows = rows_of(pass, b);
        for (int i = 0; i < 3; i++) _mm_prefetch((const char *) (block + 8) + i * 64, _MM_HINT_T0);
        __m256i w[8], scales[8];
        unpack(*block, w);
        uint64_t scale_bytes, min_bytes;
        unpack_scales(block->scales, scale_bytes, min_bytes);
        const __m256i all = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scale_bytes)));
        for (int i = 0; i < 8; i++) {
            scales[i] = _mm256_shuffle_epi8(all, _mm256_set1_epi16(int16_t((2 * i + 1) << 8 | 2 * i)));
        }
        const __m128i minima = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(min_bytes));
        const __m256 scale = _mm256_set1_ps(_cvtsh_ss(block->scale));
        const float min_scale = _cvtsh_ss(block->min_scale);
        int r = 0;
        for (; r + 2 <= n; r += 2) add_q5_k<2>(w, scales, minima, scale, min_scale, rows + r, acc + r, lowest + r);
        for (; r < n; r++) add_q5_k<1>(w, scales, minima, scale, min_scale, rows + r, acc + r, lowest + r);
    }
    for (int r = 0; r < n; r++) result(to, stride, r) = added_up(acc[r]) + lowest[r];
}

}  // namespace

const MatmulKernel matmul_q4_k = {QK, sizeof(EightQ4K) / 8, sizeof(Activations), 8, quantize, eight_columns};
const MatmulKernel matmul_q5_k = {QK, sizeof(Q5K), sizeof(Activations), 1, quantize, column_of_q5_k};
const MatmulKernel matmul_q6_k = {QK, sizeof(Q6K), sizeof(Activations), 1, quantize, column_of_q6_k};

#endif
