/* Forward pass of many rows: lanes are rows, and the state of a block of rows is transposed.
 *
 * With K [keys][D] and Q^T [D][lanes], the scores of a tile are S^T = K Q^T [keys][lanes], in the first-level cache. The
 * softmax runs down the keys. Then O^T = O^T decay + V^T P^T [Dv][lanes]. K and V need no transposition.
 */
#pragma once
#include "tile.h"

typedef struct { /* scratch of a block of rows */
    float *q, *acc, *m, *l;
} Block;

static int64_t padded(int64_t n) { return (n + 15) / 16 * 16 + 16; } /* odd numbers of cache lines spread over the cache */

static int64_t block_floats(const Call *call) { return (call->dim + call->v_dim + 2) * WIDE; }

static Block block_at(const Call *call, float *scratch, int64_t i) {
    float *q = scratch + i * block_floats(call);
    float *acc = q + call->dim * WIDE;
    return (Block){q, acc, acc + call->v_dim * WIDE, acc + (call->v_dim + 1) * WIDE};
}

static int64_t many_rows_scratch(const Call *call, int64_t rows) {
    int64_t tiles = call->chunk * (padded(call->dim) + padded(call->v_dim) + 2 * WIDE);
    return (rows + WIDE - 1) / WIDE * block_floats(call) + tiles + call->dim + call->v_dim;
}

/* Read the queries, scaled, and the state of a block. */
static void read_block(Block block, const Lanes *x, const Call *call, const Unit *unit, float *row_scratch) {
    const int64_t width = x->vectors * LANES;
    memset(block.q, 0, sizeof(float) * call->dim * width);
    memset(block.acc, 0, sizeof(float) * call->v_dim * width);
    for (int64_t i = 0; i < width; i++) {
        block.m[i] = -INFINITY;
        block.l[i] = 0;
        if (x->rows[i] < 0) continue;
        int64_t query = row_query(call, unit, x->rows[i]), head = row_head(call, unit, x->rows[i]);
        widen(row_scratch, at(&call->q, unit->batch, head, query), call->q.column, call->dtype, call->dim);
        for (int64_t d = 0; d < call->dim; d++) block.q[d * width + i] = row_scratch[d] * (float)call->scale;
        block.m[i] = *(float *)at(&call->m, unit->batch, head, query);
        block.l[i] = *(float *)at(&call->l, unit->batch, head, query);
        widen(row_scratch, at(&call->acc, unit->batch, head, query), call->acc.column, FLOAT32, call->v_dim);
        for (int64_t d = 0; d < call->v_dim; d++) block.acc[d * width + i] = row_scratch[d];
    }
}

static void write_block(Block block, const Lanes *x, const Call *call, const Unit *unit) {
    const int64_t width = x->vectors * LANES;
    for (int64_t i = 0; i < width; i++) {
        if (x->rows[i] < 0) continue;
        int64_t query = row_query(call, unit, x->rows[i]), head = row_head(call, unit, x->rows[i]);
        char *acc = at(&call->acc, unit->batch, head, query);
        for (int64_t d = 0; d < call->v_dim; d++) *(float *)(acc + d * call->acc.column) = block.acc[d * width + i];
        *(float *)at(&call->m, unit->batch, head, query) = block.m[i];
        *(float *)at(&call->l, unit->batch, head, query) = block.l[i];
    }
}

static int all_finite(const float *x, int64_t n) {
    vf sum = (vf){0};
    for (int64_t i = 0; i < n; i += LANES) sum += load(x + i) * 0.0f;
    for (int i = 0; i < LANES; i++)
        if (sum[i] != 0) return 0;
    return 1;
}

typedef struct { /* keys and values of a chunk, float32; and scratch of a tile */
    float *k, *v, *s, *mask;
    int64_t start;
} Chunk;

