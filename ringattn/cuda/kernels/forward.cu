// Attention of a tile of BQ query rows to their keys, BK at a time: FlashAttention-2 (Dao, arXiv 2307.08691). A warp has
// 16 * RA_FRAGMENTS rows. The rows of a tile are tokens x RA_G heads. With two stages the next K and V are loaded while
// these are used. With one, K is loaded while the softmax and P V are computed, V while Q K^T is. What a row may not see
// is decided in partial tiles alone.

  constexpr int BQ = RA_WARPS * RA_FRAGMENTS * 16, BK = RA_BK; // rows, keys
  constexpr int ROWS = 2 * RA_FRAGMENTS;                       // that a lane has a share of
  extern __shared__ __align__(16) unsigned char memory[];
  RA_T* q_tile = reinterpret_cast<RA_T*>(memory);
  RA_T* k_tiles = q_tile + BQ * LDK;
  RA_T* v_tiles = k_tiles + RA_STAGES * BK * LDK;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int q_len = queries_shape[2], k_len = keys_shape[2], heads = queries_shape[1];
  const int rows = q_len * RA_G, q_tiles = (rows + BQ - 1) / BQ;
  const int split = blockIdx.x / q_tiles, splits = gridDim.x / q_tiles;
  const int tile = q_tiles - 1 - blockIdx.x % q_tiles; // under a causal mask the longest first
  const int batch = blockIdx.z, first_head = blockIdx.y * RA_G, kv_head = first_head / (heads / keys_shape[1]);
  const RA_T* k = keys + batch * keys_strides[0] + kv_head * keys_strides[1];
  const RA_T* v = values + batch * values_strides[0] + kv_head * values_strides[1];
  const bool k_parts = in_parts(keys, keys_shape, keys_strides, RA_D);
  const bool v_parts = in_parts(values, keys_shape, values_strides, RA_DV); // one shape but for the dims
  const float scale = numbers[0];
  const int first_row = tile * BQ + 16 * RA_FRAGMENTS * warp + lane / 4; // of this lane; the others are 8 apart

  { // Q
    const bool parts = in_parts(queries, queries_shape, queries_strides, RA_D);
    constexpr int WIDTH = BD / PART;
    for (int i = threadIdx.x; i < BQ * WIDTH; i += THREADS) {
      const int r = tile * BQ + i / WIDTH, d = i % WIDTH * PART;
      const RA_T* from = queries + batch * queries_strides[0] + (first_head + r % RA_G) * queries_strides[1] +
          r / RA_G * queries_strides[2];
      RA_T* to = q_tile + i / WIDTH * LDK + d;
      if (parts) {
        const bool there = r < rows && d < RA_D;
        copy_async(to, there ? from + d : queries, there);
      } else {
        for (int e = 0; e < PART; e++) {
          to[e] = r < rows && d + e < RA_D ? from[(d + e) * queries_strides[3]] : RA_T(0.0f);
        }
      }
    }
  }

  // The state: what earlier keys left, or nothing
  float acc[RA_FRAGMENTS][BV / 8][4], m[ROWS], l[ROWS]; // l: of this lane's columns alone, until the end
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    m[r] = -RA_INFINITY;
    l[r] = 0;
    RA_UNROLL
    for (int i = 0; i < BV / 4; i++) {
      acc[r / 2][i / 2][r % 2 * 2 + i % 2] = 0;
    }
#if RA_STATE_IN
    const int row = first_row + 8 * r;
    if (split == 0 && row < rows) {
      const long long place = (static_cast<long long>(batch) * heads + first_head + row % RA_G) * q_len + row / RA_G;
      m[r] = m_in[place];
      l[r] = lane % 4 == 0 ? l_in[place] : 0.0f;
      RA_UNROLL
      for (int i = 0; i < BV / 4; i++) {
        const int d = i / 2 * 8 + lane % 4 * 2 + i % 2;
        acc[r / 2][i / 2][r % 2 * 2 + i % 2] = d < RA_DV ? acc_in[place * RA_DV + d] : 0.0f;
      }
    }
