// The two products by the matrix units: fragments of 16 rows x 8 columns, of which a lane holds two neighbours in row
// lane / 4 and two in row lane / 4 + 8 (PTX ISA, mma.m16n8k16).

#if RA_BFLOAT
#define RA_TYPES "bf16.bf16"
#else
#define RA_TYPES "f16.f16"
#endif

RA_FUNC void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." RA_TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
RA_FUNC void load_matrices(unsigned (&x)[4], const RA_T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

RA_FUNC void load_transposed(unsigned (&x)[4], const RA_T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

RA_FUNC unsigned packed(float low, float high) {
#if RA_BFLOAT
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
#else
  const __half2 pair = __floats2half2_rn(low, high);
#endif
  return reinterpret_cast<const unsigned&>(pair);
}

// s += a b^T over WIDTH columns: `a` has 16 * F rows, those of this warp, and `b` 8 * N.
template <int WIDTH, int LDA, int LDB, int F, int N>
RA_FUNC void multiply_rows(float (&s)[F][N][4], const RA_T* a, const RA_T* b) {
  const int lane = threadIdx.x % 32;
  a += lane % 16 * LDA + lane / 16 * 8;
  b += (lane / 16 * 8 + lane % 8) * LDB + lane / 8 % 2 * 8;
  RA_UNROLL
  for (int d = 0; d < WIDTH; d += 16) {
    unsigned x[F][4];
    RA_UNROLL
    for (int f = 0; f < F; f++) {
      load_matrices(x[f], a + 16 * f * LDA + d);
    }
    RA_UNROLL
    for (int j = 0; j < N / 2; j++) {
      unsigned y[4];
      load_matrices(y, b + 16 * j * LDB + d);
      RA_UNROLL
      for (int f = 0; f < F; f++) {
        multiply(s[f][2 * j], x[f], y[0], y[1]);
        multiply(s[f][2 * j + 1], x[f], y[2], y[3]);
      }
    }
  }
}

// acc += p b: `p` has 8 * N columns, in the registers of this warp and rounded to the dtype of `b`; `b` has 8 * N rows
// and 8 * W columns.
template <int LDB, int F, int N, int W>
RA_FUNC void multiply_weights(float (&acc)[F][W][4], const float (&p)[F][N][4], const RA_T* b) {
  const int lane = threadIdx.x % 32;
  b += lane % 16 * LDB + lane / 16 * 8;
  RA_UNROLL
  for (int row = 0; row < 8 * N; row += 16) {
    unsigned x[F][4];
    RA_UNROLL
    for (int f = 0; f < F; f++) {
      RA_UNROLL
      for (int i = 0; i < 4; i++) {
        const float(&from)[4] = p[f][row / 8 + i / 2];
        x[f][i] = packed(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
    RA_UNROLL
    for (int j = 0; j < W / 2; j++) {
      unsigned y[4];
      load_transposed(y, b + row * LDB + 16 * j);
      RA_UNROLL
      for (int f = 0; f < F; f++) {
        multiply(acc[f][2 * j], x[f], y[0], y[1]);
        multiply(acc[f][2 * j + 1], x[f], y[2], y[3]);
      }
    }
  }
}

// acc += a^T b over COUNT rows: `a` has 16 * F columns, those of this warp. `b` has 16 columns for each of `acc`'s
// pairs, STEP apart, of which those from `width` on do not exist.
template <int COUNT, int LDA, int LDB, int STEP, int F, int W>
RA_FUNC void multiply_columns(float (&acc)[F][W][4], const RA_T* a, const RA_T* b, int width) {
  const int lane = threadIdx.x % 32;
  a += (lane % 8 + lane / 16 * 8) * LDA + lane / 8 % 2 * 8;
  b += lane % 16 * LDB + lane / 16 * 8;
  RA_UNROLL
  for (int row = 0; row < COUNT; row += 16) {
    unsigned x[F][4];
    RA_UNROLL
    for (int f = 0; f < F; f++) {
      load_transposed(x[f], a + row * LDA + 16 * f);
    }
    RA_UNROLL
    for (int j = 0; j < W / 2; j++) {
      if (j * STEP < width) {
        unsigned y[4];
        load_transposed(y, b + row * LDB + j * STEP);
        RA_UNROLL
        for (int f = 0; f < F; f++) {
          multiply(acc[f][2 * j], x[f], y[0], y[1]);
          multiply(acc[f][2 * j + 1], x[f], y[2], y[3]);
        }
      }
    }
  }
}

// Two neighbours of a row, as `multiply_columns` and `multiply_weights` take them.
RA_FUNC void store_pair(RA_T* to, float low, float high) {
  *reinterpret_cast<unsigned*>(to) = packed(low, high);
}

RA_FUNC float2 load_pair(const RA_T* from) {
#if RA_BFLOAT
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
#else
  return __half22float2(*reinterpret_cast<const __half2*>(from));
#endif
}

// exp(score * factor - top), 0 where the score is -inf. log2(e) is folded into both: the rounding of that is far below
// the rounding of the result to the dtype of the values.
RA_FUNC float tile_weight(float score, float top, float factor) {
  return power_of_2(fmaf(score, factor * RA_LOG2E, top == -RA_INFINITY ? 0.0f : -RA_LOG2E * top));
}
