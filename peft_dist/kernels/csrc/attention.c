/* Causal attention over paged keys and values; scores, softmax and sums are float32. */
#include "common.h"

/* Keys of one tile; all of a task's rows see them before the next tile is touched. */
enum { TILE = 64 };
/* Up to so many rows, dot products are faster than transposing the keys. */
#ifdef __AVX512F__
enum { FEW_ROWS = 2 };
#else
enum { FEW_ROWS = 6 };
#endif

/* An item is a stretch of query tokens of one sequence: (sequence, first token within its chunk, tokens). */
typedef struct {
    const int32_t *query_start_loc, *context_lens, *block_tables, *items;
    const int64_t *slot_mapping;
    int64_t max_blocks, num_tokens;
    int32_t num_items, max_item;
} Meta;

typedef struct {
    const XT *query;
    XT *out;
    int64_t token_stride, head_stride;
    const XT *key, *value;
    const float *sinks;
    int64_t block_size, num_heads, num_kv_heads, key_dim, value_dim, window;
    float scale, softcap;
} Layer;

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

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

/* Memory of one task, all float. */
typedef struct {
    float *q, *acc, *scores, *highest, *total, *decay, *keys, *values, *transposed;
} Buffers;

INLINE size_t buffer_floats(const Layer *layer, int64_t rows) {
    int64_t k = padded(layer->key_dim), v = padded(layer->value_dim);
    return rows * (k + v + TILE + 3) + TILE * (2 * k + v) + 16 * LANES;
}

static Buffers carve(float *memory, const Layer *layer, int64_t rows) {
    int64_t k = padded(layer->key_dim), v = padded(layer->value_dim);
    Buffers b;
    b.keys = memory;
    b.values = b.keys + TILE * k;
    b.transposed = b.values + TILE * v;
    b.q = b.transposed + TILE * k;
    b.acc = b.q + rows * k;
    b.scores = b.acc + rows * v;
    b.highest = b.scores + rows * TILE;
    b.total = b.highest + rows;
    b.decay = b.total + rows;
    return b;
}

/* Where `n` keys (or values) from position `start` on lie, as float rows of a padded length. */
static void locate(const XT *cache, int64_t dim, const Layer *layer, const int32_t *blocks, int64_t head,
                   int64_t start, int64_t n, float *copies, const float **rows) {
    int in_place = PD_DTYPE == F32 && dim % LANES == 0;
    int64_t length = padded(dim), step = layer->num_kv_heads * dim;
    int64_t block = start / layer->block_size, offset = start % layer->block_size;
    for (int64_t j = 0; j < n; block++, offset = 0) {
        const XT *row = cache + ((blocks[block] * layer->block_size + offset) * layer->num_kv_heads + head) * dim;
        int64_t stop = at_most(n, j + layer->block_size - offset);
        for (; j < stop; j++, row += step) {
            if (!in_place) widen(row, dim, copies + j * length);
            rows[j] = in_place ? (const float *)row : copies + j * length;
            if (in_place)
                for (int64_t d = 0; d < dim; d += LANES) __builtin_prefetch(row + d);
        }
    }
}

/* One of four stages of the transpose of 16 rows: swap the off-diagonal blocks of size S. */
#define STAGE(S)                                                                      \
    for (int i = 0; i < LANES; i++)                                                   \
        if (!(i & S)) {                                                               \
            vi second = (lane & S) != 0;                                              \
            vi low = (second & (lane + LANES - S)) | (~second & lane);                \
            vi high = (second & (lane + LANES)) | (~second & (lane + S));             \
            vf a = row[i], b = row[i + S];                                            \
            row[i] = __builtin_shuffle(a, b, low), row[i + S] = __builtin_shuffle(a, b, high); \
        }

/* to[d][j] = keys[j][d] for whole vectors of keys; those past n read as zero. dim is padded. */
static void transpose(const float *const *keys, int64_t dim, int64_t n, float *to) {
    const vi lane = LANE_NUMBERS;
    int64_t whole = n > TILE / 2 ? TILE : TILE / 2;
    for (int64_t j = 0; j < whole; j += LANES)
        for (int64_t d = 0; d < dim; d += LANES) {
            vf row[LANES];
            for (int i = 0; i < LANES; i++) row[i] = j + i < n ? load_f32(keys[j + i] + d) : (vf){0};
            STAGE(1) STAGE(2) STAGE(4) STAGE(8)
            for (int i = 0; i < LANES; i++) store_f32(to + (d + i) * TILE + j, row[i]);
        }
}

/* One item for one key head. Row r is query token r / group of the item, and the head's query head r % group. */
typedef struct {
    const Layer *layer;
    Buffers b;
    const int32_t *blocks;
    int64_t head, group, rows, first_row, first_position, window, key_dim, value_dim;
} Task;