#endif
  }

  // Which tiles: empty before `first` and from `last` on, full from `full_first` to `full_last`
  int first = reach[4 * tile], last = reach[4 * tile + 3];
  const int full_first = reach[4 * tile + 1], full_last = reach[4 * tile + 2];
  const int share_of_split = (last - first + splits - 1) / splits;
  first += split * share_of_split;
  last = min(last, first + share_of_split);
#if RA_SEGMENTS
  const int2 q_bounds = bounds_of(query_bounds + 2 * batch * query_bounds_shape[1], tile);
  const int* k_bounds = key_bounds + 2 * batch * key_bounds_shape[1];
  first = next_shared(first, last, q_bounds, k_bounds);
#endif

  auto load_keys = [&](int kb, int stage) {
    load<BK, BD, LDK>(k_tiles + stage * BK * LDK, k + static_cast<long long>(kb * BK) * keys_strides[2], keys_strides[2],
                      keys_strides[3], RA_D, k_len - kb * BK, k_parts);
  };
  auto load_values = [&](int kb, int stage) {
    load<BK, BV, LDV>(v_tiles + stage * BK * LDV, v + static_cast<long long>(kb * BK) * values_strides[2],
                      values_strides[2], values_strides[3], RA_DV, k_len - kb * BK, v_parts);
  };
  if (first < last) {
    load_keys(first, 0);
    if (RA_STAGES == 2) {
      load_values(first, 0);
    }
  }
  for (int kb = first, stage = 0; kb < last; stage = RA_STAGES - 1 - stage) {
    const int key = kb * BK, here = min(k_len - key, BK); // keys in this tile
#if RA_SEGMENTS
    const bool same = all_same(q_bounds, bounds_of(k_bounds, kb));
    const int next = next_shared(kb + 1, last, q_bounds, k_bounds);
#else
    constexpr bool same = true;
    const int next = kb + 1;
#endif
    const bool full = !RA_MASK && same && kb >= full_first && kb < full_last;

    RA_T* k_tile = k_tiles + stage * BK * LDK;
    RA_T* v_tile = v_tiles + stage * BK * LDV;

    wait_for_copies();
    __syncthreads(); // K is there, and everyone is done with V
    if (RA_STAGES == 1) {
      load_values(kb, 0);
    } else if (next < last) {
      load_keys(next, 1 - stage);
      load_values(next, 1 - stage);
    }
    float s[RA_FRAGMENTS][BK / 8][4] = {};
    multiply_rows<BD, LDK, LDK>(s, q_tile + 16 * RA_FRAGMENTS * warp * LDK, k_tile);

    if (RA_STAGES == 1) {
      wait_for_copies();
      __syncthreads(); // V is there, and everyone is done with K
      if (next < last) {
        load_keys(next, 0);
      }
    }

    // Scores, and in a partial tile the rules. In a full one the scale, which is not below 0, waits for the softmax
    const float factor = full && !RA_SOFTCAP ? scale : 1.0f;
    if (!full || RA_SOFTCAP) {
      RA_UNROLL
      for (int e = 0; e < RA_FRAGMENTS * BK / 2; e++) {
        float& x = s[e / (BK / 2)][e / 4 % (BK / 8)][e % 4];
        x *= scale;
#if RA_SOFTCAP
        x = numbers[1] * tanhf(x / numbers[1]);
#endif
      }
    }
    unsigned seen[RA_FRAGMENTS] = {};
    bool spoiled = false;
    if (!full) {
      spoiled = __syncthreads_or(finds_odd<BK, BV, LDV>(v_tile));
      RA_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const int row = min(first_row + 8 * r, rows - 1), token = row / RA_G;
#if RA_BAND
        const long long q_at = query_at[token];
        const int low = limits[0] == LEAST_INT ? LEAST_INT : static_cast<int>(max(q_at + limits[0], static_cast<long long>(LEAST_INT)));
        const int high = limits[1] == MOST_INT ? MOST_INT : static_cast<int>(min(q_at + limits[1], static_cast<long long>(MOST_INT)));
#endif
#if RA_SEGMENTS
        const int q_id = query_ids[static_cast<long long>(batch) * q_len + token];
        const int* k_ids = key_ids + static_cast<long long>(batch) * k_len + key;
#endif
#if RA_MASK
        const auto* mask_row = mask + batch * mask_strides[0] + (first_head + row % RA_G) * mask_strides[1] + token * mask_strides[2];
#endif
        RA_UNROLL
        for (int e = 0; e < BK / 4; e++) {
          const int j = e / 2, c = e % 2, column = 8 * j + lane % 4 * 2 + c;
          bool sees = column < here;
          const int inside = sees ? column : 0;
          float& x = s[r / 2][j][r % 2 * 2 + c];
#if RA_BAND
          const int k_at = key_at[key + inside];
          sees = sees & (k_at >= low) & (k_at <= high);
#endif
#if RA_SEGMENTS
          const int id = k_ids[inside];
          sees = sees & (id == q_id) & (id >= 0);
#endif
#if RA_COLUMNS
          const long long mask_at = mask_columns[key + inside] * mask_strides[3];
#elif RA_MASK
          const long long mask_at = (key + inside) * mask_strides[3];
#endif
#if RA_MASK == 1
          sees = sees && mask_row[mask_at];
#elif RA_MASK == 2
          const float added = sees ? float(mask_row[mask_at]) : 0.0f;
          sees = sees && added != -RA_INFINITY;
          x += added;
#endif
          x = sees ? x : -RA_INFINITY;
          seen[r / 2] |= unsigned(sees) << (4 * j + r % 2 * 2 + c);
        }
      }
    }

    // Online softmax: P, and what it does to the state
    float kept[ROWS];
    bool grown = false;
    RA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float top = s[r / 2][0][r % 2 * 2];
      RA_UNROLL
      for (int e = 1; e < BK / 4; e++) {
        top = fmaxf(top, s[r / 2][e / 2][r % 2 * 2 + e % 2]);
      }
      top = fmaxf(m[r], quad_max(top) * factor);
      kept[r] = weight(m[r], top);
      grown |= m[r] != top;
      m[r] = top;
      l[r] *= kept[r];
      RA_UNROLL
      for (int e = 0; e < BK / 4; e++) {
        float& x = s[r / 2][e / 2][r % 2 * 2 + e % 2];
        x = tile_weight(x, top, factor);
        l[r] += x;
      }
    }
    if (__any_sync(ALL_LANES, grown)) {
      RA_UNROLL
      for (int r = 0; r < ROWS; r++) {
        RA_UNROLL
        for (int i = 0; i < BV / 4; i++) {
          acc[r / 2][i / 2][r % 2 * 2 + i % 2] *= kept[r];
        }
      }
    }

    if (spoiled) {
      add_odd_values<BK>(acc, seen, v_tile);
      __syncthreads();
      clear_odd<BK, BV, LDV>(v_tile);
      __syncthreads();
    }
    multiply_weights<LDV>(acc, s, v_tile);
    kb = next;
  }

  // The end: rows that do not exist are not written
  wait_for_copies();
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    float sum = quad_sum(l[r]), top = m[r], kept = 1.0f;
    const int row = first_row + 8 * r, head = first_head + min(row, rows - 1) % RA_G;
    long long place = (static_cast<long long>(batch) * heads + head) * q_len + row / RA_G;
#if RA_STATE_OUT
    place += split * (static_cast<long long>(heads) * q_len * gridDim.z);
#elif RA_SINKS
    const float sink = sinks[head];
    top = fmaxf(m[r], sink);
    kept = weight(m[r], top);
    sum = sum * kept + weight(sink, top);
#endif
    if (row >= rows) {
      continue;
    }
    RA_UNROLL
    for (int i = 0; i < BV / 4; i++) {
      const int d = i / 2 * 8 + lane % 4 * 2 + i % 2;
      const float x = acc[r / 2][i / 2][r % 2 * 2 + i % 2];
      if (d < RA_DV) {
#if RA_STATE_OUT
        acc_out[place * RA_DV + d] = x;
#else
        out[place * RA_DV + d] = RA_OUT(sum == 0.0f ? 0.0f : x * kept / sum);
#endif
      }
    }
    if (lane % 4 == 0) {
#if RA_STATE_OUT
      m_out[place] = top;
      l_out[place] = sum;
#elif RA_LSE
      lse[place] = sum == 0.0f ? -RA_INFINITY : top + logf(sum);
#endif
    }
  }
