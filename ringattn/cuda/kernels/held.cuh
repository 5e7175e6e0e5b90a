// Parts of backward_hopper.cu: which positions see a token that a block holds, and where its sums go

RA_FUNC int as_position(long long x) {
  return static_cast<int>(min(max(x, static_cast<long long>(LEAST_INT)), static_cast<long long>(MOST_INT)));
}

// The smallest and the largest position of the keys that a query sees, and of the queries that see a key
RA_FUNC int2 keys_seen(long long at, const int* limits) {
  return make_int2(limits[0] == LEAST_INT ? LEAST_INT : as_position(at + limits[0]),
                   limits[1] == MOST_INT ? MOST_INT : as_position(at + limits[1]));
}

RA_FUNC int2 queries_seeing(long long at, const int* limits) {
  return make_int2(limits[1] == MOST_INT ? LEAST_INT : as_position(at - limits[1]),
                   limits[0] == LEAST_INT ? MOST_INT : as_position(at - limits[0]));
}

// Store row `r` of this lane, of DIMS numbers, times `factor`, and with ADDS plus the row `before`.
template <int DIMS, bool ADDS, typename T, int N>
RA_FUNC void store_row(T* to, const float* before, const float (&sums)[N][4], int r, float factor) {
  RA_UNROLL
  for (int i = 0; i < N; i++) {
    const int d = 8 * i + threadIdx.x % 4 * 2;
    float two[2];
    RA_UNROLL
    for (int c = 0; c < 2; c++) {
      const float x = sums[i][2 * r + c];
      two[c] = d + c >= DIMS ? 0.0f : ADDS ? fmaf(factor, x, before[d + c]) : factor * x;
    }
    store_two<DIMS>(to + d, two, DIMS - d);
  }
}
