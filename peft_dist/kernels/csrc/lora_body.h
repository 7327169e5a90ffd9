/* Template: WT, W are the type of A and B and its suffix. BOTH_BF16: so is the type of x and y. */
#define NAME(f) GLUE(GLUE(f##_, X), GLUE(_, W))
#define WLOAD GLUE(load_, W)
#define WLOAD_N GLUE(GLUE(load_, W), _n)

/* t[m][k] = x[m] . a[k] * scale, for M rows and K ranks held in registers. */
INLINE void NAME(shrink_block)(const XT *x, int64_t xs, const WT *a, int64_t in, float *t, int64_t ts, float scale,
                               const int M, const int K) {
    vf acc[4][8];
UNROLL
    for (int m = 0; m < M; m++)
UNROLL
        for (int k = 0; k < K; k++) acc[m][k] = (vf){0};
    int64_t i = 0;
#if defined(BOTH_BF16) && defined(__AVX512BF16__)
    for (; i + 32 <= in; i += 32) {
        vf w[8];
UNROLL
        for (int k = 0; k < K; k++) memcpy(w + k, a + k * in + i, sizeof *w);
UNROLL
        for (int m = 0; m < M; m++) {
            vf v;
            memcpy(&v, x + m * xs + i, sizeof v);
UNROLL
            for (int k = 0; k < K; k++) acc[m][k] = dot_pairs(acc[m][k], v, w[k]);
        }
    }
#endif
    for (; i + LANES <= in; i += LANES) {
        vf w[8];
UNROLL
        for (int k = 0; k < K; k++) w[k] = WLOAD(a + k * in + i);
UNROLL
        for (int m = 0; m < M; m++) {
            vf v = XLOAD(x + m * xs + i);
UNROLL
            for (int k = 0; k < K; k++) acc[m][k] += v * w[k];
        }
    }
UNROLL
    for (int m = 0; m < M; m++)
UNROLL
        for (int k = 0; k < K; k++) t[m * ts + k] = sum(acc[m][k]) * scale;
    if (i == in) return;
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            t[m * ts + k] += sum(XLOAD_N(x + m * xs + i, in - i) * WLOAD_N(a + k * in + i, in - i)) * scale;
}

INLINE void NAME(shrink_rows)(const XT *x, int64_t xs, const WT *a, int64_t in, int64_t num_ranks, float *t, int64_t ts,
                              float scale, const int M) {
    int64_t k = 0;
    if (M == 1)
        for (; k + 8 <= num_ranks; k += 8) NAME(shrink_block)(x, xs, a + k * in, in, t + k, ts, scale, M, 8);
    for (; k + 4 <= num_ranks; k += 4) NAME(shrink_block)(x, xs, a + k * in, in, t + k, ts, scale, M, 4);
    for (; k < num_ranks; k++) NAME(shrink_block)(x, xs, a + k * in, in, t + k, ts, scale, M, 1);
}

static __attribute__((noinline)) void NAME(shrink)(const XT *x, int64_t xs, const WT *a, int64_t in, int64_t num_rows,
                                                   int64_t num_ranks, float *t, int64_t ts, float scale) {
    int64_t m = 0;
    for (; m + 4 <= num_rows; m += 4) NAME(shrink_rows)(x + m * xs, xs, a, in, num_ranks, t + m * ts, ts, scale, 4);
    for (; m + 2 <= num_rows; m += 2) NAME(shrink_rows)(x + m * xs, xs, a, in, num_ranks, t + m * ts, ts, scale, 2);
    for (; m < num_rows; m++) NAME(shrink_rows)(x + m * xs, xs, a, in, num_ranks, t + m * ts, ts, scale, 1);
}

/* Two vectors of consecutive elements, in an order that x, y, A and B share. */
INLINE void NAME(x_load2)(const XT *p, vf *pair) {
#ifdef BOTH_BF16
    load_bf16_split(p, pair, pair + 1);
#else
    pair[0] = XLOAD(p), pair[1] = XLOAD(p + LANES);
#endif
}
INLINE void NAME(x_store2)(XT *p, const vf *pair) {
#ifdef BOTH_BF16
    store_bf16_split(p, pair[0], pair[1]);
#else
    XSTORE(p, pair[0]), XSTORE(p + LANES, pair[1]);
#endif
}
INLINE void NAME(w_load2)(const WT *p, vf *pair) {
#ifdef BOTH_BF16
    load_bf16_split(p, pair, pair + 1);
#else
    pair[0] = WLOAD(p), pair[1] = WLOAD(p + LANES);
#endif
}

