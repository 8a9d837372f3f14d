// Rows of activations for weights in blocks of 32 (Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1, Q8_0), as they lie in a pass.

#pragma once

#include "matmul.h"

#ifdef MATMUL_WITH_AVX2

#include <immintrin.h>

#include <cmath>
#include <cstring>

namespace {

constexpr int QK = 32;          // weights of a block
constexpr int BLOCK_0 = 18;     // bytes of a block of Q4_0, or IQ4_NL
constexpr int BLOCK_0X8 = 144;  // of those of 8 columns, repacked
constexpr int32_t OFFSET_0 = 8;     // of a stored weight of Q4_0
constexpr int32_t OFFSET_NL = 127;  // of a value of IQ4_NL: none is negative with it

// Types whose columns are stored one after the other: bytes of a block and where in it lie its lowest weight (0: it has
// none), fifth bits, halves of bytes (low ones first) or whole bytes; its scale is at the beginning.
struct BlockQ4_1 {
    static constexpr int SIZE = 20, LOWEST = 2, HALVES = 4;
};
struct BlockQ5_0 {
    static constexpr int SIZE = 22, LOWEST = 0, FIFTHS = 2, HALVES = 6;
};
struct BlockQ5_1 {
    static constexpr int SIZE = 24, LOWEST = 2, FIFTHS = 4, HALVES = 8;
};
struct BlockQ8_0 {
    static constexpr int SIZE = 34, LOWEST = 0, BYTES = 2;
};

// A pass, block after block: first the values of each row, then a scale and the sum of each row: of the integers
// times the weights' offset for Q4_0 and IQ4_NL, scaled in 16 bits for Q4_1 and Q5_1.
constexpr size_t ACTIVATION_BYTES = QK + 2 * sizeof(float);
int8_t * values(const Pass & p, int64_t block, int row) { return p.at + block * p.n * ACTIVATION_BYTES + row * QK; }
float * scales(const Pass & p, int64_t block) { return (float *) values(p, block, p.n); }
int32_t * sums(const Pass & p, int64_t block) { return (int32_t *) scales(p, block) + p.n; }
float * scaled_sums(const Pass & p, int64_t block) { return scales(p, block) + p.n; }

// In the order in which llama.cpp adds up a column's eight sums.
inline float added_up(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// A number of 16 bits that a block holds, its scale or its lowest weight.
inline float half_float(const uint8_t * from) {
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
    return _cvtsh_ss(bits);
}

// Which weights of a block have a fifth bit: bit i for weight i.
inline uint32_t fifth_bits(const uint8_t * from) {
    uint32_t bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
}

// 32 halves of bytes, the low ones first.
inline __m256i halves_of(const uint8_t * from) {
    const __m128i raw = _mm_loadu_si128((const __m128i *) from);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(raw, 4), raw), _mm256_set1_epi8(0x0f));
}

inline float in_16_bits(float x) { return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

// As ggml quantizes to Q8_0 and Q8_1: the largest becomes 127, the scale is kept in 16 bits. OFFSET: what weights
// have, 0 for those whose sum is scaled. FLIPPED: bits of each value that are stored the other way round.
template <int32_t OFFSET, uint8_t FLIPPED = 0>
inline void quantize(const float * x, int64_t n_blocks, const Pass & pass, int row) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t b = 0; b < n_blocks; b++, x += QK) {
        __m256 v[4];
        __m256 top = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + i * 8);
            top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
        }
        __m128 half = _mm_max_ps(_mm256_extractf128_ps(top, 1), _mm256_castps256_ps128(top));
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
        const __m256i stored = _mm256_xor_si256(packed, _mm256_set1_epi8(int8_t(FLIPPED)));
        _mm256_storeu_si256((__m256i *) values(pass, b, row), _mm256_permutevar8x32_epi32(stored, order));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        s = _mm_hadd_epi32(s, s);
        const int32_t sum = _mm_cvtsi128_si32(_mm_hadd_epi32(s, s));
        const float scale = most / 127.0f;
        if (OFFSET == 0) {
            scaled_sums(pass, b)[row] = in_16_bits(scale * sum);
        } else {
            sums(pass, b)[row] = OFFSET * sum;
        }
        scales(pass, b)[row] = in_16_bits(scale);
    }
}

}  // namespace

#endif
