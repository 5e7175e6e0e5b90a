// What the gradient needs of each row: delta = dout . out - dlse, and lse, inf for rows that see no key. A warp has a row.

  const long long row = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= static_cast<long long>(lse_shape[0]) * lse_shape[1] * lse_shape[2]) {
    return;
  }
  float sum = 0;
  for (int d = lane; d < RA_DV; d += 32) {
    sum += float(out[row * RA_DV + d]) * float(dout[row * RA_DV + d]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  }
  if (lane == 0) {
    const float infinity = __int_as_float(0x7f800000);
    const bool empty = lse[row] == -infinity;
    delta[row] = empty ? 0.0f : sum - dlse[row];
    finite_lse[row] = empty ? infinity : lse[row];
  }
