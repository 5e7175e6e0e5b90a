/* The state of one row of queries: read it before, and write it or the finished row after the keys. */
#pragma once
#include "pack.h"

typedef struct {
    float m, l;
} RowState;

/* Read the query of a row, scaled, and its state: that over no key if the call has none. */
static RowState read_query(float *q, float *acc, const Call *call, const Unit *unit, int64_t row) {
    const int64_t query = row_query(call, unit, row), head = row_head(call, unit, row);
    widen(q, at(&call->q, unit->batch, head, query), call->q.column, call->dtype, call->dim);
    for (int64_t d = 0; d < call->dim; d++) q[d] *= (float)call->scale;
    if (!call->acc.data) {
        memset(acc, 0, sizeof(float) * call->v_dim);
        return (RowState){-INFINITY, 0};
    }
    widen(acc, at(&call->acc, unit->batch, head, query), call->acc.column, FLOAT32, call->v_dim);
    return (RowState){*(float *)at(&call->m, unit->batch, head, query), *(float *)at(&call->l, unit->batch, head, query)};
}

static float weight_of(float m, float total) { return m == -INFINITY ? 0 : expf(m - total); }

/* Write `out` and the lse of a row, with its sink. See `normalise` in ringattn/core/online_softmax.py. `acc` changes. */
static void finish_row(float *acc, RowState state, const Call *call, const Unit *unit, int64_t row) {
    const int64_t query = row_query(call, unit, row), head = row_head(call, unit, row);
    float m = state.m, l = state.l, weight = 1;
    if (call->sinks) {
        float sink = call->sinks[head], total = m > sink ? m : sink;
        weight = weight_of(m, total);
        l = l * weight + weight_of(sink, total);
        m = total;
    }
    const int seen = l != 0;
    for (int64_t d = 0; d < call->v_dim; d++) acc[d] = acc[d] * weight / (seen ? l : 1);
    narrow(at(&call->out, unit->batch, head, query), acc, call->out_dtype, call->v_dim);
    *(float *)at(&call->lse, unit->batch, head, query) = seen ? m + logf(l) : -INFINITY;
}

static void write_row(float *acc, RowState state, const Call *call, const Unit *unit, int64_t row) {
    const int64_t query = row_query(call, unit, row), head = row_head(call, unit, row);
    if (call->out.data) {
        finish_row(acc, state, call, unit, row);
        return;
    }
    char *to = at(&call->acc, unit->batch, head, query);
    for (int64_t d = 0; d < call->v_dim; d++) *(float *)(to + d * call->acc.column) = acc[d];
    *(float *)at(&call->m, unit->batch, head, query) = state.m;
    *(float *)at(&call->l, unit->batch, head, query) = state.l;
}
