/* Conversion of rows to float32. */
#pragma once
#include "call.h"
#include "vectors.h"

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

/* Copy rows start .. stop - 1 of a head. The rows of the copy are `width` floats apart. */
static void widen_rows(float *to, int64_t width, const Array *x, const Unit *unit, int64_t start, int64_t stop,
                       int64_t dtype, int64_t n) {
    for (int64_t i = start; i < stop; i++, to += width)
        widen(to, at(x, unit->batch, unit->head, i), x->column, dtype, n);
}
