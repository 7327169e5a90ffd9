/* Causal attention over paged keys and values; scores, softmax and sums are float32. */
#include "attention_tile.h"

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
