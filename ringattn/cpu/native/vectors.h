/* Vectors of LANES floats, by the vector extensions of GCC and Clang. LANES is the register width of one instruction set.
 *
 * Each set has its own source file, which includes these headers after it has chosen the set. All functions are static.
 */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf fill(float x) { return x - (vf){0}; }
INLINE vi fill_int(int32_t x) { return x - (vi){0}; }

INLINE vf keep(vi condition, vf x) { return (vf)(condition & (vi)x); } /* x, or 0 where the condition is false */
INLINE vf choose(vi condition, vf x, vf otherwise) { return (vf)((condition & (vi)x) | (~condition & (vi)otherwise)); }

/* The larger one of each pair. NaN in x may give either. */
INLINE vf larger(vf x, vf y) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return choose(x > y, x, y);
#endif
}

#ifdef __clang__
#define SHUFFLE(X, Y, ...) __builtin_shufflevector(X, Y, __VA_ARGS__)
#else
#define SHUFFLE(X, Y, ...) __builtin_shuffle(X, Y, (vi){__VA_ARGS__})
#endif

/* Lanes of x and y in turns, of their lower and of their upper halves. */
INLINE vf low_in_turns(vf x, vf y) {
#if LANES == 16
    return SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif LANES == 8
    return SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return SHUFFLE(x, y, 0, 4, 1, 5);
#endif
}
INLINE vf high_in_turns(vf x, vf y) {
#if LANES == 16
    return SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES == 8
    return SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return SHUFFLE(x, y, 2, 6, 3, 7);
#endif
}

/* Transpose LANES vectors. Each round rotates the bits of (vector, lane) by one. */
INLINE void transpose(vf x[LANES]) {
#pragma GCC unroll 4
    for (int n = LANES; n > 1; n /= 2) {
        vf y[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = low_in_turns(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = high_in_turns(x[i], x[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

INLINE vf from_bfloat16(const uint16_t *p) { /* the upper half of a float32 */
    vh bits;
    memcpy(&bits, p, sizeof bits);
    return (vf)(__builtin_convertvector(bits, vu) << 16);
}

INLINE vf from_float16(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LANES == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    vh half;
    memcpy(&half, p, sizeof half);
    vu bits = __builtin_convertvector(half, vu);
    vf scaled = (vf)((bits & 0x7fffu) << 13) * 0x1p112f;             /* the exponent's bias is 127 instead of 15 */
    vu special = (vu)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;    /* infinity and NaN */
    return (vf)((vu)scaled | special | (bits & 0x8000u) << 16);
#endif
}

INLINE void to_bfloat16(uint16_t *p, vf x) { /* rounds to nearest even */
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    vu nan = (vu)(x != x);
    vh half = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), vh);
    memcpy(p, &half, sizeof half);
}

INLINE void to_float16(uint16_t *p, vf x) { /* rounds to nearest even */
#if LANES == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    const vu sign = (vu)x & 0x80000000u;
    const vf size = (vf)((vu)x ^ sign);
    /* Adding 2^(e + 13) to a number below 2^(e + 1) rounds it to float16's 11 bits; from e = -14 on, to multiples of 2^-24. */
    const vu exponent = (vu)size & 0x7f800000u;
    const vu least = exponent < 0x38800000u;
    const vf round = (vf)(((exponent & ~least) | (0x38800000u & least)) + (13u << 23));
    const vu bits = (vu)(((size + round) - round) * 0x1p-112f) >> 13; /* the exponent's bias is 15 instead of 127 */
    const vu special = (vu)(size >= 65520.0f);
    const vu nan = (vu)(x != x);
    const vu found = (bits & ~(special | nan)) | (0x7c00u & special) | (0x7e00u & nan);
    vh half = __builtin_convertvector(found | sign >> 16, vh);
    memcpy(p, &half, sizeof half);
#endif
}

/* exp(x) = 2^(n + f). 0 where exp(x) would be subnormal; NaN stays. x must be below 88. The relative error is at most 3.1e-7
   (AVX-512: 2.3e-7), of which up to 2e-7 is the rounding of log2(e) where x is large; exp(0) is exactly 1. */
INLINE vf exponential(vf x) {
    const float log2e = 1.44269504088896341f, least = -87.0f;
#if LANES == 16 /* n has 4 bits after the point, whose powers are a table; Taylor's polynomial has an error of 9e-9 */
    const vf powers = {1.0f,           0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f, 0x1.3dea64p+0f,
                       0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                       0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};
    const float round = 0x1.8p23f / 16; /* the sum has 16 n in its low bits */
    vf shifted = x * log2e + round;
    vf n = shifted - round;
    vf f = x * log2e - n;
    vf power = (vf)_mm512_permutexvar_ps((__m512i)shifted, (__m512)powers);
    vf y = f * 0x1.c6b08ep-5f + 0x1.ebfbe0p-3f;
    y = y * f + 0x1.62e430p-1f;
    y = power * f * y + power;
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)n); /* y 2^floor(n) */
#else /* |f| <= 1/2, and the polynomial of degree 5 with the smallest error that is exact at 0: 9.2e-8 */
    const float round = 0x1.8p23f + 127.0f; /* the sum has n in its low bits, here with the bias of an exponent */
    vf shifted = x * log2e + round;
    vf n = shifted - round;
    vf f = x * log2e - n;
    vf y = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    y = y * f + 0x1.c6b752p-5f;
    y = y * f + 0x1.ebf9bcp-3f;
    y = y * f + 0x1.62e42ap-1f;
    y = y * f + 1.0f;
    vf power = (vf)((vu)shifted << 23);
    return keep(~(x < least), y * power);
#endif
}

/* tanh(x). Cephes' polynomial near 0, where the other formula cancels. */
INLINE vf hyperbolic_tangent(vf x) {
    vi sign = (vi)x & (vi)fill(-0.0f);
    vf size = (vf)((vi)x ^ sign);
    vf e = exponential(-2.0f * size);
    vf far = (1.0f - e) / (1.0f + e);
    vf z = x * x;
    vf y = z * -5.70498872745e-3f + 2.06390887954e-2f;
    y = y * z - 5.37397155531e-2f;
    y = y * z + 1.33314422036e-1f;
    y = y * z - 3.33332819422e-1f;
    vf near = size * z * y + size;
    return (vf)((vi)choose(size < 0.625f, near, far) | sign);
}
