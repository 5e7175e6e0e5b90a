/* MLX's float32 matrix product on Linux, by the BLAS that NumPy carries.

   MLX's CPU wheel for Linux resolves cblas_sgemm to a reference BLAS, some twenty times slower. This library, loaded
   into the global scope before MLX first multiplies, stands in front of that one. Beside it: NumPy's wheel exports the
   same function under another name, with 64-bit sizes. */

#include <stdint.h>

typedef void (*Sgemm)(int order, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                      int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

static Sgemm sgemm;
static int64_t calls;

void ringattn_set_sgemm(void *function) { sgemm = (Sgemm)function; }

int64_t ringattn_sgemm_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
