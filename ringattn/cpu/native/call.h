/* Arguments of the kernels. ringattn/cpu/flash.py has the same structures. */
#pragma once
#include <stdint.h>

enum { FLOAT32, FLOAT16, BFLOAT16, BOOLEAN };

typedef struct { /* strides in bytes; 0 along an axis that is broadcast */
    char *data;
    int64_t batch, head, row, column;
} Array;

typedef struct {
    Array q, k, v;              /* of one dtype */
    Array mask;                 /* [B, Hq, Lq, columns]; data NULL: none */
    Array acc, m, l;            /* state, float32; NULL: start from no keys */
    Array out, lse;             /* results [B, Hq, Lq, Dv], contiguous rows of `out_dtype`, and [B, Hq, Lq]; NULL: the state */
    const float *sinks;         /* [Hq], or NULL; only for results */
    const int32_t *first, *last; /* [Lq]: the band lets query i see keys first[i] .. last[i] - 1 */
    const int32_t *q_ids, *k_ids; /* segments [B, Lq] and [B, Lk], or NULL */
    const int64_t *columns;     /* [Lk]: the column of each key in the mask, or NULL */
    int64_t dtype, mask_dtype, out_dtype;
    int64_t q_len, k_len, dim, v_dim;
    int64_t group;              /* query heads for each key/value head */
    int64_t chunk;              /* keys in a tile */
    double scale, softcap;      /* softcap 0: none */
} Call;

typedef struct { /* queries start .. stop - 1 of one key/value head: group * queries rows, all heads of a query together */
    int64_t batch, head, start, stop;
} Unit;

typedef struct {
    Array dout;       /* of `dtype` */
    Array lse, delta; /* float32 [B, Hq, Lq] */
    Array dq;         /* float32; the gradient is added */
    Array dk, dv;     /* likewise, of the unit's head alone: the batch entry and the head are ignored */
    int64_t dtype;
} Gradients;

typedef struct {
    const char *name;
    int64_t (*scratch)(const Call *, int64_t queries); /* floats */
    void (*forward)(const Call *, const Unit *, float *scratch);
    int64_t (*backward_scratch)(const Call *, int64_t queries);
    void (*backward)(const Call *, const Gradients *, const Unit *, float *scratch);
} Kernels;

static inline int64_t item_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : dtype == BOOLEAN ? 1 : 2; }

static inline char *at(const Array *x, int64_t batch, int64_t head, int64_t row) {
    return x->data + batch * x->batch + head * x->head + row * x->row;
}

static inline int64_t row_query(const Call *call, const Unit *unit, int64_t row) { return unit->start + row / call->group; }
static inline int64_t row_head(const Call *call, const Unit *unit, int64_t row) {
    return unit->head * call->group + row % call->group;
}
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
