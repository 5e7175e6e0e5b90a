/* The compiled functions of softmax.py, which documents them and has them in NumPy too.
 *
 * Compilers turn these plain loops into vector code. On x86 Linux there are three versions, chosen at load time.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 17 : __GNUC__ >= 12)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif

/* exp(x) for x <= 0: 2^n e^r with |r| <= ln2 / 2, and Cephes' polynomial for e^r; 0 where it would be subnormal. */
static inline float exp_negative(float x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it puts the nearest integer into the low bits */
    float bounded = x < -87.0f ? -87.0f : x;
    float shifted = bounded * 1.44269504088896341f + round;
    float n = shifted - round;
    float r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : y * power;
}

VERSIONS
void ringattn_softmax_step(float *restrict p, int64_t rows, int64_t keys, float *restrict m, float *restrict l,
                           float *restrict decay) {
    for (int64_t i = 0; i < rows; i++) {
        float *restrict row = p + i * keys;
        float top = m[i], sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < keys; j++) top = row[j] > top ? row[j] : top;
        const float base = top == -INFINITY ? 0.0f : top; /* a row without a visible key so far */
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < keys; j++) {
            row[j] = exp_negative(row[j] - base);
            sum += row[j];
        }
        decay[i] = exp_negative(m[i] - base);
        l[i] = l[i] * decay[i] + sum;
        m[i] = top;
    }
}

VERSIONS
void ringattn_weights(float *restrict p, int64_t rows, int64_t keys, const float *restrict lse) {
    for (int64_t i = 0; i < rows; i++) {
        float *restrict row = p + i * keys;
        const float base = lse[i];
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) row[j] = exp_negative(row[j] - base);
    }
}

VERSIONS
void ringattn_by_scores(float *restrict g, const float *restrict p, int64_t rows, int64_t keys,
                        const float *restrict delta) {
    for (int64_t i = 0; i < rows; i++) {
        float *restrict row = g + i * keys;
        const float *restrict weight = p + i * keys;
        const float base = delta[i];
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) row[j] = weight[j] * (row[j] - base);
    }
}
