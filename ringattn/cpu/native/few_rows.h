/* Forward pass of few rows: keys and values stream from memory once, are converted in registers, and are not copied.
 *
 * A step has LANES / r keys for r rows (1, 2 or 4). The LANES dot products of a step are sums over the lanes of as many
 * vectors. A tree of pairwise sums leaves one product in each lane, in the order of tile.h.
 */
#pragma once
#include "many_rows.h"

#if LANES == 4
#define FEW 4
#else
#define FEW 8 /* rows; from there on, the other way is as fast */
#endif
#if LANES == 16 /* sums in registers: rows of weights x vectors of v's row. Here whole rows of v with head_dim 128 */
#define AT_ONCE 2
#define PANEL 8
#else
#define AT_ONCE 4
#define PANEL (MOST == 12 ? 4 : 2)
#endif

INLINE vf pairwise_sums(vf x, vf y) { /* sums of adjacent lanes: those of x, then those of y */
#if LANES == 16
    return SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(x, y, 0, 2, 4, 6) + SHUFFLE(x, y, 1, 3, 5, 7);
#endif
}

typedef struct { /* rows of keys or of values */
    const char *data;
    int64_t row; /* bytes */
} Stream;

INLINE void prefetch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

/* Scores of `rows` queries [rows][dim] with the keys of one step, of which `count` exist. */
INLINE vf step_scores(const int rows, const int dtype, const float *q, Stream k, int64_t count, int64_t dim) {
    const int keys = LANES / rows, size = dtype == FLOAT32 ? 4 : 2;
    vf sums[LANES];
    const char *from[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sums[i] = (vf){0};
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) from[j] = k.data + smaller(j, count - 1) * k.row;
    for (int64_t d = 0; d < dim; d += LANES) {
        vf y[4];
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) y[i] = load(q + i * dim + d);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++) {
            vf x = load_as(dtype, from[j] + d * size);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) sums[i * keys + j] += x * y[i];
        }
    }
#pragma GCC unroll 16
    for (int n = LANES / 2; n >= 1; n /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) sums[i] = pairwise_sums(sums[2 * i], sums[2 * i + 1]);
    return sums[0];
}

/* acc [rows][v_dim] = acc decay + P V for at most AT_ONCE rows and `some` vectors of v's row. Weights are as in tile.h:
   `keys` weights of a row are adjacent, and `step` floats are between steps. */
INLINE void add_some_values(const int rows, const int keys, const int some, const int dtype, float *acc, int64_t v_dim,
                            const float *p, int64_t step, const float *decay, Stream v, int64_t count) {
    const int size = dtype == FLOAT32 ? 4 : 2;
    vf sums[AT_ONCE][PANEL];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < some; j++) sums[i][j] = (vf){0};
    for (int64_t key = 0; key < count; key += keys, p += step)
        for (int within = 0; within < smaller(keys, count - key); within++) {
            vf x[PANEL];
            const char *from = v.data + (key + within) * v.row;
#pragma GCC unroll 8
            for (int j = 0; j < some; j++) x[j] = load_as(dtype, from + j * LANES * size);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                vf weight = fill(p[i * keys + within]);
#pragma GCC unroll 8
                for (int j = 0; j < some; j++) sums[i][j] += weight * x[j];
            }
        }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < some; j++) {
            float *to = acc + i * v_dim + j * LANES;
            store(to, load(to) * decay[i * keys] + sums[i][j]);
        }
}

/* The same for all rows of a vector. Rows of v come from memory whole, and from the cache for further rows. */
INLINE void add_values(const int rows, const int dtype, float *acc, int64_t v_dim, const float *p, int64_t step,
                       const float *decay, Stream v, int64_t count) {
    const int keys = LANES / rows, some_rows = rows < AT_ONCE ? rows : AT_ONCE, size = dtype == FLOAT32 ? 4 : 2;
    for (int i = 0; i < rows; i += AT_ONCE, acc += AT_ONCE * v_dim, p += AT_ONCE * keys, decay += AT_ONCE * keys) {
        int64_t d = 0;
        for (; d + PANEL * LANES <= v_dim; d += PANEL * LANES) {
            Stream part = {v.data + d * size, v.row};
            add_some_values(some_rows, keys, PANEL, dtype, acc + d, v_dim, p, step, decay, part, count);
        }
        for (; d < v_dim; d += LANES) {
            Stream part = {v.data + d * size, v.row};
            add_some_values(some_rows, keys, 1, dtype, acc + d, v_dim, p, step, decay, part, count);
        }
    }
}

typedef struct { /* scratch of a unit */
    float *q, *acc, *s, *mask;
    vf m[VECTORS], l[VECTORS], decay[VECTORS];
} Few;

