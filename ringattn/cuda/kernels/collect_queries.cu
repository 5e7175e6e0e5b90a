// out = factor * (the sum of `parts` over its first axis), plus sums (RA_ADDS), for parts as `backward.cu` leaves dq: four
// numbers of a lane follow each other, then its 32 lanes, the 8 columns and the fragments of a warp, warps, tiles, and heads.

  constexpr int SLOTS = RA_WARPS * RA_FRAGMENTS * 2 * RA_CHUNKS * 32; // of four numbers, in a tile
  const long long slots = parts_shape[1] / 4, slot = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots) {
    return;
  }
  const float4* from = reinterpret_cast<const float4*>(parts) + slot;
  float total[4] = {};
#pragma unroll 4
  for (int i = 0; i < parts_shape[0]; i++) {
    const float4 x = from[i * slots];
    total[0] += x.x;
    total[1] += x.y;
    total[2] += x.z;
    total[3] += x.w;
  }

  const int q_len = length[0], tiles = (q_len + RA_QUERIES - 1) / RA_QUERIES;
  const int at = slot % SLOTS, lane = at % 32, column = at / 32 % (2 * RA_CHUNKS);
  const int fragment = at / (64 * RA_CHUNKS) % RA_FRAGMENTS, warp = at / (64 * RA_CHUNKS * RA_FRAGMENTS);
  const long long tile = slot / SLOTS, head = tile / tiles;
  const int row = tile % tiles * RA_QUERIES + (warp % RA_Q_WARPS * RA_FRAGMENTS + fragment) * 16 + lane / 4;
  const int d = (column / 2 * RA_D_WARPS + warp / RA_Q_WARPS) * 16 + column % 2 * 8 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (row + i / 2 * 8 < q_len && d + i % 2 < RA_D) {
      const long long place = (head * q_len + row + i / 2 * 8) * RA_D + d + i % 2;
#if RA_ADDS
      out[place] = RA_OUT(fmaf(factor[0], total[i], sums[place]));
#else
      out[place] = RA_OUT(factor[0] * total[i]);
#endif
    }
  }
