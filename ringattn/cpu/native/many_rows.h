/* Forward pass of many rows: lanes are rows, and the state of a block of rows is transposed.
 *
 * With K [keys][D] and Q^T [D][lanes], the scores of a tile are S^T = K Q^T [keys][lanes], in the first-level cache. The
 * softmax runs down the keys. Then O^T = O^T decay + V^T P^T [Dv][lanes]. K and V need no transposition.
 *
 * NaN and infinity in v must reach only the rows that see them, but 0 NaN is NaN. Such rows of v are left out of the
 * product, and added for the lanes that see them.
 */
#pragma once
#include "rows.h"
#include "tile.h"

typedef struct { /* scratch of a block of rows */
    Lanes *lanes;
    float *q, *acc, *m, *l;
} Block;

enum { LANES_FLOATS = sizeof(Lanes) / sizeof(float) }; /* a multiple of LANES */

static int64_t padded(int64_t n) { return (n + 15) / 16 * 16 + 16; } /* odd numbers of cache lines spread over the cache */

static int64_t block_floats(const Call *call) { return LANES_FLOATS + (call->dim + call->v_dim + 2) * WIDE; }

static Block block_at(const Call *call, float *scratch, int64_t i) {
    float *lanes = scratch + i * block_floats(call), *q = lanes + LANES_FLOATS;
    float *acc = q + call->dim * WIDE;
    return (Block){(Lanes *)lanes, q, acc, acc + call->v_dim * WIDE, acc + (call->v_dim + 1) * WIDE};
}

typedef struct { /* keys and values of a chunk, float32; and scratch of a tile */
    const float *k;      /* the caller's or `k_copy` */
    int64_t k_row;       /* floats from key to key */
    float *k_copy, *v, *s, *mask, *q_rows, *v_rows; /* q_rows and v_rows: LANES rows */
    float *seen;         /* [nonfinite keys][WIDE]: their scores */
    Nonfinite nonfinite; /* values */
    int64_t start;
} Chunk;

/* Divide the scratch. Return the number of floats. */
static int64_t divide_chunk(Chunk *x, const Call *call, float *scratch) {
    const int64_t n = call->chunk;
    float **parts[] = {&x->k_copy, &x->v, &x->s, &x->mask, &x->seen, &x->q_rows, &x->v_rows, (float **)&x->nonfinite.keys};
    int64_t sizes[] = {n * padded(call->dim), n * padded(call->v_dim), n * WIDE, n * WIDE, n * WIDE,
                       LANES * padded(call->dim), LANES * padded(call->v_dim), padded(n)};
    return divide_floats(scratch, sizeof sizes / sizeof *sizes, parts, sizes);
}

static int64_t many_rows_scratch(const Call *call, int64_t rows) {
    Chunk chunk;
    return (rows + WIDE - 1) / WIDE * block_floats(call) + divide_chunk(&chunk, call, NULL);
}

/* Keep the scores of the nonfinite values: -inf tells that a lane does not see them. */
static void keep_scores(const Chunk *chunk, Range range, int64_t width) {
    for (int64_t i = 0; i < chunk->nonfinite.count; i++) {
        int64_t key = chunk->nonfinite.keys[i];
        if (range.start <= key && key < range.stop)
            memcpy(chunk->seen + i * WIDE, chunk->s + (key - range.start) * width, sizeof(float) * width);
    }
}

/* Add the nonfinite values to the lanes that see them. */
static void add_nonfinite(Block block, const Chunk *chunk, Range range, int64_t width, const Call *call, const Unit *unit) {
    for (int64_t i = 0; i < chunk->nonfinite.count; i++) {
        int64_t key = chunk->nonfinite.keys[i];
        if (key < range.start || key >= range.stop) continue;
        widen(chunk->v_rows, at(&call->v, unit->batch, unit->head, key), call->v.column, call->dtype, call->v_dim);
        for (int64_t lane = 0; lane < width; lane += LANES) {
            vi seen = load(chunk->seen + i * WIDE + lane) != fill(-INFINITY);
            vf weight = load(chunk->s + (key - range.start) * width + lane);
            for (int64_t d = 0; d < call->v_dim; d++) {
                float *to = block.acc + d * width + lane;
                store(to, load(to) + keep(seen, weight * chunk->v_rows[d]));
            }
        }
    }
}

/* Attend the rows of one block to the keys of a chunk. */
static void attend_block(Block block, const Chunk *chunk, Range range, const Call *call, const Unit *unit) {
    const Lanes *x = block.lanes;
    const int64_t width = x->vectors * LANES, keys = range.stop - range.start;
    const int64_t v_dim = padded(call->v_dim);
    const float *k = chunk->k + (range.start - chunk->start) * chunk->k_row;
    const float *v = chunk->v + (range.start - chunk->start) * v_dim;
    const float *mask = call->mask.data ? chunk->mask : NULL;
    if (mask && !copy_mask(chunk->mask, x, call, unit, range)) return;
    multiply_scores(call, keys, x->vectors, (Left){k, chunk->k_row, 1}, (Right){block.q, width}, (Result){chunk->s, width, NULL});
    cap(chunk->s, keys * width, call);
    apply_masks(chunk->s, mask, x, call, unit, range);
    keep_scores(chunk, range, width);
    vf m[VECTORS], l[VECTORS], decay[VECTORS];
    memcpy(m, block.m, sizeof m); /* of two vectors, also where the block has one */
    memcpy(l, block.l, sizeof l);
    softmax(x, chunk->s, keys, m, l, decay);
    memcpy(block.m, m, sizeof m);
    memcpy(block.l, l, sizeof l);
    multiply(call->v_dim, x->vectors, (Left){v, 1, v_dim}, (Right){chunk->s, width}, keys, (Result){block.acc, width, decay});
    add_nonfinite(block, chunk, range, width, call, unit);
}

