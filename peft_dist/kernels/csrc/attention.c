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
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* For x up to 80; 0 below -87; a NaN stays one, so that a broken sequence is noticed. */
INLINE vf exp_of(vf x) {
    vi tiny = x < -87.0f, broken = x != x;
    vf z = pick(tiny, splat(-87.0f), x);
    vf shifted = z * 1.44269504f + 12582912.0f;
    vi exponent = (vi)shifted - 0x4B400000;
    vf n = shifted - 12582912.0f;
    vf r = z - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vf y = p * r * r + r + 1.0f;
    vf scaled = (vf)(((vi)y + (exponent << 23)) & ~tiny);
    return pick(broken, x, scaled);
}

INLINE vf tanh_of(vf x) {
    vi sign = (vi)x & (vi)splat(-0.0f), broken = x != x;
    vf z = (vf)((vi)x ^ sign);
    z = pick(z > 15.0f, splat(15.0f), z);
    vf t = 1.0f - 2.0f / (exp_of(z + z) + 1.0f);
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

static void run_task(const Meta *meta, const Layer *layer, const int32_t *item, int64_t head, Buffers b) {
    int64_t sequence = item[0], num_tokens = item[2], group = layer->num_heads / layer->num_kv_heads;
    int64_t first_row = meta->query_start_loc[sequence] + item[1], context = meta->context_lens[sequence];
    int64_t chunk = meta->query_start_loc[sequence + 1] - meta->query_start_loc[sequence];
    int64_t first_position = context - chunk + item[1], rows = num_tokens * group;
    int64_t key_dim = padded(layer->key_dim), value_dim = padded(layer->value_dim);
    const int32_t *blocks = meta->block_tables + sequence * meta->max_blocks;
    for (int64_t r = 0; r < rows; r++) {
        int64_t query_head = head * group + r % group;
        float *q = b.q + r * key_dim;
        widen(layer->query + (first_row + r / group) * layer->token_stride + query_head * layer->head_stride,
              layer->key_dim, q);
        for (int64_t d = 0; d < key_dim; d += LANES) store_f32(q + d, load_f32(q + d) * layer->scale);
        b.highest[r] = layer->sinks ? layer->sinks[query_head] : -INFINITY;
        b.total[r] = layer->sinks ? 1.0f : 0.0f;
    }
    memset(b.acc, 0, rows * value_dim * sizeof(float));
    int64_t end = first_position + num_tokens, window = layer->window > 0 ? layer->window : end;
    for (int64_t start = at_least(0, first_position - window + 1); start < end; start += TILE) {
        const float *keys[TILE], *values[TILE];
        int64_t n = at_most(TILE, end - start);
        locate(layer->key, layer->key_dim, layer, blocks, head, start, n, b.keys, keys);
        locate(layer->value, layer->value_dim, layer, blocks, head, start, n, b.values, values);
        if (rows <= FEW_ROWS)
            dots_all(b.q, key_dim, keys, n, b.scores, rows);
        else {
            transpose(keys, key_dim, n, b.transposed);
            products_all(b.q, key_dim, b.transposed, n, b.scores, rows);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t position = first_position + r / group;
            int64_t low = at_least(0, position - window + 1 - start), high = at_most(n, position + 1 - start);
            if (low >= high) {
                memset(b.scores + r * TILE, 0, TILE * sizeof(float));
                b.decay[r] = 1.0f;
            } else
                soften(b.scores + r * TILE, low, high, layer->softcap, b.highest + r, b.total + r, b.decay + r);
        }
        weigh_all(b.acc, value_dim, b.decay, b.scores, values, n, rows);
    }
    for (int64_t r = 0; r < rows; r++) {
        XT *out = layer->out + ((first_row + r / group) * layer->num_heads + head * group + r % group) * layer->value_dim;
        int64_t d = 0;
        for (; d + LANES <= layer->value_dim; d += LANES)
            XSTORE(out + d, load_f32(b.acc + r * value_dim + d) / b.total[r]);
        if (d < layer->value_dim) XSTORE_N(out + d, load_f32(b.acc + r * value_dim + d) / b.total[r], layer->value_dim - d);
    }
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
            run_task(meta, layer, meta->items + 3 * (task / layer->num_kv_heads), task % layer->num_kv_heads,
                     carve(memory, layer, rows));
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
