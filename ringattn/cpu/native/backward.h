/* Backward pass. The formulas are in ringattn/core/gradients.py.
 *
 * For a chunk of keys and a tile of rows, with lanes = rows as in the forward pass:
 *
 *     S^T = K Q^T    P^T = exp(S^T - lse)    dP^T = V dO^T    dS^T = P^T (dP^T - delta)    dQ^T = dQ^T + K^T dS^T
 *
 * and with lanes = columns of the gradients: dV = dV + P^T dO, dK = dK + dS^T Q. These two sum over the rows of a tile.
 * NaN and infinity must reach only what sees them, but 0 NaN is NaN. Rows and keys that are not finite are zeros in the
 * products. The lse of such a row is NaN, and the scores with such a key are NaN, which makes all their visible pairs NaN.
 */
#pragma once
#include "many_rows.h"

#define TILE_ROWS 256 /* rows that one product sums over */
#define TILE_WIDTH (TILE_ROWS + 16)

typedef struct { /* a block of WIDE rows, transposed */
    Lanes *lanes;
    float *q, *dout, *dq, *lse, *delta;
} GradientBlock;

typedef struct { /* scratch of a unit */
    float *blocks;
    float *q, *dout;         /* [rows][padded]: the queries, scaled, and the incoming gradients */
    float *k, *v, *dk, *dv;  /* [chunk][padded] */
    float *s, *dp, *slope, *mask; /* [chunk][WIDE] */
    float *p, *ds;           /* [chunk][TILE_WIDTH] */
    Nonfinite nonfinite;     /* keys */
} Sums;

static int64_t gradient_block_floats(const Call *call) { return LANES_FLOATS + (2 * call->dim + call->v_dim + 2) * WIDE; }

static GradientBlock gradient_block(const Call *call, const Sums *x, int64_t i) {
    float *lanes = x->blocks + i * gradient_block_floats(call), *q = lanes + LANES_FLOATS;
    float *dq = q + call->dim * WIDE, *dout = dq + call->dim * WIDE, *lse = dout + call->v_dim * WIDE;
    return (GradientBlock){(Lanes *)lanes, q, dout, dq, lse, lse + WIDE};
}

/* Divide the scratch. Return the number of floats. */
static int64_t divide(Sums *x, const Call *call, int64_t rows, float *scratch) {
    const int64_t blocks = (rows + WIDE - 1) / WIDE, chunk = call->chunk;
    const int64_t dim = padded(call->dim), v_dim = padded(call->v_dim);
    float **parts[] = {&x->blocks, &x->q, &x->dout, &x->k, &x->dk, &x->v, &x->dv, &x->s, &x->dp, &x->slope, &x->mask, &x->p, &x->ds, (float **)&x->nonfinite.keys};
    int64_t sizes[] = {blocks * gradient_block_floats(call), blocks * WIDE * dim, blocks * WIDE * v_dim,
                       chunk * dim, chunk * dim, chunk * v_dim, chunk * v_dim,
                       chunk * WIDE, chunk * WIDE, chunk * WIDE, chunk * WIDE,
                       chunk * TILE_WIDTH, chunk * TILE_WIDTH, 2 * padded(chunk)};
    return divide_floats(scratch, sizeof sizes / sizeof *sizes, parts, sizes);
}

static int64_t backward_scratch(const Call *call, int64_t rows) {
    Sums sums;
    return divide(&sums, call, rows, NULL);
}

/* Read one row. Rows that see no key (lse = inf) have no gradient, whatever they hold. */
static void read_row(GradientBlock block, const Sums *sums, const Call *call, const Gradients *given, const Unit *unit,
                     int lane) {
    const int64_t row = block.lanes->rows[lane];
    const int64_t query = row_query(call, unit, row), head = row_head(call, unit, row);
    float *q = sums->q + row * padded(call->dim), *dout = sums->dout + row * padded(call->v_dim);
    const float delta = *(float *)at(&given->delta, unit->batch, head, query);
    block.lse[lane] = *(float *)at(&given->lse, unit->batch, head, query);
    if (block.lse[lane] == INFINITY) return; /* the rest stays 0 */
    int good = widen_whole(q, at(&call->q, unit->batch, head, query), call->q.column, call->dtype, call->dim);
    good &= widen_whole(dout, at(&given->dout, unit->batch, head, query), given->dout.column, given->dtype, call->v_dim);
    if (!good || delta * 0 != 0) {
        memset(q, 0, sizeof(float) * call->dim);
        memset(dout, 0, sizeof(float) * call->v_dim);
        block.lse[lane] = NAN;
        return;
    }
    block.delta[lane] = delta;
    for (int64_t d = 0; d < call->dim; d++) q[d] *= (float)call->scale;
}

