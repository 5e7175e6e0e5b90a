// out = factor * (the sum of `parts` over its second axis), plus sums (RA_ADDS): parts [outer, count, inner], sums
// [outer, inner]. A thread has RA_WIDTH neighbours.

  const long long inner = parts_shape[2], place = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * RA_WIDTH;
  const long long outer = place / inner, column = place % inner;
  if (outer >= parts_shape[0]) {
    return;
  }
  const float* from = parts + outer * parts_shape[1] * inner + column;
  float total[RA_WIDTH] = {};
#pragma unroll 4
  for (int i = 0; i < parts_shape[1]; i++) {
#if RA_WIDTH == 4
    const float4 x = *reinterpret_cast<const float4*>(from + i * inner);
    total[0] += x.x;
    total[1] += x.y;
    total[2] += x.z;
    total[3] += x.w;
#else
    total[0] += from[i * inner];
#endif
  }
  struct alignas(RA_WIDTH * sizeof(RA_OUT)) Neighbours {
    RA_OUT x[RA_WIDTH];
  } result;
#pragma unroll
  for (int i = 0; i < RA_WIDTH; i++) {
#if RA_ADDS
    result.x[i] = RA_OUT(fmaf(factor[0], total[i], sums[place + i]));
#else
    result.x[i] = RA_OUT(factor[0] * total[i]);
#endif
  }
  *reinterpret_cast<Neighbours*>(out + place) = result;