/* y[m][0 : 16 V] += sum over the run's ranks k of t[m][k] b[k], for M rows held in registers; V is even. b is the
   layer's B from the first of these columns on. */
INLINE void NAME(expand_block)(XT *y, int64_t ys, const Layer *layer, const WT *b, const Run *run, const float *t,
                               int64_t ts, const int M, const int V) {
    vf acc[4][4];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v += 2) NAME(x_load2)(y + m * ys + v * LANES, acc[m] + v);
    int64_t k = 0;
    for (int32_t s = run->segment; s < run->end_segment; s++) {
        const WT *row = b + layer->segment_start[s] * layer->out;
        for (int64_t end = k + layer->segment_rows[s]; k < end; k++, row += layer->out) {
            vf w[4];
            for (int v = 0; v < V; v += 2) NAME(w_load2)(row + v * LANES, w + v);
            for (int m = 0; m < M; m++) {
                vf factor = splat(t[m * ts + k]);
                for (int v = 0; v < V; v++) acc[m][v] += factor * w[v];
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v += 2) NAME(x_store2)(y + m * ys + v * LANES, acc[m] + v);
}

/* Fewer than two vectors of columns are left. */
INLINE void NAME(expand_tail)(XT *y, int64_t ys, const Layer *layer, const WT *b, const Run *run, int64_t columns,
                              const float *t, int64_t ts, const int M) {
    for (int m = 0; m < M; m++) {
        vf acc = XLOAD_N(y + m * ys, columns);
        int64_t k = 0;
        for (int32_t s = run->segment; s < run->end_segment; s++) {
            const WT *row = b + layer->segment_start[s] * layer->out;
            for (int64_t end = k + layer->segment_rows[s]; k < end; k++, row += layer->out)
                acc += t[m * ts + k] * WLOAD_N(row, columns);
        }
        XSTORE_N(y + m * ys, acc, columns);
    }
}

INLINE void NAME(expand_rows)(XT *y, int64_t ys, const Layer *layer, const WT *b, const Run *run, int64_t columns,
                              const float *t, int64_t ts, const int M) {
    int64_t o = 0;
    for (; o + 4 * LANES <= columns; o += 4 * LANES) NAME(expand_block)(y + o, ys, layer, b + o, run, t, ts, M, 4);
    for (; o + 2 * LANES <= columns; o += 2 * LANES) NAME(expand_block)(y + o, ys, layer, b + o, run, t, ts, M, 2);
    for (; o < columns; o += LANES)
        NAME(expand_tail)(y + o, ys, layer, b + o, run, at_most(LANES, columns - o), t, ts, M);
}

static __attribute__((noinline)) void NAME(expand)(XT *y, int64_t ys, const Layer *layer, const WT *b, const Run *run,
                                                   int64_t columns, int64_t num_rows, const float *t, int64_t ts) {
    int64_t m = 0;
    for (; m + 4 <= num_rows; m += 4)
        NAME(expand_rows)(y + m * ys, ys, layer, b, run, columns, t + m * ts, ts, 4);
    for (; m + 2 <= num_rows; m += 2)
        NAME(expand_rows)(y + m * ys, ys, layer, b, run, columns, t + m * ts, ts, 2);
    for (; m < num_rows; m++) NAME(expand_rows)(y + m * ys, ys, layer, b, run, columns, t + m * ts, ts, 1);
}

static void NAME(look_up)(const int64_t *ids, const WT *a, int64_t num_ids, int64_t num_rows, int64_t num_ranks,
                          float *t, int64_t ts, float scale) {
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t k = 0; k < num_ranks; k++) {
            t[m * ts + k] = WLOAD_N(a + k * num_ids + ids[m], 1)[0] * scale;
        }
}

/* ranks of the intermediate of rows [m, m + rows) of a run: those from row first of A on, columns k on of t. */
static void NAME(shrink_run)(const Call *call, const Member *member, const Run *run, int64_t m, int64_t rows,
                             int64_t first, int64_t k, int64_t ranks) {
    int64_t in = member->layer->in;
    const WT *a = (const WT *)member->layer->A + first * in;
    float *t = call->t + (run->row + m) * call->t_stride + member->t_first + k;
    if (call->ids)
        NAME(look_up)(call->ids + run->row + m, a, in, rows, ranks, t, call->t_stride, run->scaling * call->factor);
    else
        NAME(shrink)((const XT *)call->x + (run->row + m) * call->x_stride, call->x_stride, a, in, rows, ranks, t,
                     call->t_stride, run->scaling);
}

