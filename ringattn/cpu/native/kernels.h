/* The kernels of one instruction set, as a table. Include it with LANES and TABLE defined. */
#pragma once
#include "backward.h"
#include "few_rows.h"

static int64_t scratch_floats(const Call *call, int64_t queries) {
    return greater(many_rows_scratch(call, queries * call->group), few_rows_scratch(call)) + LANES;
}

static float *aligned(float *scratch) {
    return (float *)(((uintptr_t)scratch + 4 * LANES - 1) / (4 * LANES) * (4 * LANES));
}

static void forward(const Call *call, const Unit *unit, float *scratch) {
    int64_t rows = (unit->stop - unit->start) * call->group;
    if (!streams(call, rows) || !few_rows(call, unit, aligned(scratch))) many_rows(call, unit, aligned(scratch));
}

static int64_t backward_floats(const Call *call, int64_t queries) {
    return backward_scratch(call, queries * call->group) + LANES;
}

static void backward(const Call *call, const Gradients *gradients, const Unit *unit, float *scratch) {
    backward_rows(call, gradients, unit, aligned(scratch));
}

const Kernels TABLE = {NAME, scratch_floats, forward, backward_floats, backward};
