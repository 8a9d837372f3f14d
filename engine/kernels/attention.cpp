// Attention on the CPU, for llama.cpp's GGML_OP_FLASH_ATTN_EXT with keys and values in 16-bit floats.
//
// Why it is here. llama.cpp has three ways through this operation on a CPU: one query at a time with sums in 16
// bits, tiles of 64 queries in 32 bits, and a lone query in pieces, one a thread. Which one computes a token
// depends on what else is in the call, so that the same text comes out differently beside others. And the
// first one, which is all that writing ever takes, spends most of its time on converting between 16 and 32 bits.
// Here is one way for all: what a token gets depends on its own query and cells alone, to the last bit, and a
// key is converted once for all query heads and tokens of a block.
//
// The arithmetic of a row (one query head of one token):
//   score_j = dot(scale * q, k_j) + slope * mask_j    along the head, one product after the other
//             with a cap: cap * tanh(dot(scale / cap * q, k_j)) + slope * mask_j
//   cells in segments of SEGMENT: m = max(score), p_j = exp(score_j - m), l = sum(p), o = sum(p_j * v_j) in order
//   segments joined in order:     M' = max(M, m), o = o * exp(M - M') + o_s * exp(m - M'), l likewise
// Neither the number of rows of a block nor the number of threads changes the order of any sum.

#include "plugin.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

// Eight floats at a time

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
constexpr int LANES = 8;

inline f32x8 all(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

inline f32x8 load(const float * from) {
    f32x8 x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float * to, f32x8 x) { memcpy(to, &x, sizeof x); }

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

inline f32x8 load(const ggml_fp16_t * from) { return (f32x8) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from)); }
inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return (f32x8) _mm256_fmadd_ps((__m256) a, (__m256) b, (__m256) c); }
inline f32x8 max(f32x8 a, f32x8 b) { return (f32x8) _mm256_max_ps((__m256) a, (__m256) b); }

inline float sum(f32x8 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256) x), _mm256_extractf128_ps((__m256) x, 1));
    y = _mm_hadd_ps(y, y);
    return _mm_cvtss_f32(_mm_hadd_ps(y, y));
}

inline void prefetch(const void * from) { _mm_prefetch((const char *) from, _MM_HINT_T0); }

// to[i][j] = from[j][i], of 8 rows of 8 halves
inline void transpose(const char * from, size_t stride, float * to, size_t to_stride) {
    __m128i x[8], y[8];
    for (int i = 0; i < 8; i++) x[i] = _mm_loadu_si128((const __m128i *) (from + i * stride));
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        for (int half = 0; half < 2; half++) {
            x[4 * i + 2 * half] = _mm_unpacklo_epi32(y[4 * i + half], y[4 * i + 2 + half]);
            x[4 * i + 2 * half + 1] = _mm_unpackhi_epi32(y[4 * i + half], y[4 * i + 2 + half]);
        }
    }
    for (int i = 0; i < 4; i++) {
        store(to + (2 * i) * to_stride, (f32x8) _mm256_cvtph_ps(_mm_unpacklo_epi64(x[i], x[i + 4])));
        store(to + (2 * i + 1) * to_stride, (f32x8) _mm256_cvtph_ps(_mm_unpackhi_epi64(x[i], x[i + 4])));
    }
}

#else

#if defined(__ARM_FP16_FORMAT_IEEE)
inline f32x8 load(const ggml_fp16_t * from) {
    typedef __fp16 f16x8 __attribute__((vector_size(16)));
    f16x8 x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, f32x8);
}
#else
inline f32x8 load(const ggml_fp16_t * from) {  // bits moved to where 32-bit floats have them, the exponent scaled
    i32x8 bits;
    for (int i = 0; i < LANES; i++) bits[i] = from[i];
    const i32x8 sign = (bits & 0x8000) << 16;
    const f32x8 x = (f32x8) ((bits & 0x7fff) << 13) * all(0x1p112f);
    const i32x8 infinite = (bits & 0x7c00) == 0x7c00;
    return (f32x8) ((i32x8) x | sign | (infinite & 0x7f800000));
}
#endif

inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return a * b + c; }
inline f32x8 max(f32x8 a, f32x8 b) { return a > b ? a : b; }

inline float sum(f32x8 x) {
    float y[4];
    for (int i = 0; i < 4; i++) y[i] = x[i] + x[i + 4];
    return (y[0] + y[1]) + (y[2] + y[3]);
}

inline void prefetch(const void * from) { __builtin_prefetch(from); }

inline void transpose(const char * from, size_t stride, float * to, size_t to_stride) {
    for (int j = 0; j < LANES; j++) {
        const f32x8 x = load((const ggml_fp16_t *) (from + j * stride));
        for (int i = 0; i < LANES; i++) to[i * to_stride + j] = x[i];
    }
}

#endif

inline float highest(f32x8 x) {
    float y = x[0];
    for (int i = 1; i < LANES; i++) y = x[i] > y ? x[i] : y;
    return y;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87, and so for masked cells (-inf). x = n ln 2 + r,
// |r| <= ln(2) / 2, exp(r) as its Taylor polynomial of degree 7, 2^n put into the exponent.
inline f32x8 exp_negative(f32x8 x) {
    const f32x8 clamped = max(x, all(-87.0f));
    const f32x8 magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const f32x8 shifted = fma(clamped, all(1.44269504088896341f), magic);
    const f32x8 n = shifted - magic;
    f32x8 r = fma(n, all(-0.693145751953125f), clamped);  // ln 2 in two parts, the first one exact
    r = fma(n, all(-1.42860682030941723212e-6f), r);
    f32x8 p = all(1.0f / 5040);
    p = fma(p, r, all(1.0f / 720));
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    const i32x8 power = ((i32x8) shifted + 127) << 23;
    const f32x8 y = p * (f32x8) power;
    return (f32x8) ((i32x8) y & (i32x8) (x >= all(-87.0f)));
}

inline f32x8 tanh(f32x8 x) {
    const f32x8 e = exp_negative(all(-2.0f) * max(x, -x));
    const f32x8 y = (all(1.0f) - e) / (all(1.0f) + e);
    return x < all(0) ? -y : y;
}

// One block: up to MAX_ROWS rows that look at the same key head of the same stream

constexpr int TILE = 32;      // cells that are converted at a time
constexpr int SEGMENT = 256;  // cells with one maximum
constexpr int MAX_ROWS = 48;  // of a block
constexpr int FEW_ROWS = 6;   // up to here converting values in registers beats converting them into memory first
constexpr ggml_fp16_t MASKED = 0xFC00;  // -inf

enum class Sight : uint8_t { none, some, all };  // what a query sees of a tile

struct Shape {
    const ggml_tensor *q, *k, *v, *mask, *sinks, *dst;
    int64_t dk, dv, n_cells, n_queries, n_heads, n_kv_heads, n_streams;
    int group;          // query heads of a key head
    int block;          // queries of a block
    int n_blocks;       // of queries
    int n_segments;
    int64_t n_items;    // streams x key heads x blocks
    bool split;         // segments are computed on their own and joined at the end
    float scale, max_bias, cap;

    explicit Shape(const ggml_tensor * op, int n_threads)
        : q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]), sinks(op->src[4]), dst(op) {
        dk = k->ne[0];
        dv = v->ne[0];
        n_cells = k->ne[1];
        n_queries = q->ne[1];
        n_heads = q->ne[2];
        n_kv_heads = k->ne[2];
        n_streams = q->ne[3];
        group = int(n_heads / n_kv_heads);
        block = std::max<int>(1, MAX_ROWS / group);
        n_blocks = int((n_queries + block - 1) / block);
        n_segments = int((n_cells + SEGMENT - 1) / SEGMENT);
        n_items = n_streams * n_kv_heads * n_blocks;
        split = n_threads > 1 && n_segments > 1 && n_blocks == 1 && n_items < 4 * n_threads;
        memcpy(&scale, (const float *) op->op_params + 0, sizeof scale);
        memcpy(&max_bias, (const float *) op->op_params + 1, sizeof max_bias);
        memcpy(&cap, (const float *) op->op_params + 2, sizeof cap);
        if (cap != 0) scale /= cap;
    }

    static int64_t rounded(int64_t n) { return (n + 15) / 16 * 16; }

    // Floats of one thread: rows of queries, scores, sums and outputs, and the two tiles.
    int64_t scratch() const {
        return rounded(MAX_ROWS * (dk + SEGMENT + 2 * dv + 4)) + rounded(TILE * dk) + rounded(TILE * dv);
    }

    // Floats of one row of one segment: maximum, sum, output.
    int64_t partial() const { return dv + 2; }

    int64_t work(int n_threads) const {
        const int64_t partials = split ? n_streams * n_heads * n_queries * n_segments * partial() : 0;
        return n_threads * scratch() + partials;
    }
};