static void read_gradient_block(const Sums *sums, const Call *call, const Gradients *given, const Unit *unit, int64_t i) {
    GradientBlock block = gradient_block(call, sums, i);
    const int64_t dim = padded(call->dim), v_dim = padded(call->v_dim);
    float *q = sums->q + i * WIDE * dim, *dout = sums->dout + i * WIDE * v_dim;
    *block.lanes = block_lanes(call, unit, i * WIDE);
    const int64_t width = block.lanes->vectors * LANES;
    memset(block.dq, 0, sizeof(float) * call->dim * WIDE);
    memset(block.lse, 0, sizeof(float) * 2 * WIDE); /* and delta */
    memset(q, 0, sizeof(float) * WIDE * dim);
    memset(dout, 0, sizeof(float) * WIDE * v_dim);
    for (int lane = 0; lane < width; lane++)
        if (block.lanes->rows[lane] >= 0) read_row(block, sums, call, given, unit, lane);
    for (int64_t top = 0; top < width; top += LANES) {
        rows_to_lanes(block.q + top, width, q + top * dim, dim, call->dim);
        rows_to_lanes(block.dout + top, width, dout + top * v_dim, v_dim, call->v_dim);
    }
}

/* Set the scores with nonfinite keys to NaN. */
static void mark_nonfinite(float *s, const Sums *x, Range range, int64_t width) {
    for (int64_t i = 0; i < x->nonfinite.count; i++) {
        int64_t key = x->nonfinite.keys[i];
        for (int64_t lane = 0; range.start <= key && key < range.stop && lane < width; lane++)
            s[(key - range.start) * width + lane] = NAN;
    }
}

/* Turn the scores and dP of a block into P and dS, in columns of the tile. */
INLINE void weights_and_gradients(const int vectors, const Sums *x, GradientBlock block, int capped, int64_t keys,
                                  float *p, float *ds) {
    for (int64_t i = 0; i < keys; i++, p += TILE_WIDTH, ds += TILE_WIDTH)
        for (int j = 0; j < vectors; j++) {
            const int64_t from = (i * vectors + j) * LANES;
            vf score = load(x->s + from);
            vi seen = score != fill(-INFINITY);
            vf weight = exponential(score - load(block.lse + j * LANES));
            vf gradient = weight * (load(x->dp + from) - load(block.delta + j * LANES));
            if (capped) gradient *= load(x->slope + from);
            store(p + j * LANES, keep(seen, weight));
            store(ds + j * LANES, keep(seen, gradient));
        }
}

/* The slope of the softcap, from capped scores: 1 - (s / c)^2. */
static void cap_slope(float *to, const float *s, int64_t n, float softcap) {
    for (int64_t i = 0; i < n; i += LANES) {
        vf ratio = load(s + i) / softcap;
        store(to + i, 1.0f - ratio * ratio);
    }
}

static void clear_columns(const Sums *x, int64_t start, int64_t stop, int64_t column, int64_t width) {
    for (int64_t i = start; i < stop; i++) {
        memset(x->p + i * TILE_WIDTH + column, 0, sizeof(float) * width);
        memset(x->ds + i * TILE_WIDTH + column, 0, sizeof(float) * width);
    }
}

/* Fill a block's columns of the tile, keys `all`, and add to its dQ. `start` is the first key of the chunk. */
static void gradient_of_block(const Sums *x, const Call *call, const Unit *unit, int64_t i, Range all, int64_t start) {
    GradientBlock block = gradient_block(call, x, i);
    const Lanes *lanes = block.lanes;
    Range range = visible_range(lanes, call, unit, all.start, all.stop);
    const int64_t width = lanes->vectors * LANES, column = i * WIDE % TILE_ROWS, keys = range.stop - range.start;
    const int64_t dim = padded(call->dim), v_dim = padded(call->v_dim);
    const float *mask = call->mask.data ? x->mask : NULL;
    if (keys <= 0 || (mask && !copy_mask(x->mask, lanes, call, unit, range))) {
        clear_columns(x, all.start - start, all.stop - start, column, width);
        return;
    }
    clear_columns(x, all.start - start, range.start - start, column, width);
    clear_columns(x, range.stop - start, all.stop - start, column, width);
    const int64_t first = range.start - start;
    const float *k = x->k + first * dim, *v = x->v + first * v_dim;
    float *p = x->p + first * TILE_WIDTH + column, *ds = x->ds + first * TILE_WIDTH + column;
    multiply_scores(call, keys, lanes->vectors, (Left){k, dim, 1}, (Right){block.q, width}, (Result){x->s, width, NULL});
    mark_nonfinite(x->s, x, range, width);
    cap(x->s, keys * width, call);
    if (call->softcap != 0) cap_slope(x->slope, x->s, keys * width, (float)call->softcap);
    apply_masks(x->s, mask, lanes, call, unit, range);
    multiply(keys, lanes->vectors, (Left){v, v_dim, 1}, (Right){block.dout, width}, call->v_dim, (Result){x->dp, width, NULL});
    if (lanes->vectors == 1)
        weights_and_gradients(1, x, block, call->softcap != 0, keys, p, ds);
    else
        weights_and_gradients(2, x, block, call->softcap != 0, keys, p, ds);
    const vf ones[VECTORS] = {fill(1), fill(1)};
    multiply(call->dim, lanes->vectors, (Left){k, 1, dim}, (Right){ds, TILE_WIDTH}, keys, (Result){block.dq, width, ones});
}

