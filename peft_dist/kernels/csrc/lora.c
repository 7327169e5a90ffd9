/* y += (x A^T * scaling) B for runs of rows that belong to different adapters. */
#include "common.h"

/* is_narrow: A and B are of the activations' type and not float. Slot s owns the ranks of segments
   first_segment[s] to first_segment[s + 1]: segment_rows[i] of them from row segment_start[i] of A and B. */
typedef struct {
    const void *A, *B;
    const int32_t *first_segment, *segment_start, *segment_rows;
    const float *scaling;
    int64_t in, out;
    int32_t num_slots, is_narrow;
} Layer;

/* One output of a call: all members of a call read the same x. work: ranks times rows; t_first: the columns of the
   rank intermediate before its own. Both are the kernel's. */
typedef struct {
    const Layer *layer;
    void *y;
    int64_t y_stride, work, t_first;
} Member;

typedef struct {
    const int32_t *slots, *starts;
    int32_t num_runs;
    float factor;
} Plan;

/* Rows of x with one slot, and the segments of that slot in one layer; rank 0: it does not adapt the layer. */
typedef struct {
    int64_t row, num_rows, rank;
    int32_t segment, end_segment;
    float scaling;
} Run;

INLINE Run run_of(const Layer *layer, const Plan *plan, int32_t i) {
    Run run = {.row = plan->starts[i], .num_rows = plan->starts[i + 1] - plan->starts[i]};
    int32_t slot = plan->slots[i];
    if (slot >= 0 && slot < layer->num_slots) {
        run.segment = layer->first_segment[slot];
        run.end_segment = layer->first_segment[slot + 1];
        run.scaling = layer->scaling[slot] * plan->factor;
        for (int32_t s = run.segment; s < run.end_segment; s++) run.rank += layer->segment_rows[s];
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
    const void *x;
    const int64_t *ids;
    int64_t x_stride, t_stride, work;
    float factor, *t;
    Member *members;
    int num_members, is_narrow;
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
    int64_t rows = 0, cost = 0;
    for (int m = 0; m < call->num_members; m++) {
        Member *member = call->members + m;
        int64_t widest = 0, adapted = 0;
        member->work = 0;
        for (int32_t i = 0; i < call->plan->num_runs; i++) {
            Run run = run_of(member->layer, call->plan, i);
            widest = at_least(widest, run.rank);
            member->work += run.rank * run.num_rows;
            if (run.rank) adapted += run.num_rows;
        }
        member->t_first = call->t_stride;
        call->t_stride += widest;
        call->work += member->work;
        cost += member->work * (member->layer->in + member->layer->out);
        rows = at_least(rows, adapted);
    }
    if (!call->work) return 0;
    call->t = scratch(call->t_stride * call->plan->starts[call->plan->num_runs]);
    if (!call->t) return 1;
    const Bodies *body = &bodies[call->is_narrow];
    int num_threads = (int)at_most(max_threads, 1 + cost / 16384);
    if (num_threads == 1) {
        body->by_rows(call, 0, 1);
        return 0;
    }
    Body *chosen = rows >= 4 * num_threads ? body->by_rows : body->by_columns;
#pragma omp parallel num_threads(num_threads)
    chosen(call, omp_get_thread_num(), omp_get_num_threads());
    return 0;
}

/* All members' layers have x's width and are equally narrow. */
EXPORT int pd_add_lora(const void *x, int64_t x_stride, Member *members, int num_members, const Plan *plan,
                       int max_threads) {
    Call call = {.x = x, .x_stride = x_stride, .members = members, .num_members = num_members,
                 .is_narrow = members->layer->is_narrow, .plan = plan};
    return run_call(&call, max_threads);
}

EXPORT int pd_add_embedding_lora(const int64_t *ids, float factor, Member *member, const Plan *plan,
                                 int max_threads) {
    Call call = {.ids = ids, .factor = factor, .members = member, .num_members = 1,
                 .is_narrow = member->layer->is_narrow, .plan = plan};
    return run_call(&call, max_threads);
}
