// Products without matrix units, for float32, whose bits those would drop. A lane holds the same numbers as in matrix.cuh.

// s += q k^T, of this warp's rows of `q`.
RA_FUNC void multiply_keys(float (&s)[RA_FRAGMENTS][BK / 8][4], const RA_T* q, const RA_T* k) {
  const int lane = threadIdx.x % 32;
  q += lane / 4 * LDK;
  k += lane % 4 * 2 * LDK;
#pragma unroll 4
  for (int d = 0; d < BD; d += 4) {
    float4 x[ROWS];
    RA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      x[r] = *reinterpret_cast<const float4*>(q + 8 * r * LDK + d);
    }
    RA_UNROLL
    for (int j = 0; j < BK / 8; j++) {
      RA_UNROLL
      for (int c = 0; c < 2; c++) {
        const float4 y = *reinterpret_cast<const float4*>(k + (8 * j + c) * LDK + d);
        RA_UNROLL
        for (int r = 0; r < ROWS; r++) {
          float& sum = s[r / 2][j][r % 2 * 2 + c];
          sum = fmaf(x[r].x, y.x, fmaf(x[r].y, y.y, fmaf(x[r].z, y.z, fmaf(x[r].w, y.w, sum))));
        }
      }
    }
  }
}

// acc += p v, key by key. The keys of a tile are added up before they are added to `acc`: one long chain of float32 sums
// would be less exact.
RA_FUNC void multiply_values(float (&acc)[RA_FRAGMENTS][BV / 8][4], const float (&p)[RA_FRAGMENTS][BK / 8][4],
                             const RA_T* v) {
  constexpr int DIMS = 8; // of a lane at a time
  const int lane = threadIdx.x % 32, first = lane & ~3;
  v += lane % 4 * 2;
  RA_UNROLL
  for (int start = 0; start < BV / 4; start += DIMS) {
    float sums[ROWS][DIMS] = {};
    RA_UNROLL
    for (int j = 0; j < BK / 8; j++) {
#pragma unroll 1
      for (int from = 0; from < 4; from++) {
        RA_UNROLL
        for (int c = 0; c < 2; c++) {
          float weight[ROWS];
          RA_UNROLL
          for (int r = 0; r < ROWS; r++) {
            weight[r] = __shfl_sync(ALL_LANES, p[r / 2][j][r % 2 * 2 + c], first + from);
          }
          RA_UNROLL
          for (int n = 0; n < DIMS && start + n < BV / 4; n++) { // two neighbours of each 8 dims
            const float value = v[(8 * j + 2 * from + c) * LDV + (start + n) / 2 * 8 + n % 2];
            RA_UNROLL
            for (int r = 0; r < ROWS; r++) {
              sums[r][n] = fmaf(weight[r], value, sums[r][n]);
            }
          }
        }
      }
    }
    RA_UNROLL
    for (int n = 0; n < DIMS && start + n < BV / 4; n++) {
      RA_UNROLL
      for (int r = 0; r < ROWS; r++) {
        acc[r / 2][(start + n) / 2][r % 2 * 2 + n % 2] += sums[r][n];
      }
    }
  }
}
