/* Conversion of rows to float32. */
#pragma once
#include "call.h"
#include "vectors.h"

/* Divide `scratch` into parts of these sizes; NULL: only count. Return the number of floats. */
static int64_t divide_floats(float *scratch, int64_t count, float **const parts[], const int64_t sizes[]) {
    int64_t used = 0;
    for (int64_t i = 0; i < count; i++) {
        *parts[i] = scratch ? scratch + used : NULL;
        used += sizes[i];
    }
    return used;
}

INLINE vf load_as(int64_t dtype, const char *p) {
    if (dtype == FLOAT32) return load((const float *)p);
    return dtype == FLOAT16 ? from_float16((const uint16_t *)p) : from_bfloat16((const uint16_t *)p);
}

static float number(int64_t dtype, const char *p) { /* one number, of any alignment */
    if (dtype == FLOAT32) {
        float x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    uint16_t padded[LANES] = {0};
    memcpy(padded, p, sizeof *padded);
    return load_as(dtype, (const char *)padded)[0];
}

/* Copy n numbers that are `column` bytes apart to `to`. */
static void widen(float *to, const char *from, int64_t column, int64_t dtype, int64_t n) {
    int64_t i = 0;
    if (column == item_size(dtype))
        for (; i + LANES <= n; i += LANES) store(to + i, load_as(dtype, from + i * column));
    for (; i < n; i++) to[i] = number(dtype, from + i * column);
}

/* Convert n contiguous numbers to `dtype`. */
static void narrow(char *to, const float *from, int64_t dtype, int64_t n) {
    if (dtype == FLOAT32) {
        memcpy(to, from, sizeof(float) * n);
        return;
    }
    for (int64_t i = 0; i < n; i += LANES) {
        float some[LANES] = {0};
        uint16_t halves[LANES];
        memcpy(some, from + i, sizeof(float) * smaller(LANES, n - i));
        if (dtype == FLOAT16)
            to_float16(halves, load(some));
        else
            to_bfloat16(halves, load(some));
        memcpy(to + 2 * i, halves, sizeof *halves * smaller(LANES, n - i));
    }
}

/* Transpose LANES rows of n floats to n rows of LANES floats. The rows are readable up to the end of a vector. */
static void rows_to_lanes(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t n) {
    for (int64_t d = 0; d < n; d += LANES) {
        vf x[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = load(from + i * from_row + d);
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (d + i < n) store(to + (d + i) * to_row, x[i]);
    }
}

/* The other way. The rows are writable up to the end of a vector. */
static void lanes_to_rows(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t n) {
    for (int64_t d = 0; d < n; d += LANES) {
        vf x[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = load(from + smaller(d + i, n - 1) * from_row);
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + i * to_row + d, x[i]);
    }
}

/* Add n floats to floats that are `column` bytes apart. */
static void add_floats(char *to, int64_t column, const float *from, int64_t n) {
    int64_t i = 0;
    if (column == sizeof(float))
        for (; i + LANES <= n; i += LANES) store((float *)(to + i * column), load((float *)(to + i * column)) + load(from + i));
    for (; i < n; i++) *(float *)(to + i * column) += from[i];
}

/* The segment ids of the unit's keys, or NULL. */
static const int32_t *ids_of_keys(const Call *call, const Unit *unit) {
    return call->k_ids ? call->k_ids + unit->batch * call->k_len : NULL;
}

static int all_finite(const float *x, int64_t n) { /* n is a multiple of LANES */
    vf sum = (vf){0};
    for (int64_t i = 0; i < n; i += LANES) sum += load(x + i) * 0.0f;
    for (int i = 0; i < LANES; i++)
        if (sum[i] != 0) return 0;
    return 1;
}

/* Copy n numbers as `widen` does, up to the end of a vector with zeros. Return whether all are finite. */
static int widen_whole(float *to, const char *from, int64_t column, int64_t dtype, int64_t n) {
    for (int64_t i = n; i % LANES != 0; i++) to[i] = 0;
    widen(to, from, column, dtype, n);
    return all_finite(to, (n + LANES - 1) / LANES * LANES);
}

/* Fetch part `i` of `parts` of the keys or values start .. stop - 1 into the second-level cache. */
INLINE void fetch_rows(const Array *x, const Call *call, const Unit *unit, int64_t start, int64_t stop, int64_t n, int64_t i,
                       int64_t parts) {
    const int64_t count = greater(stop - start, 0);
    for (int64_t row = start + count * i / parts; row < start + count * (i + 1) / parts; row++) {
        const char *from = at(x, unit->batch, unit->head, row);
        for (int64_t j = 0; j < n * item_size(call->dtype); j += 64) __builtin_prefetch(from + j, 0, 2);
    }
}

typedef struct { /* keys with NaN or infinity among the keys of a chunk, in order */
    int32_t *keys;
    int64_t count;
} Nonfinite;

/* Copy the keys or values start .. stop - 1. The rows of the copy are `width` floats apart. Padding may hold anything:
   its copy is 0. Rows that are not finite are zeros too, and are listed, unless `found` is NULL. */
static void widen_rows(float *to, int64_t width, const Array *x, const Call *call, const Unit *unit, int64_t start,
                       int64_t stop, int64_t n, Nonfinite *found) {
    const int32_t *ids = ids_of_keys(call, unit);
    for (int64_t i = start; i < stop; i++, to += width) {
        int padding = ids && ids[i] < 0;
        int good = !padding && widen_whole(to, at(x, unit->batch, unit->head, i), x->column, call->dtype, n);
        if (!padding && found && !good) found->keys[found->count++] = (int32_t)i;
        if (padding || (found && !good)) memset(to, 0, sizeof(float) * n);
    }
}
