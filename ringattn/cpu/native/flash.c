/* Functions of the library, and the choice of the instruction set. Instruction sets have numbers, the best one last. */
#include "call.h"

extern const Kernels ringattn_generic;
#ifdef __x86_64__
extern const Kernels ringattn_avx2, ringattn_avx512;
static const Kernels *const all[] = {&ringattn_generic, &ringattn_avx2, &ringattn_avx512};
#else
static const Kernels *const all[] = {&ringattn_generic};
#endif

/* The number of instruction sets that this processor has. */
int64_t ringattn_flash_sets(void) {
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? 3
               : 2;
#else
    return 1;
#endif
}

const char *ringattn_flash_name(int64_t set) { return all[set]->name; }

int64_t ringattn_flash_scratch(int64_t set, const Call *call, int64_t queries) { return all[set]->scratch(call, queries); }

void ringattn_flash_forward(int64_t set, const Call *call, const Unit *unit, float *scratch) {
    all[set]->forward(call, unit, scratch);
}

int64_t ringattn_flash_backward_scratch(int64_t set, const Call *call, int64_t queries) {
    return all[set]->backward_scratch(call, queries);
}

void ringattn_flash_backward(int64_t set, const Call *call, const Gradients *gradients, const Unit *unit, float *scratch) {
    all[set]->backward(call, gradients, unit, scratch);
}
