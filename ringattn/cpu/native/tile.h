/* Tiles of scores: masks and the online softmax.
 *
 * A tile holds steps of one or two vectors. A lane of a vector is one row and one key of the step:
 *
 *     many rows: lane = row, one key in a step        few rows: a step has `keys` keys, lane = row * keys + key
 */
#pragma once
#include "pack.h"
#include "products.h"

typedef struct {
    int vectors;             /* in a step */
    int keys;                /* in a step */
    int64_t rows[WIDE];      /* row of the unit in each lane; -1: none */
    vi first[VECTORS], last[VECTORS], ids[VECTORS];
    vi key;                  /* key of the step in each lane */
    int64_t least_first, most_first, least_last, most_last, least_id, most_id; /* of all rows */
} Lanes;

/* Fill in `count` rows of a unit, from row `top`. Lanes without a row see all keys. */
static void set_lanes(Lanes *x, const Call *call, const Unit *unit, int64_t top, int64_t count) {
    const int32_t *ids = call->q_ids ? call->q_ids + unit->batch * call->q_len : NULL;
    x->least_first = x->least_last = x->least_id = INT32_MAX;
    x->most_first = x->most_last = x->most_id = -1;
    for (int i = 0; i < x->vectors * LANES; i++) {
        int64_t row = i / x->keys;
        int64_t query = row_query(call, unit, top + row);
        int64_t first = 0, last = INT32_MAX, id = -1;
        x->rows[i] = row < count ? top + row : -1;
        if (row < count) {
            id = ids ? ids[query] : 0;
            first = call->first[query];
            last = id < 0 ? first : call->last[query]; /* padding sees nothing */
            x->least_first = smaller(x->least_first, first);
            x->most_first = greater(x->most_first, first);
            x->least_last = smaller(x->least_last, last);
            x->most_last = greater(x->most_last, last);
            x->most_id = greater(x->most_id, id);
            if (id >= 0) x->least_id = smaller(x->least_id, id);
        }
        x->first[i / LANES][i % LANES] = (int32_t)first;
        x->last[i / LANES][i % LANES] = (int32_t)last;
        x->ids[i / LANES][i % LANES] = (int32_t)id;
    }
    for (int i = 0; i < LANES; i++) x->key[i] = i % x->keys;
}

typedef struct {
    int64_t start, stop; /* keys */
    int partial;         /* whether the band or segments hide any of them from any row */
} Range;

/* The keys of start .. stop - 1 that the band and segments may show to the rows. */
static Range visible_range(const Lanes *x, const Call *call, const Unit *unit, int64_t start, int64_t stop) {
    Range range = {greater(start, x->least_first), smaller(stop, x->most_last), 0};
    const int32_t *ids = ids_of_keys(call, unit);
    if (ids) {
        while (range.start < range.stop && (ids[range.start] < x->least_id || ids[range.start] > x->most_id)) range.start++;
        while (range.start < range.stop && (ids[range.stop - 1] < x->least_id || ids[range.stop - 1] > x->most_id))
            range.stop--;
        range.partial = x->least_id != x->most_id;
        for (int64_t i = range.start; i < range.stop; i++) range.partial |= ids[i] != x->least_id;
    }
    range.partial |= x->most_first > range.start || x->least_last < range.stop;
    range.partial |= (range.stop - range.start) % x->keys != 0; /* keys past the end of the last step */
    return range;
}

static int64_t steps_of(const Lanes *x, Range range) { return (range.stop - range.start + x->keys - 1) / x->keys; }

static float mask_value(const Call *call, const char *p) {
    if (call->mask_dtype == BOOLEAN) return *p ? 0.0f : -INFINITY;
    return number(call->mask_dtype, p);
}

/* Copy the array mask's part of a tile: numbers to add to the scores. Return whether any is not -inf. */
static int copy_mask(float *to, const Lanes *x, const Call *call, const Unit *unit, Range range) {
    int any = 0;
    for (int i = 0; i < x->vectors * LANES; i++) {
        int64_t row = x->rows[i];
        const char *from = row < 0 ? NULL
                                   : at(&call->mask, unit->batch, row_head(call, unit, row), row_query(call, unit, row));
        int64_t key = range.start + x->key[i % LANES];
        for (int64_t step = 0; step < steps_of(x, range); step++, key += x->keys) {
            float value = -INFINITY;
            if (from && key < range.stop)
                value = mask_value(call, from + (call->columns ? call->columns[key] : key) * call->mask.column);
            to[step * x->vectors * LANES + i] = value;
            any |= value != -INFINITY;
        }
    }
    return any;
}

