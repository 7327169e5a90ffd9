/* y += (x A^T * scaling) B for runs of rows that belong to different adapters. */
#include "common.h"

/* is_narrow: A and B are of the activations' type and not float. */
typedef struct {
    const void *A, *B;
    const int32_t *row_start, *rank;
    const float *scaling;
    int64_t in, out;
    int32_t num_slots, is_narrow;
} Layer;

typedef struct {
    const int32_t *slots, *starts;
    int32_t num_runs;
} Plan;

typedef struct {
    int64_t row, num_rows, first, rank;
    float scaling;
} Run;

/* rank 0: the run's slot does not adapt this layer. */
INLINE Run run_of(const Layer *layer, const Plan *plan, int32_t i) {
    Run run = {plan->starts[i], plan->starts[i + 1] - plan->starts[i], 0, 0, 0};
    int32_t slot = plan->slots[i];
    if (slot >= 0 && slot < layer->num_slots) {
        run.first = layer->row_start[slot];
        run.rank = layer->rank[slot];
        run.scaling = layer->scaling[slot];
    }
    return run;
}

/* Work is cut into tasks; each thread walks all of them and takes those whose middle lies in its share. */
enum { ROW_CHUNK = 32, RANK_CHUNK = 8, COLUMN_CHUNK = 256 };
typedef struct {
    int64_t done, total;
    int thread, num_threads;
} Share;

INLINE int is_mine(Share *share, int64_t cost) {
    int64_t owner = (share->done + cost / 2) * share->num_threads / share->total;
    share->done += cost;
    return owner == share->thread;
}
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

#define WT float
#define W f32
#include "lora_body.h"
#undef WT
#undef W
#if PD_DTYPE != F32
#define WT XT
#define W X
#if PD_DTYPE == BF16
#define BOTH_BF16
#endif
#include "lora_body.h"
#endif

typedef void Body(void *, int64_t, const void *, int64_t, const int64_t *, float, const Layer *, const Plan *, float *,
                  int64_t, int, int, int64_t);
static Body *const bodies[2] = {
    GLUE(GLUE(body_, X), _f32),
    GLUE(GLUE(body_, X), GLUE(_, X)),
};

/* Either x or ids is null. Returns nonzero when memory ran out. */
static int add(void *y, int64_t y_stride, const void *x, int64_t x_stride, const int64_t *ids, float factor,
               const Layer *layer, const Plan *plan, int max_threads) {
    int64_t max_rank = 0, work = 0;
    for (int32_t i = 0; i < plan->num_runs; i++) {
        Run run = run_of(layer, plan, i);
        if (run.rank > max_rank) max_rank = run.rank;
        work += run.rank * run.num_rows;
    }
    if (!work) return 0;
    float *t = scratch(max_rank * plan->starts[plan->num_runs]);
    if (!t) return 1;
    int64_t per_thread = 1 + work * (layer->in + layer->out) / 16384;
    int num_threads = (int)min64(max_threads, per_thread);
    Body *body = bodies[layer->is_narrow];
    if (num_threads == 1) {
        body(y, y_stride, x, x_stride, ids, factor, layer, plan, t, max_rank, 0, 1, work);
        return 0;
    }
#pragma omp parallel num_threads(num_threads)
    body(y, y_stride, x, x_stride, ids, factor, layer, plan, t, max_rank, omp_get_thread_num(), omp_get_num_threads(),
         work);
    return 0;
}

EXPORT int pd_add_lora(void *y, int64_t y_stride, const void *x, int64_t x_stride, const Layer *layer,
                       const Plan *plan, int max_threads) {
    return add(y, y_stride, x, x_stride, NULL, 1, layer, plan, max_threads);
}

EXPORT int pd_add_embedding_lora(void *y, int64_t y_stride, const int64_t *ids, float factor, const Layer *layer,
                                 const Plan *plan, int max_threads) {
    return add(y, y_stride, NULL, 0, ids, factor, layer, plan, max_threads);
}