/* Attend to the keys of one tile. */
INLINE void attend_few(const int rows, const int dtype, Few *few, const Lanes *x, Stream k, Stream v, Range range,
                       const Call *call, const Unit *unit) {
    const int64_t count = range.stop - range.start, step = x->vectors * LANES, size = dtype == FLOAT32 ? 4 : 2;
    const float *mask = call->mask.data ? few->mask : NULL;
    if (mask && !copy_mask(few->mask, x, call, unit, range)) return;
    for (int64_t i = 0; i < steps_of(x, range); i++) {
        int64_t key = i * x->keys, exist = smaller(x->keys, count - key);
        Stream some = {k.data + key * k.row, k.row};
        for (int64_t j = 0; j < exist; j++) prefetch(some.data + (2 * x->keys + j) * k.row, call->dim * size);
        for (int j = 0; j < x->vectors; j++)
            store(few->s + i * step + j * LANES,
                  step_scores(rows, dtype, few->q + j * rows * call->dim, some, exist, call->dim));
    }
    cap(few->s, steps_of(x, range) * step, call);
    apply_masks(few->s, mask, x, call, unit, range);
    softmax(x, few->s, steps_of(x, range), few->m, few->l, few->decay);
    for (int j = 0; j < x->vectors; j++) {
        float decay[LANES];
        store(decay, few->decay[j]);
        add_values(rows, dtype, few->acc + j * rows * call->v_dim, call->v_dim, few->s + j * LANES, step, decay, v, count);
    }
}

#define KIND(ROWS, DTYPE) \
    case ROWS * 4 + DTYPE: attend_few(ROWS, DTYPE, few, x, k, v, range, call, unit); return;

__attribute__((noinline)) static void attend_stream(int rows, Few *few, const Lanes *x, Stream k, Stream v, Range range,
                                                    const Call *call, const Unit *unit) {
    switch (rows * 4 + (int)call->dtype) {
        KIND(1, FLOAT32) KIND(1, FLOAT16) KIND(1, BFLOAT16) KIND(2, FLOAT32) KIND(2, FLOAT16) KIND(2, BFLOAT16)
        KIND(4, FLOAT32) KIND(4, FLOAT16) KIND(4, BFLOAT16)
    }
}

/* Whether few_rows can run a unit. Padding in segments may hold anything and needs the other way. */
static int streams(const Call *call, int64_t rows) {
    int64_t size = item_size(call->dtype);
    return rows <= FEW && !is_small(call) && !call->k_ids && call->dim % LANES == 0 && call->v_dim % LANES == 0 &&
           call->k.column == size && call->v.column == size;
}

static int64_t few_rows_scratch(const Call *call) {
    return FEW * (call->dim + call->v_dim) + 2 * (call->chunk + LANES) * VECTORS * LANES;
}

static void read_few(Few *few, const Lanes *x, const Call *call, const Unit *unit, int64_t row) {
    const int64_t lane = row * x->keys;
    RowState state = read_query(few->q + row * call->dim, few->acc + row * call->v_dim, call, unit, row);
    for (int i = 0; i < x->keys; i++) few->m[lane / LANES][lane % LANES + i] = state.m;
    few->l[lane / LANES][lane % LANES] = state.l; /* 0 in the other lanes */
}

static void write_few(const Few *few, const Lanes *x, const Call *call, const Unit *unit, int64_t row) {
    const int64_t lane = row * x->keys;
    RowState state = {few->m[lane / LANES][lane % LANES], 0};
    for (int i = 0; i < x->keys; i++) state.l += few->l[lane / LANES][lane % LANES + i];
    write_row(few->acc + row * call->v_dim, state, call, unit, row);
}

/* Attend all rows of a unit, at most FEW. Return 0 and leave the state as it was if the result is not finite: a row may
   have got NaN from a key that it does not see. */
static int few_rows(const Call *call, const Unit *unit, float *scratch) {
    const int64_t count = (unit->stop - unit->start) * call->group;
    const int rows = count >= 3 ? 4 : (int)count; /* in a vector */
    Lanes lanes;
    lanes.keys = LANES / rows;
    lanes.vectors = count > rows ? 2 : 1;
    set_lanes(&lanes, call, unit, 0, count);
    Few few = {.q = scratch, .acc = scratch + FEW * call->dim};
    few.s = few.acc + FEW * call->v_dim;
    few.mask = few.s + (call->chunk + LANES) * VECTORS * LANES;
    memset(scratch, 0, sizeof(float) * FEW * (call->dim + call->v_dim));
    for (int j = 0; j < VECTORS; j++) {
        few.m[j] = fill(-INFINITY);
        few.l[j] = (vf){0};
    }
    for (int64_t row = 0; row < count; row++) read_few(&few, &lanes, call, unit, row);
    for (int64_t start = lanes.least_first; start < lanes.most_last; start += call->chunk) {
        Range range = visible_range(&lanes, call, unit, start, smaller(start + call->chunk, lanes.most_last));
        if (range.start >= range.stop) continue;
        Stream k = {at(&call->k, unit->batch, unit->head, range.start), call->k.row};
        Stream v = {at(&call->v, unit->batch, unit->head, range.start), call->v.row};
        attend_stream(rows, &few, &lanes, k, v, range, call, unit);
    }
    if (!all_finite(few.acc, count * call->v_dim)) return 0;
    for (int64_t row = 0; row < count; row++) write_few(&few, &lanes, call, unit, row);
    return 1;
}