/* Read the queries and the state of a block. */
static void read_block(Block block, const Chunk *chunk, const Call *call, const Unit *unit) {
    const Lanes *x = block.lanes;
    const int64_t width = x->vectors * LANES, dim = padded(call->dim), v_dim = padded(call->v_dim);
    for (int64_t top = 0; top < width; top += LANES) {
        for (int i = 0; i < LANES; i++) {
            float *q = chunk->q_rows + i * dim, *acc = chunk->v_rows + i * v_dim;
            RowState state = {-INFINITY, 0};
            memset(q, 0, sizeof(float) * call->dim);
            memset(acc, 0, sizeof(float) * call->v_dim);
            if (x->rows[top + i] >= 0) state = read_query(q, acc, call, unit, x->rows[top + i]);
            block.m[top + i] = state.m;
            block.l[top + i] = state.l;
        }
        rows_to_lanes(block.q + top, width, chunk->q_rows, dim, call->dim);
        rows_to_lanes(block.acc + top, width, chunk->v_rows, v_dim, call->v_dim);
    }
}

static void write_block(Block block, const Chunk *chunk, const Call *call, const Unit *unit) {
    const Lanes *x = block.lanes;
    const int64_t width = x->vectors * LANES, v_dim = padded(call->v_dim);
    for (int64_t top = 0; top < width; top += LANES) {
        lanes_to_rows(chunk->v_rows, v_dim, block.acc + top, width, call->v_dim);
        for (int i = 0; i < LANES; i++)
            if (x->rows[top + i] >= 0)
                write_row(chunk->v_rows + i * v_dim, (RowState){block.m[top + i], block.l[top + i]}, call, unit,
                          x->rows[top + i]);
    }
}

static Lanes block_lanes(const Call *call, const Unit *unit, int64_t top) {
    Lanes lanes;
    int64_t count = smaller((unit->stop - unit->start) * call->group - top, WIDE);
    lanes.vectors = count <= LANES ? 1 : VECTORS;
    lanes.keys = 1;
    set_lanes(&lanes, call, unit, top, count);
    return lanes;
}

/* Whether products read the caller's keys: float32 without padding. The keys of a product must not share few cache sets. */
static int reads_keys(const Call *call) {
    const int near = call->k.row >= 0 && call->k.row <= 2048;
    return call->dtype == FLOAT32 && call->k.column == sizeof(float) && near && !call->k_ids;
}

/* Copy the keys and values start .. stop - 1, or read the keys where they are. */
static void read_chunk(Chunk *chunk, int64_t stop, const Call *call, const Unit *unit) {
    const int64_t start = chunk->start;
    chunk->nonfinite.count = 0;
    widen_rows(chunk->v, padded(call->v_dim), &call->v, call, unit, start, stop, call->v_dim, &chunk->nonfinite);
    if (reads_keys(call)) {
        chunk->k = (const float *)at(&call->k, unit->batch, unit->head, start);
        chunk->k_row = call->k.row / (int64_t)sizeof(float);
        return;
    }
    chunk->k = chunk->k_copy;
    chunk->k_row = padded(call->dim);
    widen_rows(chunk->k_copy, chunk->k_row, &call->k, call, unit, start, stop, call->dim, NULL);
}

/* Attend the blocks to the keys start .. stop - 1, and fetch the chunk after them, which ends at `last` at most. */
static void attend_chunk(Chunk *chunk, int64_t stop, int64_t last, int64_t blocks, float *scratch, const Call *call,
                         const Unit *unit) {
    const int64_t next = smaller(stop + call->chunk, last);
    int copied = 0;
    for (int64_t i = 0; i < blocks; i++) {
        Block block = block_at(call, scratch, i);
        Range range = visible_range(block.lanes, call, unit, chunk->start, stop);
        if (range.start >= range.stop) continue;
        if (!copied) read_chunk(chunk, stop, call, unit);
        copied = 1;
        fetch_rows(&call->k, call, unit, stop, next, call->dim, i, blocks);
        fetch_rows(&call->v, call, unit, stop, next, call->v_dim, i, blocks);
        attend_block(block, chunk, range, call, unit);
    }
}

/* Attend all rows of a unit. */
static void many_rows(const Call *call, const Unit *unit, float *scratch) {
    const int64_t rows = (unit->stop - unit->start) * call->group, blocks = (rows + WIDE - 1) / WIDE;
    Chunk chunk;
    divide_chunk(&chunk, call, scratch + blocks * block_floats(call));
    int64_t first = call->k_len, last = 0;
    for (int64_t i = 0; i < blocks; i++) {
        Block block = block_at(call, scratch, i);
        *block.lanes = block_lanes(call, unit, i * WIDE);
        read_block(block, &chunk, call, unit);
        first = smaller(first, block.lanes->least_first);
        last = greater(last, block.lanes->most_last);
    }
    for (chunk.start = first; chunk.start < last; chunk.start += call->chunk)
        attend_chunk(&chunk, smaller(chunk.start + call->chunk, last), last, blocks, scratch, call, unit);
    for (int64_t i = 0; i < blocks; i++) write_block(block_at(call, scratch, i), &chunk, call, unit);
}
