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
//   exp(score_j) = 2^n_j * f_j                        f_j between .7 and 1.42
//   cells in segments of SEGMENT: N = max(n), p_j = f_j * 2^(n_j - N), l = sum(p), o = sum(p_j * v_j) in order
//   segments joined in order:     N' = max(N, N_s), o = o * 2^(N - N') + o_s * 2^(N_s - N'), l likewise
// Neither the number of rows of a block nor the number of threads changes the order of any sum.
//
// The order of cells does not matter either where outputs are summed in 64 bits (attention_wide): for memories that
// sequences share, where a cell lies wherever there was room. A p_j is the same number whatever the others are, but
// for a power of two; its products with 16-bit values are exact in 64 bits, and so is all scaling; what the order
// of the sum changes, 2^-53 of it, is lost when the result becomes 32 bits (but for one number in some
// millions, by its last bit). It takes a fifth more time for a prompt of 1,500 tokens: not for memories where
// each sequence has cells of its own.

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
typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
constexpr int LANES = 8;
template <typename T> struct Vector;  // what outputs are summed in
template <> struct Vector<float> { typedef f32x8 type; };
template <> struct Vector<double> { typedef f64x4 type; };

inline f32x8 all(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

inline f32x8 load(const float * from) {
    f32x8 x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float * to, f32x8 x) { memcpy(to, &x, sizeof x); }

inline f64x4 all(double x) { return f64x4{x, x, x, x}; }

inline f64x4 load(const double * from) {
    f64x4 x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline f64x4 widened(const float * from) {
    f32x4 x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, f64x4);
}

inline void store(double * to, f64x4 x) { memcpy(to, &x, sizeof x); }

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

inline f32x8 load(const ggml_fp16_t * from) { return (f32x8) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from)); }
inline f64x4 load_wide(const ggml_fp16_t * from) {
    return (f64x4) _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *) from)));
}
inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return (f32x8) _mm256_fmadd_ps((__m256) a, (__m256) b, (__m256) c); }
inline f64x4 fma(f64x4 a, f64x4 b, f64x4 c) { return (f64x4) _mm256_fmadd_pd((__m256d) a, (__m256d) b, (__m256d) c); }
inline f32x8 max(f32x8 a, f32x8 b) { return (f32x8) _mm256_max_ps((__m256) a, (__m256) b); }

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

inline f64x4 load_wide(const ggml_fp16_t * from) {
    ggml_fp16_t eight[LANES] = {from[0], from[1], from[2], from[3]};
    const f32x8 x = load(eight);
    return f64x4{x[0], x[1], x[2], x[3]};
}

inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return a * b + c; }
inline f64x4 fma(f64x4 a, f64x4 b, f64x4 c) { return a * b + c; }
inline f32x8 max(f32x8 a, f32x8 b) { return a > b ? a : b; }

inline void prefetch(const void * from) { __builtin_prefetch(from); }

inline void transpose(const char * from, size_t stride, float * to, size_t to_stride) {
    for (int j = 0; j < LANES; j++) {
        const f32x8 x = load((const ggml_fp16_t *) (from + j * stride));
        for (int i = 0; i < LANES; i++) to[i * to_stride + j] = x[i];
    }
}

#endif

template <typename V, typename From> inline V load_as(const From * from) { return load(from); }
template <> inline f64x4 load_as<f64x4>(const ggml_fp16_t * from) { return load_wide(from); }

inline float highest(f32x8 x) {
    float y = x[0];
    for (int i = 1; i < LANES; i++) y = x[i] > y ? x[i] : y;
    return y;
}

// exp(x) = 2^n * f, f to 2 units in the last place. x = n ln 2 + r, |r| <= ln(2) / 2, f the Taylor polynomial of exp(r)
// of degree 7. Beyond a million it counts as a million, so that n fits; masked cells are -inf.
struct Exp {
    i32x8 n;
    f32x8 f;
};

constexpr float MOST = 1e6f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits

inline f32x8 in_reach(f32x8 x) { return -max(-max(x, all(-MOST)), all(-MOST)); }
inline f32x8 shifted_power(f32x8 x) { return fma(in_reach(x), all(1.44269504088896341f), all(MAGIC)); }

inline Exp exp(f32x8 x) {
    const f32x8 shifted = shifted_power(x);
    const f32x8 n = shifted - all(MAGIC);
    f32x8 r = fma(n, all(-0.693145751953125f), in_reach(x));  // ln 2 in two parts, the first one exact
    r = fma(n, all(-1.42860682030941723212e-6f), r);
    f32x8 p = all(1.0f / 5040);
    p = fma(p, r, all(1.0f / 720));
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    return {(i32x8) shifted - (i32x8) all(MAGIC), p};
}