/* Attend the rows of one block to the keys of a chunk. */
static void attend_block(Block block, const Lanes *x, Chunk chunk, Range range, const Call *call, const Unit *unit) {
    const int64_t width = x->vectors * LANES, keys = range.stop - range.start;
    const int64_t dim = padded(call->dim), v_dim = padded(call->v_dim);
    const float *k = chunk.k + (range.start - chunk.start) * dim;
    const float *v = chunk.v + (range.start - chunk.start) * v_dim;
    const float *mask = call->mask.data ? chunk.mask : NULL;
    if (mask && !copy_mask(chunk.mask, x, call, unit, range)) return;
    multiply(keys, x->vectors, (Left){k, dim, 1}, (Right){block.q, width}, call->dim, (Result){chunk.s, width, NULL});
    apply_rules(chunk.s, mask, x, call, unit, range);
    vf m[VECTORS], l[VECTORS], decay[VECTORS];
    memcpy(m, block.m, sizeof m); /* of two vectors, also where the block has one */
    memcpy(l, block.l, sizeof l);
    softmax(x, chunk.s, keys, m, l, decay);
    memcpy(block.m, m, sizeof m);
    memcpy(block.l, l, sizeof l);
    multiply(call->v_dim, x->vectors, (Left){v, 1, v_dim}, (Right){chunk.s, width}, keys, (Result){block.acc, width, decay});
}

static Lanes block_lanes(const Call *call, const Unit *unit, int64_t top) {
    Lanes lanes;
    int64_t count = smaller((unit->stop - unit->start) * call->group - top, WIDE);
    lanes.vectors = count <= LANES ? 1 : VECTORS;
    lanes.keys = 1;
    set_lanes(&lanes, call, unit, top, count);
    return lanes;
}

/* Attend all rows of a unit. Return 0 and leave the state as it was if the result is not finite. */
static int many_rows(const Call *call, const Unit *unit, float *scratch) {
    const int64_t rows = (unit->stop - unit->start) * call->group, blocks = (rows + WIDE - 1) / WIDE;
    Chunk chunk;
    chunk.k = scratch + blocks * block_floats(call);
    chunk.v = chunk.k + call->chunk * padded(call->dim);
    chunk.s = chunk.v + call->chunk * padded(call->v_dim);
    chunk.mask = chunk.s + call->chunk * WIDE;
    int64_t first = call->k_len, last = 0;
    for (int64_t i = 0; i < blocks; i++) {
        Lanes lanes = block_lanes(call, unit, i * WIDE);
        read_block(block_at(call, scratch, i), &lanes, call, unit, chunk.mask + call->chunk * WIDE);
        first = smaller(first, lanes.least_first);
        last = greater(last, lanes.most_last);
    }
    for (chunk.start = first; chunk.start < last; chunk.start += call->chunk) {
        const int64_t stop = smaller(chunk.start + call->chunk, last);
        int packed = 0;
        for (int64_t i = 0; i < blocks; i++) {
            Lanes lanes = block_lanes(call, unit, i * WIDE);
            Range range = visible_range(&lanes, call, unit, chunk.start, stop);
            if (range.start >= range.stop) continue;
            if (!packed) {
                widen_rows(chunk.k, padded(call->dim), &call->k, unit, chunk.start, stop, call->dtype, call->dim);
                widen_rows(chunk.v, padded(call->v_dim), &call->v, unit, chunk.start, stop, call->dtype, call->v_dim);
                packed = 1;
            }
            attend_block(block_at(call, scratch, i), &lanes, chunk, range, call, unit);
        }
    }
    for (int64_t i = 0; i < blocks; i++) {
        Lanes lanes = block_lanes(call, unit, i * WIDE);
        if (!all_finite(block_at(call, scratch, i).acc, call->v_dim * lanes.vectors * LANES)) return 0;
    }
    for (int64_t i = 0; i < blocks; i++) {
        Lanes lanes = block_lanes(call, unit, i * WIDE);
        write_block(block_at(call, scratch, i), &lanes, call, unit);
    }
    return 1;
}
