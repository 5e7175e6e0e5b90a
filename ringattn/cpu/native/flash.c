/* Functions of the library, and the choice of the instruction set. Instruction sets have numbers, the best one last. */
#include "call.h"
#ifdef __x86_64__
#include <cpuid.h>
#endif

extern const Kernels ringattn_generic;
#ifdef __x86_64__
extern const Kernels ringattn_avx2, ringattn_avx512;
static const Kernels *const all[] = {&ringattn_generic, &ringattn_avx2, &ringattn_avx512};
#else
static const Kernels *const all[] = {&ringattn_generic};
#endif

#ifdef __x86_64__
/* What __builtin_cpu_supports tells, which not every compiler's library has. Bits are in Intel's manual under CPUID. */
static int64_t best(void) {
    const unsigned avx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA, XGETBV, AVX, F16C */
    const unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & avx) != avx) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* registers that the system saves */
    if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2)) return 0;
    return (saved & 0xe6) == 0xe6 && (b & avx512) == avx512 ? 2 : 1;
}
#else
static int64_t best(void) { return 0; }
#endif

/* The number of instruction sets that this processor has. */
int64_t ringattn_flash_sets(void) { return best() + 1; }

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
