// Fused attention of one tile of query rows to a run of key tiles (FlashAttention-2, arXiv 2307.08691).
//
// A threadgroup has WM x WN simdgroups: WM groups of RA_ROWS rows each. Where WN = 2, two simdgroups split the head dims
// and add their scores through threadgroup memory. Tiles of keys are full (no mask is applied) or partial. Empty ones are
// skipped: `key_tiles` holds their limits. With simdgroup matrices, K (transposed) and V use one buffer in turn. The M5's
// matrix units (RA_TENSOR) read them from device memory.
//
// Rows are tokens of one query head. Where G > 1 they are the G query heads of a key/value head, token by token.

  constexpr short BQ = RA_ROWS * WM;
  constexpr short SCORES = RA_ROWS * BK / 32, VALUES = RA_ROWS * BV / (32 * WN); // elements of a lane
#if !RA_TENSOR
  constexpr short THREADS = 32 * WM * WN;
  constexpr short PAD = 16 / sizeof(T);
  constexpr short LDQ = BD + PAD, LDK = BK + PAD, LDV = BV + PAD; // row lengths in threadgroup memory, without bank conflicts
  constexpr short TK = BK / 8, TD = BD / (8 * WN), TV = BV / (8 * WN);
  constexpr bool Q_IN_REGISTERS = WN == 2;

  threadgroup T q_tile[Q_IN_REGISTERS ? 1 : BQ * LDQ];
  threadgroup T kv_tile[BD * LDK > BK * LDV ? BD * LDK : BK * LDV];
  threadgroup int nonfinite[WM * WN]; // whether the values staged by a simdgroup have NaN or infinity
  const short thread_id = thread_index_in_simdgroup + 32 * simdgroup_index_in_threadgroup;
#endif

  const ushort lane = thread_index_in_simdgroup;
  const short simd = simdgroup_index_in_threadgroup;
  const short first_row = simd / WN * RA_ROWS; // this simdgroup's first row in the tile
  const short half_d = simd % WN;
  const Lane at = lane_at(lane);

  const int q_len = queries_shape[2], k_len = keys_shape[2], heads = queries_shape[1];
  const int rows = q_len * G, q_tiles = (rows + BQ - 1) / BQ;
  const int split = threadgroup_position_in_grid.x / q_tiles;
  const int splits = threadgroups_per_grid.x / q_tiles;
  const int tile = q_tiles - 1 - threadgroup_position_in_grid.x % q_tiles; // under a causal mask the longest tiles first
  const int batch = threadgroup_position_in_grid.z;
  const int first_head = threadgroup_position_in_grid.y * G;
  const int kv_head = first_head / (heads / keys_shape[1]);

  // This lane's rows. A row that does not exist reads the last token
  bool exists[RA_LANE_ROWS];
  int token[RA_LANE_ROWS], head[RA_LANE_ROWS];
  long place[RA_LANE_ROWS]; // row index in out, lse and states
  const device T* q[RA_LANE_ROWS];
  RA_UNROLL
  for (short r = 0; r < RA_LANE_ROWS; r++) {
    const int row = tile * BQ + first_row + at.row + 8 * r;
    exists[r] = row < rows;
    token[r] = exists[r] ? row / G : q_len - 1;
    head[r] = first_head + (exists[r] ? row % G : 0);
    place[r] = (long(batch) * heads + head[r]) * q_len + token[r];
    q[r] = queries + batch * queries_strides[0] + head[r] * queries_strides[1] + token[r] * queries_strides[2];
  }
  const device T* k = keys + batch * keys_strides[0] + kv_head * keys_strides[1];
  const device T* v = values + batch * values_strides[0] + kv_head * values_strides[1];
  const float scale = numbers[0];

#if !RA_TENSOR
  // Q: in threadgroup memory, or in registers
  T q_own[Q_IN_REGISTERS ? 2 * TD : 1];
  if (Q_IN_REGISTERS) {
    RA_UNROLL
    for (short i = 0; i < 2 * TD; i++) {
      const short d = (half_d * TD + i / 2) * 8 + at.column + i % 2;
      q_own[i] = exists[0] && d < D ? q[0][d * queries_strides[3]] : T(0);
    }
  } else {
    constexpr short N = BD / 4;
    const short mine = thread_id / 4, column = thread_id % 4 * N;
    const int r = tile * BQ + mine;
    const device T* from = queries + batch * queries_strides[0] + (first_head + r % G) * queries_strides[1] +
        (r / G) * queries_strides[2] + column * queries_strides[3];
    stage_row<T, N, 1>(q_tile + mine * LDQ + column, from, queries_strides[3], r < rows ? D - column : 0);
  }
