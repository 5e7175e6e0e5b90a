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

// s += q k^T, of this warp's rows of `q`.
RA_FUNC void multiply_keys(float (&s)[RA_FRAGMENTS][BK / 8][4], const RA_T* q, const RA_T* k) {
  const int lane = threadIdx.x % 32;
  q += lane % 16 * LDK + lane / 16 * 8;
  k += (lane / 16 * 8 + lane % 8) * LDK + lane / 8 % 2 * 8;
  RA_UNROLL
  for (int d = 0; d < BD; d += 16) {
    unsigned a[RA_FRAGMENTS][4];
    RA_UNROLL
    for (int f = 0; f < RA_FRAGMENTS; f++) {
      load_matrices(a[f], q + 16 * f * LDK + d);
    }
    RA_UNROLL
    for (int j = 0; j < BK / 16; j++) {
      unsigned b[4];
      load_matrices(b, k + 16 * j * LDK + d);
      RA_UNROLL
      for (int f = 0; f < RA_FRAGMENTS; f++) {
        multiply(s[f][2 * j], a[f], b[0], b[1]);
        multiply(s[f][2 * j + 1], a[f], b[2], b[3]);
      }
    }
  }
}

// acc += p v, p rounded to the dtype of v.
RA_FUNC void multiply_values(float (&acc)[RA_FRAGMENTS][BV / 8][4], const float (&p)[RA_FRAGMENTS][BK / 8][4],
                             const RA_T* v) {
  const int lane = threadIdx.x % 32;
  v += lane % 16 * LDV + lane / 16 * 8;
  RA_UNROLL
  for (int key = 0; key < BK; key += 16) {
    unsigned a[RA_FRAGMENTS][4];
    RA_UNROLL
    for (int f = 0; f < RA_FRAGMENTS; f++) {
      RA_UNROLL
      for (int i = 0; i < 4; i++) {
        const float(&from)[4] = p[f][key / 8 + i / 2];
        a[f][i] = packed(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
    RA_UNROLL
    for (int j = 0; j < BV / 16; j++) {
      unsigned b[4];
      load_transposed(b, v + key * LDV + 16 * j);
      RA_UNROLL
      for (int f = 0; f < RA_FRAGMENTS; f++) {
        multiply(acc[f][2 * j], a[f], b[0], b[1]);
        multiply(acc[f][2 * j + 1], a[f], b[2], b[3]);
      }
    }
  }
}
