/* The kernels with AVX-512. */
#ifdef __x86_64__
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define LANES 16
#define NAME "AVX-512"
#define TABLE ringattn_avx512
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
