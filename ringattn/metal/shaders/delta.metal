// delta = dout . out - dlse of each row (see ringattn/core/gradients.py); 0 for a row that sees no key. One simdgroup
// computes one row.

  const long row = thread_position_in_grid.x / 32;
  const ushort lane = thread_index_in_simdgroup;
  float sum = 0;
  for (int d = lane; d < DV; d += 32) {
    sum += float(dout[row * DV + d]) * float(out[row * DV + d]);
  }
  sum = metal::simd_sum(sum);
  if (lane == 0) {
    delta[row] = lse[row] == -INFINITY ? 0.0f : sum - dlse[row];
  }