struct Item {
    int64_t stream, kv_head, first;  // first query
    int n_queries, n_rows;
};

struct Scratch {
    float *q, *scores, *out, *segment_out, *max, *sum, *segment_max, *segment_sum, *k_tile, *v_tile;

    Scratch(const Shape & s, float * at) {
        q = at, at += MAX_ROWS * s.dk;
        scores = at, at += MAX_ROWS * SEGMENT;
        out = at, at += MAX_ROWS * s.dv;
        segment_out = at, at += MAX_ROWS * s.dv;
        max = at, at += MAX_ROWS;
        sum = at, at += MAX_ROWS;
        segment_max = at, at += MAX_ROWS;
        segment_sum = at, at += MAX_ROWS;
        k_tile = at, at += Shape::rounded(TILE * s.dk);
        v_tile = at;
    }
};

// Scores of R rows with the keys of a tile, which stand in columns: tile[d][key].
template <int R>
void score_tile(const float * const * q, const float * tile, int64_t dk, float * const * to) {
    constexpr int C = TILE / LANES;
    f32x8 acc[R][C] = {};
    for (int64_t d = 0; d < dk; d++, tile += TILE) {
        f32x8 x[R];
        for (int r = 0; r < R; r++) x[r] = all(q[r][d]);
        for (int c = 0; c < C; c++) {
            const f32x8 keys = load(tile + c * LANES);
            for (int r = 0; r < R; r++) acc[r][c] = fma(x[r], keys, acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(to[r] + c * LANES, acc[r][c]);
}

// Adds p_j * v_j of a tile to R rows' outputs, C vectors of the head at a time, in the order of the cells.
template <int R, int C, typename V>
inline void weigh(const float * const * p, const char * values, size_t stride, int n, int64_t d, float * const * out) {
    f32x8 acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = load(out[r] + d + c * LANES);
    for (int j = 0; j < n; j++) {
        const V * value = (const V *) (values + j * stride) + d;
        f32x8 weight[R];
        for (int r = 0; r < R; r++) weight[r] = all(p[r][j]);
        for (int c = 0; c < C; c++) {
            const f32x8 x = load(value + c * LANES);
            for (int r = 0; r < R; r++) acc[r][c] = fma(weight[r], x, acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out[r] + d + c * LANES, acc[r][c]);
}

template <int R, typename V>
void weigh_tile(const float * const * p, const char * values, size_t stride, int n, int64_t dv, float * const * out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dv; d += 4 * LANES) weigh<R, 4, V>(p, values, stride, n, d, out);
    for (; d < dv; d += LANES) weigh<R, 1, V>(p, values, stride, n, d, out);
}

// Keys of a tile into columns.
void turn(const char * from, size_t stride, int n, int64_t dk, float * to) {
    for (int j = 0; j < n; j += LANES) {
        for (int i = 0; i < LANES; i++)
            for (int64_t d = 0; d < dk; d += 32) prefetch(from + (j + i + TILE) * stride + d * 2);
        for (int64_t d = 0; d < dk; d += LANES) transpose(from + j * stride + d * 2, stride, to + d * TILE + j, TILE);
    }
    for (int64_t d = 0; n < TILE && d < dk; d++) memset(to + d * TILE + n, 0, (TILE - n) * sizeof(float));
}

// `finite`: infinities and NaN become the largest number, so that a weight of 0 makes nothing of them.
void convert(const char * from, size_t stride, int n, int64_t width, float * to, bool finite) {
    const f32x8 most = all(65504.0f);
    for (int j = 0; j < n; j++, from += stride, to += width) {
        for (int64_t d = 0; d < width; d += LANES) {
            const f32x8 x = load((const ggml_fp16_t *) from + d);
            store(to + d, finite ? (max(x, -x) <= most ? x : most) : x);
        }
    }
}

const ggml_fp16_t * mask_of(const Shape & s, const Item & item, int query) {
    if (!s.mask) return nullptr;
    // Every head has the same mask: ggml allows one a head, llama.cpp never makes one, and supported() checks.
    return (const ggml_fp16_t *) ((const char *) s.mask->data + (item.first + query) * s.mask->nb[1]
                                  + (item.stream % s.mask->ne[3]) * s.mask->nb[3]);
}

Sight sight(const ggml_fp16_t * mask, int n) {
    if (!mask) return Sight::all;
    uint64_t open = 0, closed = 0;  // bits that are not as they would be
    for (int j = 0; j < n; j += 4) {
        uint64_t four;
        memcpy(&four, mask + j, sizeof four);
        open |= four;
        closed |= four ^ (MASKED * 0x0001000100010001u);
    }
    return closed == 0 ? Sight::none : open == 0 ? Sight::all : Sight::some;
}

// ALiBi: how much a head minds distance; 1 without.
float slope_of(const Shape & s, int64_t head) {
    if (s.max_bias <= 0) return 1.0f;
    const uint32_t n = 1u << (uint32_t) floor(log2(double(s.n_heads)));
    return head < n ? powf(powf(2.0f, -s.max_bias / n), head + 1)
                    : powf(powf(2.0f, -s.max_bias / 2 / n), 2 * (head - n) + 1);
}

struct Block {
    const Shape & s;
    const Item & item;
    Scratch & at;
    const char *keys, *values;

    Block(const Shape & s, const Item & item, Scratch & at) : s(s), item(item), at(at) {
        keys = (const char *) s.k->data + item.kv_head * s.k->nb[2] + item.stream * s.k->nb[3];
        values = (const char *) s.v->data + item.kv_head * s.v->nb[2] + item.stream * s.v->nb[3];
        for (int row = 0; row < item.n_rows; row++) {  // rows of one query lie together
            const float * from = (const float *) ((const char *) s.q->data + (item.first + row / s.group) * s.q->nb[1]
                                                  + head(row) * s.q->nb[2] + item.stream * s.q->nb[3]);
            for (int64_t d = 0; d < s.dk; d += LANES) store(at.q + row * s.dk + d, load(from + d) * all(s.scale));
        }
    }

    int64_t head(int row) const { return item.kv_head * s.group + row % s.group; }

    // Rows that see something of a tile, and whether their masks count.
    int seeing(int64_t cell, int n, int * rows, bool * masked) const {
        int count = 0;
        for (int query = 0; query < item.n_queries; query++) {
            const ggml_fp16_t * mask = mask_of(s, item, query);
            const Sight what = sight(mask ? mask + cell : nullptr, n);
            if (what == Sight::none) continue;
            for (int row = query * s.group; row < (query + 1) * s.group; row++) {
                masked[count] = what == Sight::some;
                rows[count++] = row;
            }
        }
        return count;
    }

    void score(int64_t cell, int n, const int * rows, const bool * masked, int count, int column) {
        for (int j = 0; j < n; j++)  // by the time that the scores are done, they are here
            for (int64_t d = 0; d < s.dv; d += 32) prefetch(values + (cell + j) * s.v->nb[1] + d * 2);
        turn(keys + cell * s.k->nb[1], s.k->nb[1], n, s.dk, at.k_tile);
        for (int i = 0; i < count; i += 3) {
            const int r = std::min(3, count - i);
            const float * q[3];
            float * to[3];
            for (int j = 0; j < r; j++) {
                q[j] = at.q + rows[i + j] * s.dk;
                to[j] = at.scores + rows[i + j] * SEGMENT + column;
            }
            (r == 3 ? score_tile<3> : r == 2 ? score_tile<2> : score_tile<1>)(q, at.k_tile, s.dk, to);
        }
        for (int i = 0; i < count; i++) {
            float * to = at.scores + rows[i] * SEGMENT + column;
            for (int j = 0; s.cap != 0 && j < n; j += LANES) store(to + j, all(s.cap) * tanh(load(to + j)));
            for (int j = n; j < TILE; j++) to[j] = -INFINITY;
            if (!masked[i]) continue;
            const ggml_fp16_t * mask = mask_of(s, item, rows[i] / s.group) + cell;
            const float slope = slope_of(s, head(rows[i]));
            for (int j = 0; j < n; j += LANES) {
                const f32x8 m = load(mask + j);  // what is masked is so whatever lies there, NaN too
                store(to + j, m == all(-INFINITY) ? m : fma(m, all(slope), load(to + j)));
            }
        }
    }

    void weigh_values(int64_t cell, int n, const int * rows, int count, int column, bool masked) {
        const char * from = values + cell * s.v->nb[1];
        size_t stride = s.v->nb[1];
        const bool converted = count > FEW_ROWS || masked;
        if (converted) {
            convert(from, stride, n, s.dv, at.v_tile, masked);
            from = (const char *) at.v_tile;
            stride = s.dv * sizeof(float);
        }
        for (int i = 0; i < count; i += 3) {
            const int r = std::min(3, count - i);
            const float * p[3];
            float * to[3];
            for (int j = 0; j < r; j++) {
                p[j] = at.scores + rows[i + j] * SEGMENT + column;
                to[j] = at.segment_out + rows[i + j] * s.dv;
            }
            if (converted) {
                (r == 3 ? weigh_tile<3, float> : r == 2 ? weigh_tile<2, float> : weigh_tile<1, float>)(p, from, stride, n, s.dv, to);
            } else {
                (r == 3 ? weigh_tile<3, ggml_fp16_t> : r == 2 ? weigh_tile<2, ggml_fp16_t> : weigh_tile<1, ggml_fp16_t>)(
                    p, from, stride, n, s.dv, to);
            }
        }
    }

    // Maximum, sum and output of each row over one segment.
    void segment(int number) {
        constexpr int N_TILES = SEGMENT / TILE;
        const int64_t first = int64_t(number) * SEGMENT;
        int rows[N_TILES][MAX_ROWS], count[N_TILES], length[N_TILES];
        bool masked[MAX_ROWS], seen[MAX_ROWS] = {}, partly[N_TILES] = {};
        int n_tiles = 0;
        for (; n_tiles < N_TILES && first + n_tiles * TILE < s.n_cells; n_tiles++) {
            const int64_t cell = first + n_tiles * TILE;
            const int n = length[n_tiles] = int(std::min<int64_t>(TILE, s.n_cells - cell));
            const int c = count[n_tiles] = seeing(cell, n, rows[n_tiles], masked);
            if (c) score(cell, n, rows[n_tiles], masked, c, n_tiles * TILE);
            for (int i = 0; i < c; i++) partly[n_tiles] |= masked[i];
            int i = 0;
            for (int row = 0; row < item.n_rows; row++) {  // whoever sees nothing of the tile has no scores there
                if (i < c && rows[n_tiles][i] == row) {
                    seen[row] = true, i++;
                } else {
                    for (int j = 0; j < TILE; j += LANES) store(at.scores + row * SEGMENT + n_tiles * TILE + j, all(-INFINITY));
                }
            }
        }
        for (int row = 0; row < item.n_rows; row++) {
            at.segment_max[row] = -INFINITY;
            at.segment_sum[row] = 0;
            if (seen[row]) soften(row, n_tiles * TILE);
        }
        memset(at.segment_out, 0, item.n_rows * s.dv * sizeof(float));
        for (int tile = 0; tile < n_tiles; tile++) {
            if (!count[tile]) continue;
            weigh_values(first + tile * TILE, length[tile], rows[tile], count[tile], tile * TILE, partly[tile]);
        }
    }

    // Scores become weights relative to the highest.
    void soften(int row, int n) {
        float * p = at.scores + row * SEGMENT;
        f32x8 top = load(p);
        for (int j = LANES; j < n; j += LANES) top = max(top, load(p + j));
        const float m = highest(top);
        if (m == -INFINITY) return;
        f32x8 total = all(0);
        for (int j = 0; j < n; j += LANES) {
            const f32x8 weight = exp_negative(load(p + j) - all(m));
            store(p + j, weight);
            total += weight;
        }
        at.segment_max[row] = m;
        at.segment_sum[row] = sum(total);
    }
};

// Adds one segment of a row to those before it. Compiled once: wherever it is called, sums are contracted alike.
__attribute__((noinline)) void join(float m, float l, const float * from, int64_t dv, float & max, float & total, float * out) {
    if (m == -INFINITY) return;
    if (max == -INFINITY) {
        max = m, total = l;
        memcpy(out, from, dv * sizeof(float));
        return;
    }
    const float highest = m > max ? m : max;
    const float before = expf(max - highest), now = expf(m - highest);
    for (int64_t d = 0; d < dv; d += LANES) store(out + d, fma(load(out + d), all(before), load(from + d) * all(now)));
    total = total * before + l * now;
    max = highest;
}

__attribute__((noinline)) void finish(const Shape & s, int64_t stream, int64_t head, int64_t query, float max, float total, float * out) {
    float factor = 1;
    if (s.sinks) {  // one more score, without a value
        const float sink = ((const float *) s.sinks->data)[head];
        const float highest = sink > max ? sink : max;
        factor = max == -INFINITY ? 0.0f : expf(max - highest);
        total = total * factor + expf(sink - highest);
    }
    const float by = total == 0 ? 0.0f : factor / total;
    float * to = (float *) ((char *) s.dst->data + head * s.dst->nb[1] + query * s.dst->nb[2] + stream * s.dst->nb[3]);
    for (int64_t d = 0; d < s.dv; d += LANES) store(to + d, load(out + d) * all(by));
}

std::atomic<int64_t> n_calls{0};

Item item_of(const Shape & s, int64_t number) {
    const int64_t streams_and_heads = s.n_streams * s.n_kv_heads;
    // The last queries of a prompt see most cells: they go first, so that no thread is left with one at the end.
    const int64_t block = s.n_blocks - 1 - number / streams_and_heads;
    const int64_t rest = number % streams_and_heads;
    Item item;
    item.stream = rest / s.n_kv_heads;
    item.kv_head = rest % s.n_kv_heads;
    item.first = block * s.block;
    item.n_queries = int(std::min<int64_t>(s.block, s.n_queries - item.first));
    item.n_rows = item.n_queries * s.group;
    return item;
}

void whole_item(const Shape & s, const Item & item, Scratch & at) {
    Block block(s, item, at);
    for (int row = 0; row < item.n_rows; row++) at.max[row] = -INFINITY, at.sum[row] = 0;
    memset(at.out, 0, item.n_rows * s.dv * sizeof(float));
    for (int segment = 0; segment < s.n_segments; segment++) {
        block.segment(segment);
        for (int row = 0; row < item.n_rows; row++) {
            join(at.segment_max[row], at.segment_sum[row], at.segment_out + row * s.dv, s.dv, at.max[row], at.sum[row],
                 at.out + row * s.dv);
        }
    }
    for (int row = 0; row < item.n_rows; row++) {
        finish(s, item.stream, block.head(row), item.first + row / s.group, at.max[row], at.sum[row], at.out + row * s.dv);
    }
}

// Where the result of a row and a segment waits for the others.
float * partial_of(const Shape & s, float * partials, const Item & item, int row, int segment) {
    const int64_t head = item.kv_head * s.group + row % s.group;
    const int64_t query = item.first + row / s.group;
    const int64_t index = (item.stream * s.n_heads + head) * s.n_queries + query;
    return partials + (index * s.n_segments + segment) * s.partial();
}

void one_segment(const Shape & s, const Item & item, int segment, Scratch & at, float * partials) {
    Block block(s, item, at);
    block.segment(segment);
    for (int row = 0; row < item.n_rows; row++) {
        float * to = partial_of(s, partials, item, row, segment);
        to[0] = at.segment_max[row], to[1] = at.segment_sum[row];
        memcpy(to + 2, at.segment_out + row * s.dv, s.dv * sizeof(float));
    }
}

void join_segments(const Shape & s, const Item & item, Scratch & at, float * partials) {
    for (int row = 0; row < item.n_rows; row++) {
        float max = -INFINITY, total = 0;
        memset(at.out, 0, s.dv * sizeof(float));
        for (int segment = 0; segment < s.n_segments; segment++) {
            const float * from = partial_of(s, partials, item, row, segment);
            join(from[0], from[1], from + 2, s.dv, max, total, at.out);
        }
        finish(s, item.stream, item.kv_head * s.group + row % s.group, item.first + row / s.group, max, total, at.out);
    }
}

bool supported(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    return q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16
        && k->ne[0] % LANES == 0 && v->ne[0] % LANES == 0 && k->ne[1] % LANES == 0 && q->ne[2] % k->ne[2] == 0 && k->ne[2] == v->ne[2]
        && q->ne[2] / k->ne[2] <= MAX_ROWS && k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3]
        && q->nb[0] == sizeof(float) && k->nb[0] == 2 && v->nb[0] == 2 && op->nb[0] == sizeof(float)
        && (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->nb[0] == 2));
}

struct Attention : ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = Shape(op, n_threads).work(n_threads) * sizeof(float);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (params->use_ref) return false;
        const Shape s(op, params->nth);
        if (params->wsize < s.work(params->nth) * sizeof(float)) abort();  // work_size() asked for it
        float * work = (float *) params->wdata;
        Scratch at(s, work + params->ith * s.scratch());
        float * partials = work + params->nth * s.scratch();
        const int64_t n_pieces = s.split ? s.n_items * s.n_segments : s.n_items;
        if (params->ith == 0) {
            n_calls.fetch_add(1, std::memory_order_relaxed);
            ggml_functions.chunk_set(params->threadpool, params->nth);
        }
        ggml_functions.barrier(params->threadpool);
        for (int64_t piece = params->ith; piece < n_pieces; piece = ggml_functions.chunk_add(params->threadpool, 1)) {
            if (s.split) {
                one_segment(s, item_of(s, piece / s.n_segments), int(piece % s.n_segments), at, partials);
            } else {
                whole_item(s, item_of(s, piece), at);
            }
        }
        if (s.split) {
            ggml_functions.barrier(params->threadpool);
            for (int64_t i = params->ith; i < s.n_items; i += params->nth) join_segments(s, item_of(s, i), at, partials);
        }
        return true;
    }
};

Attention attention;

}  // namespace

ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op) { return supported(op) ? &attention : nullptr; }

// How often it was called: a way to see that it is in use.
extern "C" int64_t attention_calls() { return n_calls.load(std::memory_order_relaxed); }
