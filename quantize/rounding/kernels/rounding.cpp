// The innermost loops of rounding, for CPU: what scales.py, feedback.py and descent.py say in torch, where each
// step of a search passes over memory again and a column of few rows costs little more than a call. Here a tile
// of TILE rows stays in the first cache while all candidates, or all columns of a stretch, are gone through.
//
// Matrices are transposed as in grid.py, (columns, rows), row-major, float32; a tile's rows are the lanes of
// vectors, so the compiler's own vectorizer does (-O3). Nothing is reordered, so results differ from torch's in
// the last bits alone, where multiply and add are one operation.

#include "fits_cpu.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace {

constexpr int TILE = 64;  // rows
constexpr int MOST = 32;  // columns of a group, or of a stretch that is walked along

using Lanes = float[TILE];

// What codes stand for. Without a table: whole numbers from lowest to highest. With one: the nearest level to
// values between k / 2 and (k + 1) / 2, for k from `lowest`.
struct Levels {
    float lowest, highest;
    const float * table;
    int32_t n_table;
};

// Half to even, as torch rounds; for values less than 2^22.
inline float whole(float value) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: no bits after the point are left
    return (value + shift) - shift;
}

inline float inverse(float value) {
    float turned = 1 / value;
    return std::fabs(turned) <= FLT_MAX ? turned : 0.0f;
}

template <bool has_table> inline float nearest(const Levels & levels, float value) {
    if (has_table) {
        float place = std::floor(value * 2) - levels.lowest;
        place = std::min(std::max(place, 0.0f), float(levels.n_table - 1));
        return levels.table[int32_t(place)];
    }
    return whole(std::min(std::max(value, levels.lowest), levels.highest));
}

// Lanes past the last row hold 0.
inline void load(Lanes & to, const float * from, int n) {
    for (int t = 0; t < n; t++) to[t] = from[t];
    for (int t = n; t < TILE; t++) to[t] = 0;
}

inline void store(float * to, const Lanes & from, int n) {
    for (int t = 0; t < n; t++) to[t] = from[t];
}

// Calls `work(first row, rows)` for each tile.
template <typename Work> void tiles(int64_t rows, Work work) {
    for (int64_t first = 0; first < rows; first += TILE) work(first, int(std::min<int64_t>(TILE, rows - first)));
}

// A group's columns in a tile, and what weighs them.
struct Group {
    Lanes x[MOST], vx[MOST];
    const float * v;
    int size;

    Group(const float * from, const float * v, int size, int64_t rows, int n) : v(v), size(size) {
        for (int j = 0; j < size; j++) {
            load(x[j], from + j * rows, n);
            for (int t = 0; t < TILE; t++) vx[j][t] = v[j] * x[j][t];
        }
    }
};

template <bool has_table>
void symmetric(const Levels & levels, const float * x, const float * v, int64_t n_groups, int size, int64_t rows,
               const float * targets, int n_targets, const float * nearby, int n_nearby, float * steps) {
    for (int64_t g = 0; g < n_groups; g++) tiles(rows, [&](int64_t first, int n) {
        Group group(x + g * size * rows + first, v + g * size, size, rows, n);
        Lanes extreme = {}, best = {}, step = {}, inverse_step;
        for (int j = 0; j < size; j++)
            for (int t = 0; t < TILE; t++)
                if (std::fabs(group.x[j][t]) > std::fabs(extreme[t])) extreme[t] = group.x[j][t];
        auto consider = [&] {
            Lanes xl = {}, ll = {};
            for (int j = 0; j < size; j++)
                for (int t = 0; t < TILE; t++) {
                    float level = nearest<has_table>(levels, group.x[j][t] * inverse_step[t]);
                    xl[t] += group.vx[j][t] * level;
                    ll[t] += level * level * group.v[j];
                }
            for (int t = 0; t < TILE; t++) {
                float fitted = xl[t] * inverse(ll[t]), gain = xl[t] * fitted;
                bool better = gain > best[t];
                best[t] = better ? gain : best[t];
                step[t] = better ? fitted : step[t];
            }
        };
        for (int i = 0; i < n_targets; i++) {
            for (int t = 0; t < TILE; t++) inverse_step[t] = inverse(extreme[t]) * targets[i];
            consider();
        }
        for (int i = 0; i < n_nearby; i++) {
            for (int t = 0; t < TILE; t++) inverse_step[t] = inverse(step[t]) * nearby[i];
            consider();
        }
        store(steps + g * rows + first, step, n);
    });
}