#endif

  // The state over earlier keys, or the empty state
  float acc[VALUES], m[RA_LANE_ROWS], l[RA_LANE_ROWS]; // until the end, l is the sum over this lane's columns
  RA_UNROLL
  for (short r = 0; r < RA_LANE_ROWS; r++) {
    m[r] = -INFINITY;
    l[r] = 0;
  }
  RA_UNROLL
  for (short i = 0; i < VALUES; i++) {
    acc[i] = 0;
  }
#if RA_STATE_IN
  if (split == 0) {
    RA_UNROLL
    for (short r = 0; r < RA_LANE_ROWS; r++) {
      m[r] = exists[r] ? m_in[place[r]] : -INFINITY;
      l[r] = exists[r] & (at.column == 0) ? l_in[place[r]] : 0;
    }
    RA_UNROLL
    for (short i = 0; i < VALUES; i++) {
      const short d = half_d * (BV / WN) + at.column + column_of(i), r = row_of(i);
      acc[i] = exists[r] & (d < DV) ? acc_in[place[r] * DV + d] : 0;
    }
  }
#endif

  // Tiles are empty before `first` and from `last` on, and full from `full_first` to `full_last`
  const int bound = lane < 4 ? key_tiles[4 * tile + lane] : 0;
  int first = metal::simd_shuffle(bound, ushort(0)), last = metal::simd_shuffle(bound, ushort(3));
  const int full_first = metal::simd_shuffle(bound, ushort(1)), full_last = metal::simd_shuffle(bound, ushort(2));
  const int share_of_split = (last - first + splits - 1) / splits;
  first += split * share_of_split;
  last = metal::min(last, first + share_of_split);

#if RA_BAND
  // This lane's row sees the keys in [low, high]; some row of this simdgroup sees those in [low_any, high_any]
  int low[RA_LANE_ROWS], high[RA_LANE_ROWS], low_any = RA_INT_MAX, high_any = RA_INT_MIN;
  RA_UNROLL
  for (short r = 0; r < RA_LANE_ROWS; r++) {
    const int q_at = query_at[token[r]];
    low[r] = exists[r] ? shifted(q_at, limits[0] == RA_INT_MIN ? -(1l << 33) : limits[0]) : RA_INT_MAX;
    high[r] = exists[r] ? shifted(q_at, limits[1] == RA_INT_MAX ? 1l << 33 : limits[1]) : RA_INT_MIN;
    low_any = metal::min(low_any, low[r]);
    high_any = metal::max(high_any, high[r]);
  }
  low_any = metal::simd_min(low_any);
  high_any = metal::simd_max(high_any);
#endif
#if RA_SEGMENTS
  int q_id[RA_LANE_ROWS];
  RA_UNROLL
  for (short r = 0; r < RA_LANE_ROWS; r++) {
    q_id[r] = exists[r] ? query_ids[long(batch) * q_len + token[r]] : -1;
  }
  const int q_tile_at = 2 * (batch * query_bounds_shape[1] + tile);
  const int2 q_bounds = int2(query_bounds[q_tile_at], query_bounds[q_tile_at + 1]);
  const device int* k_bounds = key_bounds + 2 * long(batch) * key_bounds_shape[1];
#endif
#if RA_MASK
  long mask_row[RA_LANE_ROWS];
  RA_UNROLL
  for (short r = 0; r < RA_LANE_ROWS; r++) {
    mask_row[r] = batch * mask_strides[0] + head[r] * mask_strides[1] + token[r] * mask_strides[2];
  }
