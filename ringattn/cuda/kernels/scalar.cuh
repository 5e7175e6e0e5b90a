// Products without matrix units, for float32, whose bits those would drop. A lane holds the same numbers as in matrix.cuh.

// s += a b^T over WIDTH columns: `a` has 16 * F rows, those of this warp, and `b` 8 * N.
template <int WIDTH, int LDA, int LDB, int F, int N>
RA_FUNC void multiply_rows(float (&s)[F][N][4], const RA_T* a, const RA_T* b) {
  constexpr int ROWS = 2 * F;
  const int lane = threadIdx.x % 32;
  a += lane / 4 * LDA;
  b += lane % 4 * 2 * LDB;
#pragma unroll 4
  for (int d = 0; d < WIDTH; d += 4) {
    float4 x[ROWS];
    RA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      x[r] = *reinterpret_cast<const float4*>(a + 8 * r * LDA + d);
    }
    RA_UNROLL
    for (int j = 0; j < N; j++) {
      RA_UNROLL
      for (int c = 0; c < 2; c++) {
        const float4 y = *reinterpret_cast<const float4*>(b + (8 * j + c) * LDB + d);
        RA_UNROLL
        for (int r = 0; r < ROWS; r++) {
          float& sum = s[r / 2][j][r % 2 * 2 + c];
          sum = fmaf(x[r].x, y.x, fmaf(x[r].y, y.y, fmaf(x[r].z, y.z, fmaf(x[r].w, y.w, sum))));
        }
      }
    }
  }
}

// acc += p b: `p` has 8 * N columns, in the registers of this warp; `b` has 8 * N rows and 8 * W columns. The rows of `b`
// are added up before they are added to `acc`: one long chain of float32 sums would be less exact.
template <int LDB, int F, int N, int W>
RA_FUNC void multiply_weights(float (&acc)[F][W][4], const float (&p)[F][N][4], const RA_T* b) {
  constexpr int DIMS = 8, ROWS = 2 * F; // of a lane at a time
  const int lane = threadIdx.x % 32, first = lane & ~3;
  b += lane % 4 * 2;
  RA_UNROLL
  for (int start = 0; start < 2 * W; start += DIMS) {
    float sums[ROWS][DIMS] = {};
    RA_UNROLL
    for (int j = 0; j < N; j++) {
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
          for (int n = 0; n < DIMS && start + n < 2 * W; n++) { // two neighbours of each 8 dims
            const float value = b[(8 * j + 2 * from + c) * LDB + (start + n) / 2 * 8 + n % 2];
            RA_UNROLL
            for (int r = 0; r < ROWS; r++) {
              sums[r][n] = fmaf(weight[r], value, sums[r][n]);
            }
          }
        }
      }
    }
    RA_UNROLL
    for (int n = 0; n < DIMS && start + n < 2 * W; n++) {
      RA_UNROLL
      for (int r = 0; r < ROWS; r++) {
        acc[r / 2][(start + n) / 2][r % 2 * 2 + n % 2] += sums[r][n];
      }
    }
  }
}

// acc += a^T b over COUNT rows, which are added up first: `a` has 16 * F columns, those of this warp. `b` has 16 columns
// for each of `acc`'s pairs, STEP apart, of which those from `width` on do not exist.
template <int COUNT, int LDA, int LDB, int STEP, int F, int W>
RA_FUNC void multiply_columns(float (&acc)[F][W][4], const RA_T* a, const RA_T* b, int width) {
  const int lane = threadIdx.x % 32;
  a += lane / 4;
  b += lane % 4 * 2;
  RA_UNROLL
  for (int j = 0; j < W; j++) {
    if (j / 2 * STEP < width) {
      float sums[2 * F][2] = {};
#pragma unroll 4
      for (int row = 0; row < COUNT; row++) {
        const float2 y = *reinterpret_cast<const float2*>(b + row * LDB + j / 2 * STEP + j % 2 * 8);
        RA_UNROLL
        for (int r = 0; r < 2 * F; r++) {
          const float x = a[row * LDA + 8 * r];
          sums[r][0] = fmaf(x, y.x, sums[r][0]);
          sums[r][1] = fmaf(x, y.y, sums[r][1]);
        }
      }
      RA_UNROLL
      for (int r = 0; r < 2 * F; r++) {
        acc[r / 2][j][r % 2 * 2] += sums[r][0];
        acc[r / 2][j][r % 2 * 2 + 1] += sums[r][1];
      }
    }
  }
}

// Two neighbours of a row, as `multiply_columns` and `multiply_weights` take them.
RA_FUNC void store_pair(RA_T* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}

RA_FUNC float2 load_pair(const RA_T* from) {
  return *reinterpret_cast<const float2*>(from);
}

// exp(score * factor - top), 0 where the score is -inf
RA_FUNC float tile_weight(float score, float top, float factor) {
  return weight(score, top, factor);
}