void affine(const float * x, const float * v, int64_t n_groups, int size, int64_t rows, float highest,
            bool negative, const float * cuts, int n_cuts, const float * wider, int n_wider,
            const float * nearby, int n_nearby, float * steps, float * offsets) {
    for (int64_t g = 0; g < n_groups; g++) tiles(rows, [&](int64_t first, int n) {
        Group group(x + g * size * rows + first, v + g * size, size, rows, n);
        float v_sum = 0, v_most = 0;
        Lanes vx_sum = {}, low, high, best, step = {}, offset = {}, inverse_step, start;
        for (int t = 0; t < TILE; t++) {
            low[t] = high[t] = group.x[0][t];
            best[t] = -1;
        }
        for (int j = 0; j < size; j++) {
            v_sum += group.v[j];
            v_most = std::max(v_most, group.v[j]);
            for (int t = 0; t < TILE; t++) {
                vx_sum[t] += group.vx[j][t];
                low[t] = std::min(low[t], group.x[j][t]);
                high[t] = std::max(high[t], group.x[j][t]);
            }
        }
        if (negative)
            for (int t = 0; t < TILE; t++) {
                low[t] = std::min(low[t], 0.0f);
                high[t] = std::max(high[t], 0.0f);
            }
        float inverse_sum = inverse(v_sum);
        // Least-squares step and offset for the codes, and how much squared error they take away.
        auto consider = [&] {
            Lanes c = {}, cc = {}, xc = {};
            for (int j = 0; j < size; j++)
                for (int t = 0; t < TILE; t++) {
                    float code = (group.x[j][t] - start[t]) * inverse_step[t];
                    code = whole(std::min(std::max(code, 0.0f), highest));
                    float vc = group.v[j] * code;
                    c[t] += vc;
                    cc[t] += vc * code;
                    xc[t] += group.vx[j][t] * code;
                }
            for (int t = 0; t < TILE; t++) {
                float det = v_sum * cc[t] - c[t] * c[t];
                bool usable = det > 1e-6f * v_sum * cc[t];
                float turned = usable ? 1 / det : 0.0f;
                float fitted = (v_sum * xc[t] - c[t] * vx_sum[t]) * turned;
                float shift = usable ? (cc[t] * vx_sum[t] - c[t] * xc[t]) * turned : vx_sum[t] * inverse_sum;
                bool above = negative && shift > 0;
                fitted = above ? xc[t] * inverse(cc[t]) : fitted;
                shift = above ? 0.0f : shift;
                float gain = fitted * xc[t] + shift * vx_sum[t];
                bool better = gain > best[t];
                best[t] = better ? gain : best[t];
                step[t] = better ? fitted : step[t];
                offset[t] = better ? shift : offset[t];
            }
        };
        for (int below = 0; below < n_cuts; below++)
            for (int above = 0; above < n_cuts; above++) {
                for (int t = 0; t < TILE; t++) {
                    float span = high[t] - low[t];
                    inverse_step[t] = highest * inverse(span * (1 - cuts[below] - cuts[above]));
                    start[t] = low[t] + span * cuts[below];
                }
                consider();
            }
        // Where what is furthest out matters least: the range of what matters, about the weighted mean.
        Lanes mean, least, most;
        for (int t = 0; t < TILE; t++) {
            mean[t] = vx_sum[t] * inverse_sum;
            least[t] = FLT_MAX;
            most[t] = -FLT_MAX;
        }
        for (int j = 0; j < size; j++) {
            float share = std::sqrt(group.v[j] * inverse(v_most));
            for (int t = 0; t < TILE; t++) {
                float drawn_in = (group.x[j][t] - mean[t]) * share + mean[t];
                least[t] = std::min(least[t], drawn_in);
                most[t] = std::max(most[t], drawn_in);
            }
        }
        for (int i = 0; i < n_wider; i++) {
            for (int t = 0; t < TILE; t++) {
                float middle = (least[t] + most[t]) / 2, reach = (most[t] - least[t]) / 2 * wider[i];
                inverse_step[t] = highest / 2 * inverse(reach);
                start[t] = middle - reach;
            }
            consider();
        }
        for (int i = 0; i < n_nearby; i++) {
            for (int t = 0; t < TILE; t++) {
                inverse_step[t] = inverse(step[t]) * nearby[i];
                start[t] = offset[t];
            }
            consider();
        }
        store(steps + g * rows + first, step, n);
        store(offsets + g * rows + first, offset, n);
    });
}

