/* The kernels of one instruction set, as a table. Include it with LANES and TABLE defined. */
#pragma once
#include "few_rows.h"

static int64_t scratch_floats(const Call *call, int64_t queries) {
    return greater(many_rows_scratch(call, queries * call->group), few_rows_scratch(call)) + LANES;
}

static int forward(const Call *call, const Unit *unit, float *scratch) {
    float *aligned = (float *)(((uintptr_t)scratch + 4 * LANES - 1) / (4 * LANES) * (4 * LANES));
    int64_t rows = (unit->stop - unit->start) * call->group;
    return streams(call, rows) ? few_rows(call, unit, aligned) : many_rows(call, unit, aligned);
}

const Kernels TABLE = {NAME, scratch_floats, forward};
