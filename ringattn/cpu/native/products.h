/* Small matrix products: C [rows][lanes] = sum over k of A(row, k) B[k][lanes].
 *
 * B and C have one or two vectors in a row. Blocks of at most MOST rows of C stay in registers. An element of A is
 * a[row * row_step + k * k_step]: one of the two steps is 1.
 */
#pragma once
#include "vectors.h"

#if LANES == 16 || defined(__aarch64__) /* 32 registers, 24 of them for C */
#define MOST 12
#define ROWS_OF_REGISTERS(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#else /* 16 registers */
#define MOST 6
#define ROWS_OF_REGISTERS(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#endif

#define VECTORS 2
#define WIDE (VECTORS * LANES) /* floats in a row of a panel */

typedef struct {
    const float *data;
    ptrdiff_t row, k;
} Left;

typedef struct {
    const float *data;
    ptrdiff_t k; /* floats from row to row */
} Right;

typedef struct {
    float *data;
    ptrdiff_t row;      /* floats from row to row */
    const vf *factors;  /* C = C * factors + product; NULL: C = product */
} Result;

INLINE void multiply_block(const int rows, const int vectors, Left a, Right b, ptrdiff_t n, Result c) {
    vf sums[MOST][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[i][j] = (vf){0};
    const float *left[(MOST + 2) / 3], *right = b.data;
#pragma GCC unroll 4
    for (int i = 0; i < (rows + 2) / 3; i++) left[i] = a.data + 3 * i * a.row;
#pragma GCC unroll 4
    for (ptrdiff_t k = 0; k < n; k++, right += b.k) {
        vf y[VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) y[j] = load(right + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            vf x = fill(left[i / 3][i % 3 * a.row]);
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j++) sums[i][j] += x * y[j];
        }
#pragma GCC unroll 4
        for (int i = 0; i < (rows + 2) / 3; i++) {
            left[i] += a.k;
            __asm__("" : "+r"(left[i])); /* or the compiler keeps an offset for each row: more than there are registers */
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            float *at = c.data + i * c.row + j * LANES;
            store(at, c.factors ? load(at) * c.factors[j] + sums[i][j] : sums[i][j]);
        }
}

#define CASE(ROWS) \
    case ROWS: multiply_block(ROWS, vectors, a, b, n, c); return;

INLINE void multiply_some(int rows, const int vectors, Left a, Right b, ptrdiff_t n, Result c) {
    switch (rows) { ROWS_OF_REGISTERS(CASE) }
}

/* The four kinds: one or two vectors; A with unit steps along k or along its rows. */
__attribute__((noinline)) static void multiply_k1(int rows, Left a, Right b, ptrdiff_t n, Result c) {
    a.k = 1;
    multiply_some(rows, 1, a, b, n, c);
}
__attribute__((noinline)) static void multiply_k2(int rows, Left a, Right b, ptrdiff_t n, Result c) {
    a.k = 1;
    multiply_some(rows, 2, a, b, n, c);
}
__attribute__((noinline)) static void multiply_row1(int rows, Left a, Right b, ptrdiff_t n, Result c) {
    a.row = 1;
    multiply_some(rows, 1, a, b, n, c);
}
__attribute__((noinline)) static void multiply_row2(int rows, Left a, Right b, ptrdiff_t n, Result c) {
    a.row = 1;
    multiply_some(rows, 2, a, b, n, c);
}

/* Multiply, in blocks of nearly equal numbers of rows. */
static void multiply(ptrdiff_t rows, int vectors, Left a, Right b, ptrdiff_t n, Result c) {
    ptrdiff_t blocks = (rows + MOST - 1) / MOST;
    for (ptrdiff_t i = 0, start = 0; i < blocks; i++) {
        ptrdiff_t stop = rows * (i + 1) / blocks;
        Left some = {a.data + start * a.row, a.row, a.k};
        Result into = {c.data + start * c.row, c.row, c.factors};
        int count = (int)(stop - start);
        if (a.row == 1)
            (vectors == 1 ? multiply_row1 : multiply_row2)(count, some, b, n, into);
        else
            (vectors == 1 ? multiply_k1 : multiply_k2)(count, some, b, n, into);
        start = stop;
    }
}

/* C = A B with float64 sums, which are rounded once. */
static void multiply_exactly(ptrdiff_t rows, int vectors, Left a, Right b, ptrdiff_t n, Result c) {
    for (ptrdiff_t i = 0; i < rows; i++) {
        double sums[WIDE] = {0};
        for (ptrdiff_t k = 0; k < n; k++) {
            const double x = a.data[i * a.row + k * a.k];
            for (int j = 0; j < vectors * LANES; j++) sums[j] += x * b.data[k * b.k + j];
        }
        for (int j = 0; j < vectors * LANES; j++) c.data[i * c.row + j] = (float)sums[j];
    }
}