template <bool has_table>
void refine(const Levels & levels, const float * x, const float * v, int64_t n_groups, int size, int64_t rows,
            int per_block, const float * scale, const float * minimum, float sign, float * scales,
            float lowest_scale, float highest_scale, float * minimums, float lowest_minimum,
            float highest_minimum, float * out) {
    for (int64_t g = 0; g < n_groups; g++) tiles(rows, [&](int64_t first, int n) {
        Group group(x + g * size * rows + first, v + g * size, size, rows, n);
        Lanes unit, each = {}, integer, low = {}, least, best, best_low = {}, offset, step, inverse_step;
        load(unit, scale + g / per_block * rows + first, n);
        load(integer, scales + g * rows + first, n);
        if (minimums) {
            load(each, minimum + g / per_block * rows + first, n);
            load(low, minimums + g * rows + first, n);
        }
        for (int t = 0; t < TILE; t++) {
            least[t] = INFINITY;
            best[t] = integer[t];
            best_low[t] = low[t];
        }
        auto set = [&](const Lanes & scale_integers, float up, const Lanes & minimum_integers, float below) {
            for (int t = 0; t < TILE; t++) {
                float lower = std::min(std::max(minimum_integers[t] + below, lowest_minimum), highest_minimum);
                offset[t] = each[t] * lower * sign;
                step[t] = unit[t] * std::min(std::max(scale_integers[t] + up, lowest_scale), highest_scale);
                inverse_step[t] = inverse(step[t]);
            }
        };
        const float tries[] = {0, -1, 1};
        for (int below = 0; below < (minimums ? 3 : 1); below++)
            for (float up : tries) {
                set(integer, up, low, tries[below]);
                Lanes error = {};
                for (int j = 0; j < size; j++)
                    for (int t = 0; t < TILE; t++) {
                        float moved = group.x[j][t] - offset[t];
                        float left = moved - nearest<has_table>(levels, moved * inverse_step[t]) * step[t];
                        error[t] += left * left * group.v[j];
                    }
                for (int t = 0; t < TILE; t++) {
                    bool better = error[t] < least[t];
                    least[t] = better ? error[t] : least[t];
                    float up_to = std::min(std::max(integer[t] + up, lowest_scale), highest_scale);
                    float down_to = std::min(std::max(low[t] + tries[below], lowest_minimum), highest_minimum);
                    best[t] = better ? up_to : best[t];
                    best_low[t] = better ? down_to : best_low[t];
                }
            }
        set(best, 0, best_low, 0);
        for (int j = 0; j < size; j++) {
            Lanes level;
            for (int t = 0; t < TILE; t++)
                level[t] = nearest<has_table>(levels, (group.x[j][t] - offset[t]) * inverse_step[t]);
            store(out + (g * size + j) * rows + first, level, n);
        }
        store(scales + g * rows + first, best, n);
        if (minimums) store(minimums + g * rows + first, best_low, n);
    });
}

template <bool has_table>
void feed_back(const Levels & levels, float * current, int size, int n_later, int64_t rows, const float * factor,
               int64_t n, const float * steps, const float * offsets, float * out, float * errors) {
    tiles(rows, [&](int64_t first, int count) {
        Lanes columns[MOST], step, offset, inverse_step;
        for (int j = 0; j < n_later; j++) load(columns[j], current + j * rows + first, count);
        load(step, steps + first, count);
        load(offset, offsets + first, count);
        for (int t = 0; t < TILE; t++) inverse_step[t] = inverse(step[t]);
        for (int j = 0; j < size; j++) {
            Lanes level, error;
            const float * share = factor + j * n;
            for (int t = 0; t < TILE; t++) {
                level[t] = nearest<has_table>(levels, (columns[j][t] - offset[t]) * inverse_step[t]);
                error[t] = (columns[j][t] - (level[t] * step[t] + offset[t])) / share[j];
            }
            for (int k = j + 1; k < n_later; k++)
                for (int t = 0; t < TILE; t++) columns[k][t] -= share[k] * error[t];
            store(out + j * rows + first, level, count);
            store(errors + j * rows + first, error, count);
        }
        for (int j = size; j < n_later; j++) store(current + j * rows + first, columns[j], count);
    });
}