static Task task_of(const Meta *meta, const Layer *layer, const int32_t *item, int64_t head, Buffers b) {
    const int32_t *starts = meta->query_start_loc + item[0];
    int64_t group = layer->num_heads / layer->num_kv_heads, chunk = starts[1] - starts[0];
    int64_t first_position = meta->context_lens[item[0]] - chunk + item[1];
    return (Task){
        .layer = layer,
        .b = b,
        .blocks = meta->block_tables + item[0] * meta->max_blocks,
        .head = head,
        .group = group,
        .rows = item[2] * group,
        .first_row = starts[0] + item[1],
        .first_position = first_position,
        .window = layer->window > 0 ? layer->window : first_position + item[2],
        .key_dim = padded(layer->key_dim),
        .value_dim = padded(layer->value_dim),
    };
}

static void begin(const Task *t) {
    const Layer *layer = t->layer;
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t query_head = t->head * t->group + r % t->group, token = t->first_row + r / t->group;
        float *q = t->b.q + r * t->key_dim;
        widen(layer->query + token * layer->token_stride + query_head * layer->head_stride, layer->key_dim, q);
        for (int64_t d = 0; d < t->key_dim; d += LANES) store_f32(q + d, load_f32(q + d) * layer->scale);
        t->b.highest[r] = layer->sinks ? layer->sinks[query_head] : -INFINITY;
        t->b.total[r] = layer->sinks ? 1.0f : 0.0f;
    }
    memset(t->b.acc, 0, t->rows * t->value_dim * sizeof(float));
}

/* All rows meet the n keys from position `start` on. */
static void meet(const Task *t, int64_t start, int64_t n) {
    const Layer *layer = t->layer;
    const float *keys[TILE], *values[TILE];
    locate(layer->key, layer->key_dim, layer, t->blocks, t->head, start, n, t->b.keys, keys);
    locate(layer->value, layer->value_dim, layer, t->blocks, t->head, start, n, t->b.values, values);
    if (t->rows <= FEW_ROWS)
        dots_all(t->b.q, t->key_dim, keys, n, t->b.scores, t->rows);
    else {
        transpose(keys, t->key_dim, n, t->b.transposed);
        products_all(t->b.q, t->key_dim, t->b.transposed, n, t->b.scores, t->rows);
    }
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t position = t->first_position + r / t->group;
        int64_t low = at_least(0, position - t->window + 1 - start), high = at_most(n, position + 1 - start);
        if (low < high)
            soften(t->b.scores + r * TILE, low, high, layer->softcap, t->b.highest + r, t->b.total + r, t->b.decay + r);
        else {
            memset(t->b.scores + r * TILE, 0, TILE * sizeof(float));
            t->b.decay[r] = 1.0f;
        }
    }
    weigh_all(t->b.acc, t->value_dim, t->b.decay, t->b.scores, values, n, t->rows);
}

static void finish(const Task *t) {
    const Layer *layer = t->layer;
    int64_t dim = layer->value_dim;
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t token = t->first_row + r / t->group, query_head = t->head * t->group + r % t->group, d = 0;
        XT *out = layer->out + (token * layer->num_heads + query_head) * dim;
        const float *acc = t->b.acc + r * t->value_dim;
        for (; d + LANES <= dim; d += LANES) XSTORE(out + d, load_f32(acc + d) / t->b.total[r]);
        if (d < dim) XSTORE_N(out + d, load_f32(acc + d) / t->b.total[r], dim - d);
    }
}

static void run_task(Task t) {
    int64_t end = t.first_position + t.rows / t.group;
    begin(&t);
    for (int64_t start = at_least(0, t.first_position - t.window + 1); start < end; start += TILE)
        meet(&t, start, at_most(TILE, end - start));
    finish(&t);
}

/* Each thread takes the next task that nobody has taken. Returns nonzero when memory ran out. */
EXPORT int pd_attention(const Meta *meta, const Layer *layer, int max_threads) {
    if (!meta->num_items) return 0;
    int64_t num_tasks = meta->num_items * layer->num_kv_heads, next = 0;
    int64_t rows = meta->max_item * (layer->num_heads / layer->num_kv_heads);
    int num_threads = (int)at_least(1, at_most(max_threads, num_tasks)), failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *memory = scratch(buffer_floats(layer, rows));
        if (!memory) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        while (memory) {
            int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= num_tasks) break;
            const int32_t *item = meta->items + 3 * (task / layer->num_kv_heads);
            run_task(task_of(meta, layer, item, task % layer->num_kv_heads, carve(memory, layer, rows)));
        }
    }
    return failed;
}

/* Copy each token's [heads][dim] to its slot of the cache. */
EXPORT void pd_write_kv(const Meta *meta, const char *source, int64_t token_bytes, int64_t head_bytes, char *cache,
                        int64_t num_heads, int64_t row_bytes, int max_threads) {
    int num_threads = meta->num_tokens * num_heads * row_bytes > (1 << 18) ? max_threads : 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t token = 0; token < meta->num_tokens; token++)
        for (int64_t head = 0; head < num_heads; head++)
            memcpy(cache + (meta->slot_mapping[token] * num_heads + head) * row_bytes,
                   source + token * token_bytes + head * head_bytes, row_bytes);
}