// f * 2^(n - reference), for a reference that is not below n; 0 where that is too small for 32 bits.
inline f32x8 relative(Exp e, int32_t reference) {
    const i32x8 power = e.n - reference + 127;
    return e.f * (f32x8) ((power & (power > 0)) << 23);
}

inline int32_t power_of(float x) {
    const f32x8 n = shifted_power(all(x));
    return ((i32x8) n - (i32x8) all(MAGIC))[0];
}

constexpr int32_t NOTHING = INT32_MIN;  // as a power of two: no cell is seen

// 2^n for n <= 0, 0 where that is too small for 64 bits.
inline double two_to(int64_t n) {
    const uint64_t bits = n <= -1023 ? 0 : uint64_t(n + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline f32x8 tanh(f32x8 x) {
    const f32x8 e = relative(exp(all(-2.0f) * max(x, -x)), 0);
    const f32x8 y = (all(1.0f) - e) / (all(1.0f) + e);
    return x < all(0.0f) ? -y : y;
}

// One block: up to MAX_ROWS rows that look at the same key head of the same stream

constexpr int TILE = 32;      // cells that are converted at a time
constexpr int SEGMENT = 256;  // cells whose weights are relative to the largest of them
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

    // Bytes of one thread, see Scratch.
    template <typename T> size_t scratch() const {
        return sizeof(T) * (MAX_ROWS * (SEGMENT + 2 * dv) + TILE * dv)
             + sizeof(float) * (MAX_ROWS * (dk + SEGMENT) + TILE * dk);
    }

    // Numbers of one row of one segment: power, sum, output.
    int64_t partial() const { return dv + 2; }

    template <typename T> size_t work(int n_threads) const {
        const int64_t partials = split ? n_streams * n_heads * n_queries * n_segments * partial() : 0;
        return n_threads * scratch<T>() + partials * sizeof(double);
    }
};

struct Item {
    int64_t stream, kv_head, first;  // first query
    int n_queries, n_rows;
};

// Rows of queries, scores, weights and outputs, and two tiles.
template <typename T> struct Scratch {
    T *weights, *out, *segment_out, *v_tile;
    float *q, *scores, *k_tile;

    Scratch(const Shape & s, void * from) {
        T * sums = (T *) from;
        weights = sums, sums += MAX_ROWS * SEGMENT;
        out = sums, sums += MAX_ROWS * s.dv;
        segment_out = sums, sums += MAX_ROWS * s.dv;
        v_tile = sums, sums += TILE * s.dv;
        float * at = (float *) sums;
        q = at, at += MAX_ROWS * s.dk;
        scores = at, at += MAX_ROWS * SEGMENT;
        k_tile = at;
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
template <int R, int C, typename T, typename From>
inline void weigh(const T * const * p, const char * values, size_t stride, int n, int64_t d, T * const * out) {
    typedef typename Vector<T>::type V;
    constexpr int W = sizeof(V) / sizeof(T);
    V acc[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = load(out[r] + d + c * W);
    for (int j = 0; j < n; j++) {
        const From * value = (const From *) (values + j * stride) + d;
        V weight[R];
        for (int r = 0; r < R; r++) weight[r] = all(p[r][j]);
        for (int c = 0; c < C; c++) {
            const V x = load_as<V>(value + c * W);
            for (int r = 0; r < R; r++) acc[r][c] = fma(weight[r], x, acc[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out[r] + d + c * W, acc[r][c]);
}

template <int R, typename T, typename From>
void weigh_tile(const T * const * p, const char * values, size_t stride, int n, int64_t dv, T * const * out) {
    constexpr int W = sizeof(typename Vector<T>::type) / sizeof(T);
    int64_t d = 0;
    for (; d + 4 * W <= dv; d += 4 * W) weigh<R, 4, T, From>(p, values, stride, n, d, out);
    for (; d < dv; d += W) weigh<R, 1, T, From>(p, values, stride, n, d, out);
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
template <typename T>
void convert(const char * from, size_t stride, int n, int64_t width, T * to, bool finite) {
    typedef typename Vector<T>::type V;
    const V most = all(T(65504));
    for (int j = 0; j < n; j++, from += stride, to += width) {
        for (int64_t d = 0; d < width; d += sizeof(V) / sizeof(T)) {
            const V x = load_as<V>((const ggml_fp16_t *) from + d);
            store(to + d, finite ? (x <= most && x >= -most ? x : most) : x);
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

// What weights add up to, of a segment or of all cells of a row. They and the output are relative to 2^power.
struct Sum {
    int32_t power = NOTHING;
    double total = 0;
};

template <typename T> struct Block {
    const Shape & s;
    const Item & item;
    Scratch<T> & at;
    Sum sums[MAX_ROWS];  // of the last segment
    const char *keys, *values;

    Block(const Shape & s, const Item & item, Scratch<T> & at) : s(s), item(item), at(at) {
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
            stride = s.dv * sizeof(T);
        }
        for (int i = 0; i < count; i += 3) {
            const int r = std::min(3, count - i);
            const T * p[3];
            T * to[3];
            for (int j = 0; j < r; j++) {
                p[j] = at.weights + rows[i + j] * SEGMENT + column;
                to[j] = at.segment_out + rows[i + j] * s.dv;
            }
            if (converted) {
                (r == 3 ? weigh_tile<3, T, T> : r == 2 ? weigh_tile<2, T, T> : weigh_tile<1, T, T>)(p, from, stride, n, s.dv, to);
            } else {
                (r == 3 ? weigh_tile<3, T, ggml_fp16_t> : r == 2 ? weigh_tile<2, T, ggml_fp16_t> : weigh_tile<1, T, ggml_fp16_t>)(
                    p, from, stride, n, s.dv, to);
            }
        }
    }

    // Power, sum and output of each row over one segment.
    void segment(int number) {
        constexpr int N_TILES = SEGMENT / TILE;
        const int64_t first = int64_t(number) * SEGMENT;
        int rows[N_TILES][MAX_ROWS], count[N_TILES], length[N_TILES];
        bool masked[MAX_ROWS], partly[N_TILES] = {};
        uint32_t seen[MAX_ROWS] = {};  // tiles of a row, one a bit
        int n_tiles = 0;
        for (; n_tiles < N_TILES && first + n_tiles * TILE < s.n_cells; n_tiles++) {
            const int64_t cell = first + n_tiles * TILE;
            const int n = length[n_tiles] = int(std::min<int64_t>(TILE, s.n_cells - cell));
            const int c = count[n_tiles] = seeing(cell, n, rows[n_tiles], masked);
            if (c) score(cell, n, rows[n_tiles], masked, c, n_tiles * TILE);
            for (int i = 0; i < c; i++) {
                partly[n_tiles] |= masked[i];
                seen[rows[n_tiles][i]] |= 1u << n_tiles;
            }
        }
        for (int row = 0; row < item.n_rows; row++) {
            sums[row] = {};
            if (!seen[row]) continue;
            soften(row, seen[row]);
            memset(at.segment_out + row * s.dv, 0, s.dv * sizeof(T));
        }
        for (int tile = 0; tile < n_tiles; tile++) {
            if (!count[tile]) continue;
            weigh_values(first + tile * TILE, length[tile], rows[tile], count[tile], tile * TILE, partly[tile]);
        }
    }

    // Scores of the tiles that a row sees become weights, and their sum.
    void soften(int row, uint32_t tiles) {
        const float * scores = at.scores + row * SEGMENT;
        T * weights = at.weights + row * SEGMENT;
        f32x8 top = all(-INFINITY);
        for (int j = 0; j < SEGMENT; j += LANES) {
            if (tiles >> j / TILE & 1) top = max(load(scores + j), top);
        }
        const float highest_score = highest(top);
        if (highest_score == -INFINITY) return;
        const int32_t power = power_of(highest_score);
        f64x4 total = all(0.0);
        for (int j = 0; j < SEGMENT; j += LANES) {
            if (!(tiles >> j / TILE & 1)) continue;
            float eight[LANES];
            store(eight, relative(exp(load(scores + j)), power));
            for (int i = 0; i < LANES; i++) weights[j + i] = eight[i];
            total += widened(eight);
            total += widened(eight + LANES / 2);
        }
        sums[row] = {power, (total[0] + total[1]) + (total[2] + total[3])};
    }
};

// Adds one segment of a row to those before it.
template <typename T>
void join(const Sum & segment, const T * from, int64_t dv, Sum & sum, T * out) {
    typedef typename Vector<T>::type V;
    if (segment.power == NOTHING) return;
    if (sum.power == NOTHING) {
        sum = segment;
        memcpy(out, from, dv * sizeof(T));
        return;
    }
    const int64_t difference = int64_t(segment.power) - sum.power;
    const double before = two_to(std::min<int64_t>(0, -difference)), now = two_to(std::min<int64_t>(0, difference));
    for (int64_t d = 0; d < dv; d += sizeof(V) / sizeof(T)) {
        store(out + d, fma(load(out + d), all(T(before)), load(from + d) * all(T(now))));
    }
    sum.total = sum.total * before + segment.total * now;
    sum.power = std::max(sum.power, segment.power);
}

template <typename T>
void finish(const Shape & s, int64_t stream, int64_t head, int64_t query, Sum sum, const T * out) {
    double factor = 1;
    if (s.sinks) {  // one more score, without a value
        const float score = ((const float *) s.sinks->data)[head];
        const int32_t power = power_of(score);
        factor = sum.power == NOTHING ? 0 : two_to(std::min<int64_t>(0, int64_t(sum.power) - power));
        const double sink = relative(exp(all(score)), power)[0];
        sum.total = sum.total * factor + sink * two_to(sum.power == NOTHING ? 0 : std::min<int64_t>(0, int64_t(power) - sum.power));
    }
    const double by = sum.total == 0 ? 0 : factor / sum.total;
    float * to = (float *) ((char *) s.dst->data + head * s.dst->nb[1] + query * s.dst->nb[2] + stream * s.dst->nb[3]);
    for (int64_t d = 0; d < s.dv; d++) to[d] = float(out[d] * by);
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

template <typename T>
void whole_item(const Shape & s, const Item & item, Scratch<T> & at) {
    Block<T> block(s, item, at);
    Sum sums[MAX_ROWS];
    memset(at.out, 0, item.n_rows * s.dv * sizeof(T));
    for (int segment = 0; segment < s.n_segments; segment++) {
        block.segment(segment);
        for (int row = 0; row < item.n_rows; row++) {
            join(block.sums[row], at.segment_out + row * s.dv, s.dv, sums[row], at.out + row * s.dv);
        }
    }
    for (int row = 0; row < item.n_rows; row++) {
        finish(s, item.stream, block.head(row), item.first + row / s.group, sums[row], at.out + row * s.dv);
    }
}

// Where the result of a row and a segment waits for the others: power, sum, output.
double * partial_of(const Shape & s, double * partials, const Item & item, int row, int segment) {
    const int64_t head = item.kv_head * s.group + row % s.group;
    const int64_t query = item.first + row / s.group;
    const int64_t index = (item.stream * s.n_heads + head) * s.n_queries + query;
    return partials + (index * s.n_segments + segment) * s.partial();
}

template <typename T>
void one_segment(const Shape & s, const Item & item, int segment, Scratch<T> & at, double * partials) {
    Block<T> block(s, item, at);
    block.segment(segment);
    for (int row = 0; row < item.n_rows; row++) {
        double * to = partial_of(s, partials, item, row, segment);
        to[0] = block.sums[row].power, to[1] = block.sums[row].total;
        std::copy_n(at.segment_out + row * s.dv, s.dv, to + 2);
    }
}

template <typename T>
void join_segments(const Shape & s, const Item & item, Scratch<T> & at, double * partials) {
    for (int row = 0; row < item.n_rows; row++) {
        Sum sum;
        memset(at.out, 0, s.dv * sizeof(T));
        for (int segment = 0; segment < s.n_segments; segment++) {
            const double * from = partial_of(s, partials, item, row, segment);
            std::copy_n(from + 2, s.dv, at.segment_out);
            join({int32_t(from[0]), from[1]}, at.segment_out, s.dv, sum, at.out);
        }
        finish(s, item.stream, item.kv_head * s.group + row % s.group, item.first + row / s.group, sum, at.out);
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

std::atomic<bool> wide{false};

struct Attention : ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        const Shape s(op, n_threads);
        size = wide ? s.work<double>(n_threads) : s.work<float>(n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (params->use_ref) return false;
        wide ? compute<double>(params, op) : compute<float>(params, op);
        return true;
    }

    template <typename T> void compute(ggml_compute_params * params, const ggml_tensor * op) {
        const Shape s(op, params->nth);
        if (params->wsize < s.work<T>(params->nth)) abort();  // work_size() asked for it
        char * work = (char *) params->wdata;
        Scratch<T> at(s, work + params->ith * s.scratch<T>());
        double * partials = (double *) (work + params->nth * s.scratch<T>());
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
    }
};

Attention attention;

}  // namespace

ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op) { return supported(op) ? &attention : nullptr; }

// How often it was called: a way to see that it is in use.
extern "C" int64_t attention_calls() { return n_calls.load(std::memory_order_relaxed); }

// Whether the calls that follow sum outputs in 64 bits, whose order does not matter. Not while one computes.
extern "C" void attention_wide(bool on) { wide = on; }