#endif

  for (int kb = first; kb < last; kb++) {
#if RA_SEGMENTS
    kb = next_shared(kb, last, q_bounds, k_bounds, lane);
    if (kb == last) {
      break;
    }
    const bool same = all_same(q_bounds, int2(k_bounds[2 * kb], k_bounds[2 * kb + 1]));
#else
    constexpr bool same = true;
#endif
    const bool full = !RA_MASK && same && kb >= full_first && kb < full_last;
    const int key = kb * BK;
    const short here = metal::min(k_len - key, int(BK)); // keys in this tile

#if !RA_TENSOR
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    stage<T, BK, BD, D, THREADS, 1, LDK>(
        kv_tile, k + key * keys_strides[2], keys_strides[2], keys_strides[3], here, thread_id);
#endif

    // A partial tile: each lane holds the properties of key `lane`. Some row may see the matrices of 8 keys in
    // [live_first, live_last)
    short live_first = 0, live_last = BK / 8;
#if RA_BAND
    int key_position = 0;
#endif
#if RA_SEGMENTS
    int key_id = -1;
#endif
#if RA_COLUMNS
    int key_column = 0;
#endif
    if (!full) {
      const bool mine = lane < here;
#if RA_BAND
      key_position = mine ? key_at[key + lane] : 0;
      live_first = metal::simd_sum(int(mine && key_position < low_any)) / 8;
      live_last = (metal::simd_sum(int(mine && key_position <= high_any)) + 7) / 8;
#else
      live_last = (here + 7) / 8;
#endif
#if RA_SEGMENTS
      key_id = mine ? key_ids[long(batch) * k_len + key + lane] : -1;
#endif
#if RA_COLUMNS
      key_column = mine ? mask_columns[key + lane] : 0;
#endif
    }

    // S = Q K^T
    float s[SCORES];
    RA_UNROLL
    for (short e = 0; e < SCORES; e++) {
      s[e] = 0;
    }
#if RA_TENSOR
    const device T* k_from = k + key * keys_strides[2];
    const long q_stride = queries_strides[3], k_row = keys_strides[2], k_stride = keys_strides[3];
    if (full) {
      multiply_keys<T, D, true>(s, q[0], q[1], exists[0], exists[1], q_stride, k_from, k_row, k_stride, here, at);
    } else {
      multiply_keys<T, D, false>(s, q[0], q[1], exists[0], exists[1], q_stride, k_from, k_row, k_stride, here, at);
    }
#else
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const threadgroup T* q_from = q_tile + (Q_IN_REGISTERS ? 0 : (first_row + at.row) * LDQ + at.column);
    const threadgroup T* k_from = kv_tile + (half_d * TD * 8 + at.row) * LDK + at.column;
    if (full) {
      multiply_keys<T, TD, TK, LDK, Q_IN_REGISTERS, true>(s, q_own, q_from, k_from, 0, TK);
    } else {
      multiply_keys<T, TD, TK, LDK, Q_IN_REGISTERS, false>(s, q_own, q_from, k_from, live_first, live_last);
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);

    if (WN == 2) { // add the scores of the two halves of the head dims
      threadgroup float* halves = reinterpret_cast<threadgroup float*>(kv_tile) + lane;
      RA_UNROLL
      for (short e = 0; e < SCORES; e++) {
        halves[(simd * SCORES + e) * 32] = s[e];
      }
      threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      RA_UNROLL
      for (short e = 0; e < SCORES; e++) {
        s[e] += halves[((simd ^ 1) * SCORES + e) * 32];
      }
      threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    }

    // Stage V while the softmax is computed
    const bool staged_nonfinite = stage<T, BK, BV, DV, THREADS, LDV, 1>(
        kv_tile, v + key * values_strides[2], values_strides[2], values_strides[3], here, thread_id);
    if (!full) {
      const bool any_staged = metal::simd_max(int(staged_nonfinite)) > 0;
      if (lane == 0) {
        nonfinite[simd] = any_staged;
      }
    }
#endif

    // Scores, and in a partial tile the masks
    RA_UNROLL
    for (short e = 0; e < SCORES; e++) {
      s[e] *= scale;
      if (SOFTCAP) {
        s[e] = numbers[1] * metal::precise::tanh(s[e] / numbers[1]);
      }
    }
    ushort seen = 0;
    if (!full) {
      RA_UNROLL
      for (short e = 0; e < SCORES; e++) {
        const ushort column = at.column + column_of(e);
        const short r = row_of(e);
        bool sees = exists[r] & (column < here);
#if RA_BAND
        const int position = metal::simd_shuffle(key_position, column);
        sees = sees & (position >= low[r]) & (position <= high[r]);
#endif
#if RA_SEGMENTS
        const int id = metal::simd_shuffle(key_id, column);
        sees = sees & (id == q_id[r]) & (id >= 0);
#endif
#if RA_COLUMNS
        const long mask_at = mask_row[r] + metal::simd_shuffle(key_column, column) * mask_strides[3];
#elif RA_MASK
        const long mask_at = mask_row[r] + (key + column) * mask_strides[3];
#endif
        float x = s[e];
#if RA_MASK == 1
        sees = sees && mask[mask_at];
#elif RA_MASK == 2
        const float added = sees ? float(mask[mask_at]) : 0;
        sees = sees && added != -INFINITY;
        x += added;
#endif
        s[e] = sees ? x : -INFINITY;
        seen |= ushort(sees) << e;
      }
    }

    // Online softmax: P, and the update of the state
    float top[RA_LANE_ROWS], decay[RA_LANE_ROWS];
    RA_UNROLL
    for (short r = 0; r < RA_LANE_ROWS; r++) {
      top[r] = m[r];
    }
    RA_UNROLL
    for (short e = 0; e < SCORES; e++) {
      top[row_of(e)] = metal::max(top[row_of(e)], s[e]);
    }
    RA_UNROLL
    for (short r = 0; r < RA_LANE_ROWS; r++) {
      top[r] = row_max(top[r]);
      decay[r] = weight(m[r], top[r]);
      m[r] = top[r];
      l[r] *= decay[r];
    }
    RA_UNROLL
    for (short e = 0; e < SCORES; e++) {
      s[e] = weight(s[e], top[row_of(e)]);
      l[row_of(e)] += s[e];
    }
    RA_UNROLL
    for (short i = 0; i < VALUES; i++) {
      acc[i] *= decay[row_of(i)];
    }

    // O += P V
#if RA_TENSOR
    const device T* v_from = v + key * values_strides[2];
    if (full) {
      multiply_values<T, DV, BV, true>(acc, s, v_from, values_strides[2], values_strides[3], here, seen, at);
    } else {
      multiply_values<T, DV, BV, false>(acc, s, v_from, values_strides[2], values_strides[3], here, seen, at);
    }
#else
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const threadgroup T* v_from = kv_tile + at.row * LDV + half_d * TV * 8 + at.column;
    int any_nonfinite = 0;
    if (!full) {
      RA_UNROLL
      for (short i = 0; i < WM * WN; i++) {
        any_nonfinite |= nonfinite[i];
      }
    }
    if (full) {
      multiply_values<T, TV, TK, LDV, true>(acc, s, v_from, 0, TK);
    } else if (!any_nonfinite) {
      multiply_values<T, TV, TK, LDV, false>(acc, s, v_from, live_first, live_last);
    } else {
      multiply_nonfinite_values<T, TV, TK, LDV>(acc, s, v_from, seen);
    }
#endif
  }

  // Write the results of the rows that exist
  RA_UNROLL
  for (short r = 0; r < RA_LANE_ROWS; r++) {
    l[r] = row_sum(l[r]);
    long target = place[r];
    float decay = 1;
#if RA_STATE_OUT
    target += split * (long(heads) * q_len * threadgroups_per_grid.z);
#elif RA_SINKS
    const float sink = sinks[head[r]], top = metal::max(m[r], sink);
    decay = weight(m[r], top);
    l[r] = l[r] * decay + weight(sink, top);
    m[r] = top;
#endif
    if (!exists[r]) {
      continue;
    }
    RA_UNROLL
    for (short i = 0; i < VALUES; i++) {
      const short d = half_d * (BV / WN) + at.column + column_of(i);
      if (row_of(i) == r && d < DV) {
#if RA_STATE_OUT
        acc_out[target * DV + d] = acc[i];
#else
        out[target * DV + d] = Out(l[r] == 0 ? 0.0f : acc[i] * decay / l[r]);
#endif
      }
    }
    if (half_d == 0 && at.column == 0) {
#if RA_STATE_OUT
      m_out[target] = m[r];
      l_out[target] = l[r];
#elif RA_LSE
      lse[target] = l[r] == 0 ? -INFINITY : m[r] + metal::precise::log(l[r]);
#endif
    }
  }
