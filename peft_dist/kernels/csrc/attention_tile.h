/* What a block of query rows does with one tile of keys, all in float. */
#pragma once
#include "common.h"

/* Keys of one tile; all of a task's rows see them before the next tile is touched. */
enum { TILE = 64 };
/* Up to so many rows, dot products are faster than transposing the keys. */
#ifdef __AVX512F__
enum { FEW_ROWS = 2 };
#else
enum { FEW_ROWS = 6 };
#endif

/* For x up to 80; 0 below -87; a NaN stays one, so that a broken sequence is noticed. */
INLINE vf exp_of(vf x) {
    vi tiny = x < -87.0f, broken = x != x;
    vf z = pick(tiny, splat(-87.0f), x);
    /* x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer. */
    vf shifted = z * 1.44269504f + 12582912.0f;
    vi exponent = (vi)shifted - 0x4B400000;
    vf n = shifted - 12582912.0f;
    vf r = z - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    vf y = p * r * r + r + 1.0f;
    vf scaled = (vf)(((vi)y + (exponent << 23)) & ~tiny);
    return pick(broken, x, scaled);
}

INLINE vf tanh_of(vf x) {
    vi sign = (vi)x & (vi)splat(-0.0f), broken = x != x;
    vf z = (vf)((vi)x ^ sign), square = z * z;
    vf p = square * (-1382.0f / 155925) + 62.0f / 2835;
    p = p * square - 17.0f / 315;
    p = p * square + 2.0f / 15;
    p = p * square - 1.0f / 3;
    vf near_zero = p * square * z + z;
    vf capped = pick(z > 15.0f, splat(15.0f), z);
    vf t = pick(z < 0.4f, near_zero, 1.0f - 2.0f / (exp_of(capped + capped) + 1.0f));
    return pick(broken, x, (vf)((vi)t | sign));
}

/* Rows whose length is padded to whole vectors, with zeros. */
static void widen(const XT *from, int64_t dim, float *to) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store_f32(to + d, XLOAD(from + d));
    if (d < dim) store_f32(to + d, XLOAD_N(from + d, dim - d));
}

/* scores[r][j] = q[r] . key[j]: each key is read once for all rows. */
INLINE void dots(const float *q, int64_t dim, const float *const *keys, int64_t num_keys, float *scores, const int R) {
    for (int64_t j = 0; j < num_keys; j++) {
        vf acc[4];
        for (int r = 0; r < R; r++) acc[r] = (vf){0};
        for (int64_t d = 0; d < dim; d += LANES) {
            vf k = load_f32(keys[j] + d);
            for (int r = 0; r < R; r++) acc[r] += load_f32(q + r * dim + d) * k;
        }
        for (int r = 0; r < R; r++) scores[r * TILE + j] = sum(acc[r]);
    }
}

/* The same from transposed keys [dim][TILE], for R rows and 16 V keys held in registers. */
INLINE void products(const float *q, int64_t dim, const float *keys, float *scores, const int R, const int V) {
    vf acc[4][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = (vf){0};
    for (int64_t d = 0; d < dim; d++) {
        vf k[4];
        for (int v = 0; v < V; v++) k[v] = load_f32(keys + d * TILE + v * LANES);
        for (int r = 0; r < R; r++) {
            vf factor = splat(q[r * dim + d]);
            for (int v = 0; v < V; v++) acc[r][v] += factor * k[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store_f32(scores + r * TILE + v * LANES, acc[r][v]);
}

/* acc[r] = acc[r] * decay[r] + sum over j of weights[r][j] values[j], 16 V columns. */
INLINE void weigh(float *acc, int64_t dim, const float *decay, const float *weights, const float *const *values,
                  int64_t column, int64_t num_keys, const int R, const int V) {
    vf total[4][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = load_f32(acc + r * dim + column + v * LANES) * decay[r];
    for (int64_t j = 0; j < num_keys; j++) {
        vf x[4];
        for (int v = 0; v < V; v++) x[v] = load_f32(values[j] + column + v * LANES);
        for (int r = 0; r < R; r++) {
            vf weight = splat(weights[r * TILE + j]);
            for (int v = 0; v < V; v++) total[r][v] += weight * x[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store_f32(acc + r * dim + column + v * LANES, total[r][v]);
}

#define BY_ROWS(CALL, r, rows)                  \
    do {                                        \
        int64_t r = 0;                          \
        for (; r + 4 <= (rows); r += 4) CALL(4) \
        switch ((rows) - r) {                   \
        case 3: CALL(3) break;                  \
        case 2: CALL(2) break;                  \
        case 1: CALL(1) break;                  \
        }                                       \
    } while (0)

static void dots_all(const float *q, int64_t dim, const float *const *keys, int64_t num_keys, float *scores,
                     int64_t rows) {
#define CALL(R) dots(q + r * dim, dim, keys, num_keys, scores + r * TILE, R);
    BY_ROWS(CALL, r, rows);
#undef CALL
}

static void products_all(const float *q, int64_t dim, const float *keys, int64_t num_keys, float *scores,
                         int64_t rows) {
#define CALL(R) products(q + r * dim, dim, keys, scores + r * TILE, R, 4);
#define CALL_HALF(R) products(q + r * dim, dim, keys, scores + r * TILE, R, 2);
    if (num_keys > TILE / 2)
        BY_ROWS(CALL, r, rows);
    else
        BY_ROWS(CALL_HALF, r, rows);
#undef CALL
#undef CALL_HALF
}

static void weigh_all(float *acc, int64_t dim, const float *decay, const float *weights, const float *const *values,
                      int64_t num_keys, int64_t rows) {
    int64_t column = 0;
#define CALL(R) weigh(acc + r * dim, dim, decay + r, weights + r * TILE, values, column, num_keys, R, 4);
#define CALL_ONE(R) weigh(acc + r * dim, dim, decay + r, weights + r * TILE, values, column, num_keys, R, 1);
    for (; column + 4 * LANES <= dim; column += 4 * LANES) BY_ROWS(CALL, r, rows);
    for (; column < dim; column += LANES) BY_ROWS(CALL_ONE, r, rows);
#undef CALL
#undef CALL_ONE
}

/* Scores to weights relative to the row's largest score so far; keys outside of [low, high) get weight 0. */
INLINE void soften(float *scores, int64_t low, int64_t high, float softcap, float *highest, float *total,
                   float *decay) {
    vf row[TILE / LANES], best = splat(-INFINITY);
    for (int v = 0; v < TILE / LANES; v++) {
        vi index = LANE_NUMBERS + v * LANES, seen = (index >= (int32_t)low) & (index < (int32_t)high);
        row[v] = load_f32(scores + v * LANES);
        if (softcap > 0) row[v] = tanh_of(row[v] / softcap) * softcap;
        row[v] = pick(seen, row[v], splat(-INFINITY));
        best = larger(best, row[v]);
    }
    float most = largest(best);
    most = most > *highest ? most : *highest;
    *decay = *highest == most ? 1.0f : expf(*highest - most);
    vf sums = (vf){0};
    for (int v = 0; v < TILE / LANES; v++) {
        vf weight = exp_of(row[v] - most);
        store_f32(scores + v * LANES, weight);
        sums += weight;
    }
    *total = *total * *decay + sum(sums);
    *highest = most;
}