/* Add the product of a tile [keys][rows] and [rows][columns] to `to` [keys][columns]. */
static void add_product(float *to, const float *tile, const float *x, int64_t keys, int64_t rows, int64_t columns) {
    const int64_t width = padded(columns);
    const vf ones[VECTORS] = {fill(1), fill(1)};
    for (int64_t j = 0; j < columns; j += WIDE)
        multiply(keys, columns - j > LANES ? VECTORS : 1, (Left){tile, TILE_WIDTH, 1}, (Right){x + j, width}, rows,
                 (Result){to + j, width, ones});
}

/* Add the gradients of a tile: rows from `top`, keys of the chunk. */
static void gradient_of_tile(const Sums *x, const Call *call, const Unit *unit, int64_t top, Range chunk) {
    const int64_t rows = smaller((unit->stop - unit->start) * call->group - top, TILE_ROWS);
    Range all = {chunk.stop, chunk.start, 0};
    for (int64_t i = top / WIDE; i * WIDE < top + rows; i++) {
        Range range = visible_range(gradient_block(call, x, i).lanes, call, unit, chunk.start, chunk.stop);
        if (range.start >= range.stop) continue;
        all.start = smaller(all.start, range.start);
        all.stop = greater(all.stop, range.stop);
    }
    if (all.start >= all.stop) return;
    for (int64_t i = top / WIDE; i * WIDE < top + rows; i++) gradient_of_block(x, call, unit, i, all, chunk.start);
    const int64_t first = all.start - chunk.start, keys = all.stop - all.start;
    const int64_t dim = padded(call->dim), v_dim = padded(call->v_dim);
    add_product(x->dv + first * v_dim, x->p + first * TILE_WIDTH, x->dout + top * v_dim, keys, rows, call->v_dim);
    add_product(x->dk + first * dim, x->ds + first * TILE_WIDTH, x->q + top * dim, keys, rows, call->dim);
}

static void add_rows(const Array *to, const float *from, int64_t width, int64_t start, int64_t stop, int64_t n) {
    for (int64_t i = start; i < stop; i++, from += width) add_floats(at(to, 0, 0, i), to->column, from, n);
}

/* Add dQ of a block. The copy of its queries is overwritten. */
static void add_dq(const Sums *x, const Call *call, const Gradients *given, const Unit *unit, int64_t i) {
    GradientBlock block = gradient_block(call, x, i);
    const int64_t width = block.lanes->vectors * LANES, dim = padded(call->dim);
    float *rows = x->q + i * WIDE * dim;
    for (int64_t top = 0; top < width; top += LANES) lanes_to_rows(rows + top * dim, dim, block.dq + top, width, call->dim);
    for (int lane = 0; lane < width; lane++, rows += dim) {
        const int64_t row = block.lanes->rows[lane];
        if (row < 0) continue;
        for (int64_t d = 0; d < call->dim; d++) rows[d] *= (float)call->scale;
        add_floats(at(&given->dq, unit->batch, row_head(call, unit, row), row_query(call, unit, row)), given->dq.column, rows,
                   call->dim);
    }
}

/* Add the gradients of a unit. */
static void backward_rows(const Call *call, const Gradients *given, const Unit *unit, float *scratch) {
    const int64_t rows = (unit->stop - unit->start) * call->group, blocks = (rows + WIDE - 1) / WIDE;
    const int64_t dim = padded(call->dim), v_dim = padded(call->v_dim);
    int64_t first = call->k_len, last = 0;
    Sums sums;
    divide(&sums, call, rows, scratch);
    for (int64_t i = 0; i < blocks; i++) {
        const Lanes *lanes = gradient_block(call, &sums, i).lanes;
        read_gradient_block(&sums, call, given, unit, i);
        first = smaller(first, lanes->least_first);
        last = greater(last, lanes->most_last);
    }
    for (int64_t start = first; start < last; start += call->chunk) {
        Range chunk = {start, smaller(start + call->chunk, last), 0};
        sums.nonfinite.count = 0;
        widen_rows(sums.k, dim, &call->k, call, unit, start, chunk.stop, call->dim, &sums.nonfinite);
        widen_rows(sums.v, v_dim, &call->v, call, unit, start, chunk.stop, call->v_dim, &sums.nonfinite);
        memset(sums.dk, 0, sizeof(float) * call->chunk * dim);
        memset(sums.dv, 0, sizeof(float) * call->chunk * v_dim);
        for (int64_t top = 0; top < rows; top += TILE_ROWS) gradient_of_tile(&sums, call, unit, top, chunk);
        add_rows(&given->dk, sums.dk, dim, start, chunk.stop, call->dim);
        add_rows(&given->dv, sums.dv, v_dim, start, chunk.stop, call->v_dim);
    }
    for (int64_t i = 0; i < blocks; i++) add_dq(&sums, call, given, unit, i);
}
