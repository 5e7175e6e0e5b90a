// The tile of a block, its arguments, and the keys that it sees. BQ and BK are its rows and keys.

  const int q_len = queries_shape[2], k_len = keys_shape[2], heads = queries_shape[1];
  const int q_tiles = (q_len * RA_G + BQ - 1) / BQ;
  // Blocks begin in the order of their numbers: tiles from the last to the first, because the last have the most keys
  // under a causal mask, of as many heads at once as have their keys and values in the L2 cache.
  constexpr int CACHE = 1 << 24; // bytes of it
#if RA_TAIL
  // Tiles from number `whole` on, too few to fill the GPU, are cut in `runs` of their keys, with a block for each.
  const int whole = tail[0], runs = tail[1], past_whole = max(0, static_cast<int>(blockIdx.x) - whole);
  const int block = min(static_cast<int>(blockIdx.x), whole) + past_whole / runs, blocks = q_tiles;
#else
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), blocks = gridDim.x; // of a head
#endif
  const int head_groups = heads / RA_G, all_heads = head_groups * queries_shape[0];
  const int cached = max(CACHE / (RA_D + RA_DV) / static_cast<int>(sizeof(RA_T)) / k_len, 1); // key/value heads
  const int together = min(cached * (heads / keys_shape[1] / RA_G), all_heads), past = block / (together * blocks);
  const int in_set = block - past * together * blocks, set = min(together, all_heads - past * together);
  const int block_x = in_set / set, block_head = past * together + in_set % set;
  const int batch = block_head / head_groups, first_head = block_head % head_groups * RA_G;
#if RA_TAIL
  const int split = past_whole % runs, splits = block < whole ? 1 : runs;
#else
  const int split = block_x / q_tiles, splits = gridDim.x / q_tiles;
#endif
  const int tile = q_tiles - 1 - block_x % q_tiles; // under a causal mask the longest first
  const int kv_head = first_head / (heads / keys_shape[1]);
  const Rows rows{batch, heads, first_head, q_len};
  const RA_T* k = keys + batch * keys_strides[0] + kv_head * keys_strides[1];
  const RA_T* v = values + batch * values_strides[0] + kv_head * values_strides[1];
  const bool k_parts = in_parts(keys, keys_shape, keys_strides, RA_D);
  const bool v_parts = in_parts(values, keys_shape, values_strides, RA_DV); // one shape but for the dims

  Rules rules{};
  rules.scale = numbers[0];
  rules.softcap = numbers[1];
#if RA_BAND
  rules.query_at = query_at;
  rules.key_at = key_at;
  rules.limits = limits;
#endif
#if RA_SEGMENTS
  rules.query_ids = query_ids + static_cast<long long>(batch) * q_len;
  rules.key_ids = key_ids + static_cast<long long>(batch) * k_len;
#endif
#if RA_MASK
  rules.mask = mask + batch * mask_strides[0];
  rules.mask_head = mask_strides[1];
  rules.mask_row = mask_strides[2];
  rules.mask_key = mask_strides[3];
#endif
#if RA_COLUMNS
  rules.mask_columns = mask_columns;
#endif

  Results results{};
#if RA_STATE_OUT
  const long long of_split = RA_TAIL ? 0 : split * (static_cast<long long>(heads) * q_len * queries_shape[0]); // rows
  results.acc = acc_out + of_split * RA_DV;
  results.m = m_out + of_split;
  results.l = l_out + of_split;
#else
  results.out = out;
#if RA_LSE
  results.lse = lse;
#endif
#if RA_SINKS
  results.sinks = sinks;
#endif
#endif

  // Which tiles: empty before `first` and from `last` on, full from `full_first` to `full_last`
  int first = uniform(reach[4 * tile]), last = uniform(reach[4 * tile + 3]);
  const int full_first = uniform(reach[4 * tile + 1]), full_last = uniform(reach[4 * tile + 2]);
  const int share_of_split = (last - first + splits - 1) / splits;
  first += split * share_of_split;
  last = min(last, first + share_of_split);
#if RA_SEGMENTS
  const int2 q_bounds = bounds_of(query_bounds + 2 * batch * query_bounds_shape[1], tile);
  const int* k_bounds = key_bounds + 2 * batch * key_bounds_shape[1];
  first = next_shared(first, last, q_bounds, k_bounds);
#endif