/* Columns [o, o + columns) of the output of these rows. */
static void NAME(expand_run)(const Call *call, const Member *member, const Run *run, int64_t m, int64_t rows, int64_t o,
                             int64_t columns) {
    NAME(expand)((XT *)member->y + (run->row + m) * member->y_stride + o, member->y_stride, member->layer,
                 (const WT *)member->layer->B + o, run, columns, rows,
                 call->t + (run->row + m) * call->t_stride + member->t_first, call->t_stride);
}

static void NAME(prefetch_run)(const Layer *layer, const Run *run) {
    for (int32_t s = run->segment; s < run->end_segment; s++) {
        const char *b = (const char *)((const WT *)layer->B + layer->segment_start[s] * layer->out);
        for (int64_t i = 0; i < layer->segment_rows[s] * layer->out * (int64_t)sizeof(WT); i += 64)
            __builtin_prefetch(b + i, 0, 2);
    }
}

/* Enough rows for every thread: each takes rows through both halves and waits for nobody. */
static void NAME(by_rows)(const Call *call, int thread, int num_threads) {
    Share share = {0, call->work, thread, num_threads};
    int64_t fair = call->plan->starts[call->plan->num_runs] / (4 * num_threads) / 4 * 4;
    int64_t chunk = at_most(ROW_CHUNK, at_least(4, fair));
    for (int32_t i = 0; i < call->plan->num_runs; i++) {
        int64_t num_rows = call->plan->starts[i + 1] - call->plan->starts[i];
        for (int64_t m = 0; m < num_rows; m += chunk) {
            int64_t rows = at_most(chunk, num_rows - m);
            for (const Member *member = call->members; member < call->members + call->num_members; member++) {
                const Layer *layer = member->layer;
                Run run = run_of(layer, call->plan, i);
                if (!run.rank || !is_mine(&share, run.rank * rows)) continue;
                if (num_rows <= 8) NAME(prefetch_run)(layer, &run);
                for (int64_t s = run.segment, k = 0; s < run.end_segment; k += layer->segment_rows[s++])
                    NAME(shrink_run)(call, member, &run, m, rows, layer->segment_start[s], k, layer->segment_rows[s]);
                for (int64_t o = 0; o < layer->out; o += COLUMN_CHUNK)
                    NAME(expand_run)(call, member, &run, m, rows, o, at_most(COLUMN_CHUNK, layer->out - o));
            }
        }
    }
}

static void NAME(shrink_share)(const Call *call, const Member *member, Share *share) {
    const Layer *layer = member->layer;
    for (int32_t i = 0; i < call->plan->num_runs; i++) {
        Run run = run_of(layer, call->plan, i);
        for (int64_t s = run.segment, k = 0; s < run.end_segment; k += layer->segment_rows[s++])
            for (int64_t r = 0; r < layer->segment_rows[s]; r += RANK_CHUNK) {
                int64_t ranks = at_most(RANK_CHUNK, layer->segment_rows[s] - r);
                if (is_mine(share, ranks * run.num_rows))
                    NAME(shrink_run)(call, member, &run, 0, run.num_rows, layer->segment_start[s] + r, k + r, ranks);
            }
    }
}

static void NAME(expand_share)(const Call *call, const Member *member, Share *share) {
    for (int32_t i = 0; i < call->plan->num_runs; i++) {
        Run run = run_of(member->layer, call->plan, i);
        if (!run.rank) continue;
        for (int64_t o = 0; o < member->layer->out; o += COLUMN_CHUNK) {
            int64_t columns = at_most(COLUMN_CHUNK, member->layer->out - o);
            if (is_mine(share, run.rank * run.num_rows * columns))
                NAME(expand_run)(call, member, &run, 0, run.num_rows, o, columns);
        }
    }
}

/* Few rows: threads divide the ranks of the first half, and after a barrier the columns of the second. */
static void NAME(by_columns)(const Call *call, int thread, int num_threads) {
    const Member *end = call->members + call->num_members;
    Share share = {0, call->work, thread, num_threads};
    for (const Member *member = call->members; member < end; member++) NAME(shrink_share)(call, member, &share);
#pragma omp barrier
    share = (Share){0, 0, thread, num_threads};
    for (const Member *member = call->members; member < end; member++) share.total += member->work * member->layer->out;
    for (const Member *member = call->members; member < end; member++) NAME(expand_share)(call, member, &share);
}

#undef NAME
#undef WLOAD
#undef WLOAD_N