/* A call with few pairs of a row and a key: one score may decide a result alone, and no rounding averages out. */
static int is_small(const Call *call) { return call->q_len * call->group * call->k_len <= 2048; }

/* Scores. Those of a small call are exact sums: libraries add so few products in shorter chains than `multiply` does. */
static void multiply_scores(const Call *call, ptrdiff_t keys, int vectors, Left k, Right q, Result s) {
    if (is_small(call))
        multiply_exactly(keys, vectors, k, q, call->dim, s);
    else
        multiply(keys, vectors, k, q, call->dim, s);
}

/* Apply the softcap c of the call, if it has one: c tanh(s / c). */
static void cap(float *s, int64_t n, const Call *call) {
    const float softcap = (float)call->softcap;
    if (softcap == 0) return;
    for (int64_t i = 0; i < n; i += LANES) store(s + i, hyperbolic_tangent(load(s + i) / softcap) * softcap);
}

static vi key_ids(const Lanes *x, const int32_t *ids, int64_t key, int64_t stop) {
    vi found = fill_int(ids[key]);
    for (int i = 0; x->keys > 1 && i < LANES; i++) found[i] = ids[smaller(key + x->key[i], stop - 1)];
    return found;
}

/* Set the scores that the band and segments hide to -inf. */
static void hide(float *s, const Lanes *x, const Call *call, const Unit *unit, Range range) {
    const int32_t *ids = ids_of_keys(call, unit);
    const vf hidden_score = fill(-INFINITY);
    for (int64_t key = range.start; key < range.stop; key += x->keys) {
        vi keys = x->key + (int32_t)key;
        vi past = keys >= (int32_t)range.stop;
        vi key_id = ids ? key_ids(x, ids, key, range.stop) : (vi){0};
        for (int j = 0; j < x->vectors; j++, s += LANES) {
            vi hidden = past | (keys < x->first[j]) | (keys >= x->last[j]);
            if (ids) hidden |= key_id != x->ids[j];
            store(s, choose(hidden, hidden_score, load(s)));
        }
    }
}

/* Add a copied array mask. Its -inf hides a score, even NaN. */
static void add_mask(float *s, const float *mask, int64_t n) {
    const vf hidden_score = fill(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) {
        vf value = load(mask + i);
        store(s + i, choose(value == hidden_score, hidden_score, load(s + i) + value));
    }
}

/* Apply all masks to the scores of a tile. `mask` is a copied array mask, or NULL. */
static void apply_masks(float *s, const float *mask, const Lanes *x, const Call *call, const Unit *unit, Range range) {
    if (mask) add_mask(s, mask, steps_of(x, range) * x->vectors * LANES);
    if (range.partial) hide(s, x, call, unit, range);
}

/* The largest number of the lanes of each row, in all of these lanes. */
static vf larger_of_row(vf x, int keys) {
    for (int i = 0; i < LANES; i += keys) {
        float top = x[i];
        for (int j = 1; j < keys; j++) top = x[i + j] > top ? x[i + j] : top;
        for (int j = 0; j < keys; j++) x[i + j] = top;
    }
    return x;
}

/* One step of the online softmax: turn scores into weights relative to the new maxima.
   `m` and `l` are the running maxima and the sums of each lane, `decay` becomes exp(m before - m after). */
INLINE void softmax_some(const int vectors, float *s, int64_t steps, int keys, vf *m, vf *l, vf *decay) {
    vf top[VECTORS], base[VECTORS], sum[VECTORS];
    for (int j = 0; j < vectors; j++) top[j] = m[j];
    for (int64_t i = 0; i < steps; i++)
        for (int j = 0; j < vectors; j++) top[j] = larger(load(s + (i * vectors + j) * LANES), top[j]);
    for (int j = 0; j < vectors; j++) {
        if (keys > 1) top[j] = larger_of_row(top[j], keys);
        base[j] = keep(top[j] != fill(-INFINITY), top[j]); /* a row without a visible key so far */
        decay[j] = exponential(m[j] - base[j]);
        m[j] = top[j];
        sum[j] = (vf){0};
    }
    for (int64_t i = 0; i < steps; i++)
        for (int j = 0; j < vectors; j++) {
            float *p = s + (i * vectors + j) * LANES;
            vf weight = exponential(load(p) - base[j]);
            sum[j] += weight;
            store(p, weight);
        }
    for (int j = 0; j < vectors; j++) l[j] = l[j] * decay[j] + sum[j];
}

static void softmax(const Lanes *x, float *s, int64_t steps, vf *m, vf *l, vf *decay) {
    if (x->vectors == 1)
        softmax_some(1, s, steps, x->keys, m, l, decay);
    else
        softmax_some(2, s, steps, x->keys, m, l, decay);
}
