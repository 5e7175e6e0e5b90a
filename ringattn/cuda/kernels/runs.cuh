// Runs of a tile's keys in blocks of their own. Each leaves its sums in device memory. The warpgroup that comes last adds
// up those of all runs, in their order: the bits do not depend on which one it is.

// Leave the sums of a run. Return whether all runs have been here: then `acc`, `m` and `l` become the sums of all.
// `parts` has place for the sums of all runs of these 64 rows, and `arrived` counts them.
template <int W>
RA_FUNC bool join_runs(float (&acc)[1][W][4], float (&m)[2], float (&l)[2], float* parts, int* arrived, int run, int runs,
                       int barrier) {
  constexpr int SIZE = (W + 1) * WARPGROUP; // float4 of a run
  const int thread = threadIdx.x % WARPGROUP;
  float4* part = reinterpret_cast<float4*>(parts) + thread;
  float4* own = part + run * SIZE;
  RA_UNROLL
  for (int i = 0; i < W; i++) {
    own[i * WARPGROUP] = make_float4(acc[0][i][0], acc[0][i][1], acc[0][i][2], acc[0][i][3]);
  }
  own[W * WARPGROUP] = make_float4(m[0], m[1], l[0], l[1]);
  meet(barrier, WARPGROUP);
  bool last = false;
  if (thread == 0) { // its fences order what this warpgroup has written before the count, and what it reads after it
    __threadfence();
    last = atomicAdd(arrived, 1) == runs - 1;
    __threadfence();
  }
  if (!meet_or(barrier, WARPGROUP, last)) {
    return false;
  }
  clear_state(acc, m, l);
#pragma unroll 1
  for (int i = 0; i < runs; i++, part += SIZE) {
    const float4 ends = __ldcg(part + W * WARPGROUP);
    const Weights above = join_maximum(m[0], ends.x), below = join_maximum(m[1], ends.y);
    l[0] = l[0] * above.own + ends.z * above.other;
    l[1] = l[1] * below.own + ends.w * below.other;
    RA_UNROLL
    for (int j = 0; j < W; j++) {
      const float4 sums = __ldcg(part + j * WARPGROUP);
      acc[0][j][0] = acc[0][j][0] * above.own + sums.x * above.other;
      acc[0][j][1] = acc[0][j][1] * above.own + sums.y * above.other;
      acc[0][j][2] = acc[0][j][2] * below.own + sums.z * below.other;
      acc[0][j][3] = acc[0][j][3] * below.own + sums.w * below.other;
    }
  }
  return true;
}