template <bool has_table>
void move_codes(const Levels & levels, const float * pull, int width, int group, int64_t rows, const float * local,
                int64_t n, const float * steps, float * level, float * moves) {
    tiles(rows, [&](int64_t first, int count) {
        Lanes pulls[MOST], step, inverse_step;
        for (int j = 0; j < width; j++) load(pulls[j], pull + j * rows + first, count);
        for (int j = 0; j < width; j++) {
            if (j % group == 0) {
                load(step, steps + j / group * rows + first, count);
                for (int t = 0; t < TILE; t++) inverse_step[t] = inverse(step[t]);
            }
            Lanes before, after, move;
            load(before, level + j * rows + first, count);
            float diagonal = 1 / local[j * n + j];
            for (int t = 0; t < TILE; t++) {
                after[t] = nearest<has_table>(levels, pulls[j][t] * (inverse_step[t] * diagonal) + before[t]);
                move[t] = (after[t] - before[t]) * step[t];
            }
            for (int k = j + 1; k < width; k++)
                for (int t = 0; t < TILE; t++) pulls[k][t] -= local[j * n + k] * move[t];
            store(level + j * rows + first, after, count);
            store(moves + j * rows + first, move, count);
        }
    });
}

}  // namespace

// `levels` decides which of two versions of a loop runs.
#define BY_LEVELS(loop, ...) (levels->table ? loop<true>(*levels, __VA_ARGS__) : loop<false>(*levels, __VA_ARGS__))

extern "C" {

bool rounding_fits_cpu() { return fits_cpu(); }

// The scale of each group without offset. x (groups * size, rows), v (groups * size), steps (groups, rows).
void rounding_symmetric(const Levels * levels, const float * x, const float * v, int64_t n_groups, int size,
                        int64_t rows, const float * targets, int n_targets, const float * nearby, int n_nearby,
                        float * steps) {
    BY_LEVELS(symmetric, x, v, n_groups, size, rows, targets, n_targets, nearby, n_nearby, steps);
}

// Scale and offset of each group for codes 0..highest.
void rounding_affine(const float * x, const float * v, int64_t n_groups, int size, int64_t rows, float highest,
                     bool negative, const float * cuts, int n_cuts, const float * wider, int n_wider,
                     const float * nearby, int n_nearby, float * steps, float * offsets) {
    affine(x, v, n_groups, size, rows, highest, negative, cuts, n_cuts, wider, n_wider, nearby, n_nearby, steps,
           offsets);
}

// A group's integers one up and down; `scales`, `minimums` (groups, rows; null where there are none) and the
// levels `out` (groups * size, rows) are set. `scale` and `minimum` (groups / per_block, rows).
void rounding_refine(const Levels * levels, const float * x, const float * v, int64_t n_groups, int size,
                     int64_t rows, int per_block, const float * scale, const float * minimum, float sign,
                     float * scales, float lowest_scale, float highest_scale, float * minimums,
                     float lowest_minimum, float highest_minimum, float * out) {
    BY_LEVELS(refine, x, v, n_groups, size, rows, per_block, scale, minimum, sign, scales, lowest_scale,
              highest_scale, minimums, lowest_minimum, highest_minimum, out);
}

// Rounds the first `size` of `n_later` columns at `current`, each taking its error from those after it; `factor`
// points at U's element of the first column, in rows of n. Sets `out` and `errors` (size, rows).
void rounding_feed_back(const Levels * levels, float * current, int size, int n_later, int64_t rows,
                        const float * factor, int64_t n, const float * steps, const float * offsets, float * out,
                        float * errors) {
    BY_LEVELS(feed_back, current, size, n_later, rows, factor, n, steps, offsets, out, errors);
}

// Moves each of `width` columns' codes once; `local` points at H's element of the first, in rows of n. `pull`,
// `level`, `moves` (width, rows), `steps` (width / group, rows).
void rounding_move_codes(const Levels * levels, const float * pull, int width, int group, int64_t rows,
                         const float * local, int64_t n, const float * steps, float * level, float * moves) {
    BY_LEVELS(move_codes, pull, width, group, rows, local, n, steps, level, moves);
}
}
