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

/* One call: either x or ids is null. t is [rows][t_stride], the rank intermediate; work is its size. */
typedef struct {
    void *y;
    const void *x;
    const int64_t *ids;
    int64_t y_stride, x_stride, t_stride, work;
    float factor, *t;
    const Layer *layer;
    const Plan *plan;
} Call;

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

typedef void Body(const Call *, int, int);
typedef struct {
    Body *by_rows, *by_columns;
} Bodies;
static const Bodies bodies[2] = {
    {GLUE(GLUE(by_rows_, X), _f32), GLUE(GLUE(by_columns_, X), _f32)},
    {GLUE(GLUE(by_rows_, X), GLUE(_, X)), GLUE(GLUE(by_columns_, X), GLUE(_, X))},
};

/* Returns nonzero when memory ran out. */
static int run_call(Call *call, int max_threads) {
    const Layer *layer = call->layer;
    int64_t rows = 0;
    for (int32_t i = 0; i < call->plan->num_runs; i++) {
        Run run = run_of(layer, call->plan, i);
        call->t_stride = at_least(call->t_stride, run.rank);
        call->work += run.rank * run.num_rows;
        if (run.rank) rows += run.num_rows;
    }
    if (!call->work) return 0;
    call->t = scratch(call->t_stride * call->plan->starts[call->plan->num_runs]);
    if (!call->t) return 1;
    const Bodies *body = &bodies[layer->is_narrow];
    int num_threads = (int)at_most(max_threads, 1 + call->work * (layer->in + layer->out) / 16384);
    if (num_threads == 1) {
        body->by_rows(call, 0, 1);
        return 0;
    }
    Body *chosen = rows >= 4 * num_threads ? body->by_rows : body->by_columns;
#pragma omp parallel num_threads(num_threads)
    chosen(call, omp_get_thread_num(), omp_get_num_threads());
    return 0;
}

EXPORT int pd_add_lora(void *y, int64_t y_stride, const void *x, int64_t x_stride, const Layer *layer,
                       const Plan *plan, int max_threads) {
    Call call = {.y = y, .y_stride = y_stride, .x = x, .x_stride = x_stride, .layer = layer, .plan = plan};
    return run_call(&call, max_threads);
}

EXPORT int pd_add_embedding_lora(void *y, int64_t y_stride, const int64_t *ids, float factor, const Layer *layer,
                                 const Plan *plan, int max_threads) {
    Call call = {.y = y, .y_stride = y_stride, .ids = ids, .factor = factor, .layer = layer, .plan = plan};
    return run_call(&call, max_threads);
}
