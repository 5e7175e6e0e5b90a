/* The kernels with AVX2. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#define NAME "AVX2"
#define TABLE ringattn_avx2
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
