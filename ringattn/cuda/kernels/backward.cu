// The gradient of attention for the key tiles that `blocks` lists for this thread block, from the saved lse. Per pair of
// tiles there are five products, as in FlashAttention-2 (Dao, arXiv 2307.08691): s = q k^T, dp = dout v^T, and
//   dv += p^T dout      dk += ds^T q      dq += ds k
// with p = exp(s - lse) and ds = p (dp - delta). A warp has 16 keys, so that p^T and ds^T are operands without leaving its
// registers. Beyond 128 dims the sums of dk and dv do not fit: two warps then share 16 keys, each with half of the queries
// of p and ds, and with half of the dims of dk and dv.
//
// dk and dv stay in registers while the queries pass. dq is added up in memory, in an array that belongs to this thread
// block: no atomics, and the same order of sums in every run. Its product is one tile of
// queries behind, so that one barrier for each tile is enough. scale is left to `collect.cu`.

  constexpr int KEYS = RA_WARPS / RA_HALVES * 16, QUERIES = RA_QUERIES; // in a tile
  constexpr int COLUMNS = QUERIES / RA_HALVES;                          // of p and ds, of a warp
  constexpr int LDS = QUERIES + PART;
  constexpr int Q_WARPS = QUERIES / 16 / RA_FRAGMENTS, D_WARPS = RA_WARPS / Q_WARPS; // that share dq
  constexpr int CHUNKS = (BD / 16 + D_WARPS - 1) / D_WARPS;                          // of 16 dims of dq, of a warp
  constexpr bool WHOLE = BD == 16 * D_WARPS * CHUNKS;                                // whether all of them exist
  constexpr bool D_PARTS = RA_D % PART == 0, DV_PARTS = RA_DV % PART == 0;           // rows begin at 16 bytes

  extern __shared__ __align__(16) unsigned char memory[];
  RA_T* k_tile = reinterpret_cast<RA_T*>(memory);
  RA_T* v_tile = k_tile + KEYS * LDK;
  RA_T* q_tiles = v_tile + KEYS * LDV;
  RA_T* dout_tiles = q_tiles + RA_STAGES * QUERIES * LDK;
  RA_T* ds_tiles = dout_tiles + RA_STAGES * QUERIES * LDV; // two of [keys, queries], as is p
  RA_T* p_tile = ds_tiles + 2 * KEYS * LDS;
  float* saved = reinterpret_cast<float*>(p_tile + (RA_HALVES - 1) * KEYS * LDS); // lse and delta of the queries
  unsigned* odd_keys = reinterpret_cast<unsigned*>(saved + RA_STAGES * 2 * QUERIES);
  bool* begun = reinterpret_cast<bool*>(odd_keys + KEYS); // whether dq of a tile of queries has been written

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int key_warp = warp / RA_HALVES, half = warp % RA_HALVES, q_warp = warp % Q_WARPS, d_warp = warp / Q_WARPS;
  const int q_len = queries_shape[2], k_len = keys_shape[2], heads = queries_shape[1];
  const int q_tile_count = (q_len + QUERIES - 1) / QUERIES;
  const int head = blockIdx.y, batch = blockIdx.z, kv_head = head / (heads / keys_shape[1]);
  const long long place = static_cast<long long>(batch) * heads + head;
  const long long kv_place = (static_cast<long long>(batch) * keys_shape[1] + kv_head) * k_len;
  const long long dq_place = (blockIdx.x * (static_cast<long long>(heads) * gridDim.z) + place) * q_tile_count;
  const float scale = numbers[0];

  auto load_queries = [&](int tile, int stage) {
    const int here = min(q_len - tile * QUERIES, QUERIES);
    const long long first = place * q_len + tile * QUERIES;
    load<QUERIES, BD, LDK>(q_tiles + stage * QUERIES * LDK, queries + first * RA_D, RA_D, 1, RA_D, here, D_PARTS);
    load<QUERIES, BV, LDV>(dout_tiles + stage * QUERIES * LDV, dout + first * RA_DV, RA_DV, 1, RA_DV, here, DV_PARTS);
    for (int i = threadIdx.x; i < 2 * QUERIES; i += THREADS) {
      copy_word(saved + stage * 2 * QUERIES + i, (i < QUERIES ? lse : delta) + first + min(i % QUERIES, here - 1));
    }
    commit_copies(); // at once: a later end of the group waits for the sums of dq, which come from memory
  };

  // dq of a tile of queries: what earlier keys left, and then the product with these keys. In memory each lane has four
  // neighbours, as `collect_queries.cu` knows.
  float dq_sums[RA_FRAGMENTS][2 * CHUNKS][4];
  auto dq_of = [&](int tile) {
    return reinterpret_cast<float4*>(dq) + (dq_place + tile) * (QUERIES * 4 * CHUNKS * D_WARPS) +
        warp * (RA_FRAGMENTS * 2 * CHUNKS * 32) + lane;
  };
  auto begin_dq = [&](int tile) {
    const bool again = begun[tile];
    const float4* from = dq_of(tile);
    RA_UNROLL
    for (int i = 0; i < RA_FRAGMENTS * 2 * CHUNKS; i++) {
      const float4 x = again ? from[32 * i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      float(&to)[4] = dq_sums[i / (2 * CHUNKS)][i % (2 * CHUNKS)];
      to[0] = x.x;
      to[1] = x.y;
      to[2] = x.z;
      to[3] = x.w;
    }
  };
  auto finish_dq = [&](int tile, int turn) {
    multiply_columns<KEYS, LDS, LDK, 16 * D_WARPS>(dq_sums, ds_tiles + turn * KEYS * LDS + 16 * RA_FRAGMENTS * q_warp,
                                                   k_tile + 16 * d_warp, WHOLE ? BD : BD - 16 * d_warp);
    float4* to = dq_of(tile);
    RA_UNROLL
    for (int i = 0; i < RA_FRAGMENTS * 2 * CHUNKS; i++) {
      const float(&x)[4] = dq_sums[i / (2 * CHUNKS)][i % (2 * CHUNKS)];
      to[32 * i] = make_float4(x[0], x[1], x[2], x[3]);
    }
  };

  int settled = -1; // the tile whose dq was written last: after a barrier it has begun
  auto settle = [&] {
    if (threadIdx.x == 0 && settled >= 0) {
      begun[settled] = true;
    }
  };

  for (int i = threadIdx.x; i < q_tile_count; i += THREADS) {
    begun[i] = false;
  }
  for (int n = 0; n < blocks_shape[1] && blocks[blockIdx.x * blocks_shape[1] + n] >= 0; n++) {
    const int block = blocks[blockIdx.x * blocks_shape[1] + n], key = block * KEYS, keys_here = min(k_len - key, KEYS);
    const int last = reach[4 * block + 3];
    int tile = reach[4 * block];
#if RA_SEGMENTS
    const int2 k_bounds = bounds_of(key_bounds + 2 * batch * key_bounds_shape[1], block);
    const int* q_bounds = query_bounds + 2 * batch * query_bounds_shape[1];
    tile = next_shared(tile, last, k_bounds, q_bounds);
#endif
    __syncthreads(); // everyone is done with the keys before
    settle();
    settled = -1;
    load<KEYS, BD, LDK>(k_tile, keys + (kv_place + key) * RA_D, RA_D, 1, RA_D, keys_here, D_PARTS);
    load<KEYS, BV, LDV>(v_tile, values + (kv_place + key) * RA_DV, RA_DV, 1, RA_DV, keys_here, DV_PARTS);
    commit_copies();
    if (tile < last) {
      load_queries(tile, 0);
    }
    wait_for_committed();
    __syncthreads();
    const bool odd_block = __syncthreads_or(finds_odd<KEYS, BD, LDK>(k_tile));
    if (odd_block) { // such keys are zeros in the products, and NaN in the scores of those who see them
      if (threadIdx.x < KEYS) {
        odd_keys[threadIdx.x] = clear_odd_row<KEYS, BD, LDK>(k_tile, threadIdx.x);
      }
      __syncthreads();
    }
    float dk_sums[1][BD / RA_HALVES / 8][4] = {}, dv_sums[1][BV / RA_HALVES / 8][4] = {};

    int before = -1, turn = 0; // the tile whose dq is due, and where the next ds goes
    for (int stage = 0; tile < last; stage = RA_STAGES - 1 - stage) {
#if RA_SEGMENTS
      const bool same = all_same(k_bounds, bounds_of(q_bounds, tile));
      const int next = next_shared(tile + 1, last, k_bounds, q_bounds);
#else
      constexpr bool same = true;
      const int next = tile + 1;
#endif
      const bool full =
          !RA_MASK && same && !odd_block && keys_here == KEYS && tile >= reach[4 * block + 1] && tile < reach[4 * block + 2];
      RA_T* q_tile = q_tiles + stage * QUERIES * LDK;
      RA_T* dout_tile = dout_tiles + stage * QUERIES * LDV;
      float* saved_lse = saved + stage * 2 * QUERIES;
      const int query = tile * QUERIES;

      wait_for_committed();
      __syncthreads(); // the queries and ds are there, and everyone is done with the queries before
      if (RA_STAGES == 2 && next < last) {
        load_queries(next, RA_STAGES - 1 - stage);
      }
      settle();
      settled = before;
      if (!full && __syncthreads_or(finds_odd<QUERIES, BD, LDK>(q_tile) | finds_odd<QUERIES, BV, LDV>(dout_tile))) {
        for (int r = threadIdx.x; r < QUERIES; r += THREADS) {
          const bool odd = clear_odd_row<QUERIES, BD, LDK>(q_tile, r) | clear_odd_row<QUERIES, BV, LDV>(dout_tile, r);
          saved_lse[r] = odd && saved_lse[r] != RA_INFINITY ? RA_NAN : saved_lse[r];
        }
        __syncthreads();
      }

      // p
      float p[1][COLUMNS / 8][4] = {};
      multiply_rows<BD, LDK, LDK>(p, k_tile + 16 * key_warp * LDK, q_tile + half * COLUMNS * LDK);
      if (before >= 0) {
        finish_dq(before, 1 - turn);
      }
#if RA_SOFTCAP
      float slope[COLUMNS / 2];
#endif
      if (!full || RA_SOFTCAP) {
        RA_UNROLL
        for (int e = 0; e < COLUMNS / 2; e++) {
          float& x = p[0][e / 4][e % 4];
          x *= scale;
#if RA_SOFTCAP
          const float bent = tanhf(x / numbers[1]);
          x = numbers[1] * bent;
          slope[e] = 1.0f - bent * bent;
#endif
        }
      }
      unsigned hidden[(COLUMNS + 63) / 64] = {};
      if (!full) {
        RA_UNROLL
        for (int e = 0; e < COLUMNS / 2; e++) {
          float& x = p[0][e / 4][e % 4];
          const int row = 16 * key_warp + lane / 4 + e % 4 / 2 * 8, column = half * COLUMNS + e / 4 * 8 + lane % 4 * 2 + e % 2;
          const int i = min(query + column, q_len - 1), j = min(key + row, k_len - 1);
          bool sees = query + column < q_len && row < keys_here;
          x = odd_block && odd_keys[row] ? RA_NAN : x;
#if RA_BAND
          const long long distance = static_cast<long long>(key_at[j]) - query_at[i];
          sees = sees && (limits[0] == LEAST_INT || distance >= limits[0]) && (limits[1] == MOST_INT || distance <= limits[1]);
#endif
#if RA_SEGMENTS
          const int id = query_ids[static_cast<long long>(batch) * q_len + i];
          sees = sees && id >= 0 && id == key_ids[static_cast<long long>(batch) * k_len + j];
#endif
#if RA_MASK
          const auto* mask_row = mask + batch * mask_strides[0] + head * mask_strides[1] + i * mask_strides[2];
#if RA_COLUMNS
          const auto masked = mask_row[mask_columns[j] * mask_strides[3]];
#else
          const auto masked = mask_row[j * mask_strides[3]];
#endif
#if RA_MASK == 1
          sees = sees && masked;
#else
          sees = sees && float(masked) != -RA_INFINITY;
          x += sees ? float(masked) : 0.0f;
#endif
#endif
          hidden[e / 32] |= unsigned(!sees) << e % 32;
        }
      }
      auto hide = [&](float (&x)[1][COLUMNS / 8][4]) { // by selection: 0 * NaN is NaN
        RA_UNROLL
        for (int e = 0; e < COLUMNS / 2; e++) {
          x[0][e / 4][e % 4] = hidden[e / 32] >> e % 32 & 1 ? 0.0f : x[0][e / 4][e % 4];
        }
      };
      const float factor = full && !RA_SOFTCAP ? scale : 1.0f;
      const float2* columns = reinterpret_cast<const float2*>(saved_lse + half * COLUMNS + lane % 4 * 2);
      RA_UNROLL
      for (int j = 0; j < COLUMNS / 8; j++) {
        const float2 two = columns[4 * j];
        RA_UNROLL
        for (int i = 0; i < 4; i++) {
          p[0][j][i] = tile_weight(p[0][j][i], i % 2 ? two.y : two.x, factor);
        }
      }
      if (!full) {
        hide(p);
      }

      // ds
      float ds[1][COLUMNS / 8][4] = {};
      multiply_rows<BV, LDV, LDV>(ds, v_tile + 16 * key_warp * LDV, dout_tile + half * COLUMNS * LDV);
#if RA_HALVES == 1
      multiply_weights<LDV>(dv_sums, p, dout_tile);
#endif
      RA_UNROLL
      for (int j = 0; j < COLUMNS / 8; j++) {
        const float2 two = columns[QUERIES / 2 + 4 * j];
        RA_UNROLL
        for (int i = 0; i < 4; i++) {
          ds[0][j][i] = p[0][j][i] * (ds[0][j][i] - (i % 2 ? two.y : two.x));
        }
      }
      if (!full) {
        hide(ds);
      }
#if RA_MASK == 2
      RA_UNROLL
      for (int e = 0; e < COLUMNS / 2; e++) {
        const int row = 16 * key_warp + lane / 4 + e % 4 / 2 * 8, column = half * COLUMNS + e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (row < keys_here && query + column < q_len) {
          dmask[(place * q_len + query + column) * k_len + key + row] = ds[0][e / 4][e % 4];
        }
      }
#endif
#if RA_SOFTCAP
      RA_UNROLL
      for (int e = 0; e < COLUMNS / 2; e++) {
        float& x = ds[0][e / 4][e % 4];
        x *= hidden[e / 32] >> e % 32 & 1 ? 1.0f : slope[e];
      }
#endif
      RA_T* ds_tile = ds_tiles + turn * KEYS * LDS;
      RA_UNROLL
      for (int e = 0; e < COLUMNS / 4; e++) { // two neighbours
        const int at = (16 * key_warp + lane / 4 + e % 2 * 8) * LDS + half * COLUMNS + e / 2 * 8 + lane % 4 * 2;
        store_pair(ds_tile + at, ds[0][e / 2][e % 2 * 2], ds[0][e / 2][e % 2 * 2 + 1]);
#if RA_HALVES == 2
        store_pair(p_tile + at, p[0][e / 2][e % 2 * 2], p[0][e / 2][e % 2 * 2 + 1]);
#endif
      }

      begin_dq(tile); // its sums come from memory while dk is computed
#if RA_HALVES == 1
      multiply_weights<LDK>(dk_sums, ds, q_tile);
#else
      __syncthreads(); // p and ds are there
      float whole[1][QUERIES / 8][4];
      auto gather = [&](const RA_T* from) {
        from += (16 * key_warp + lane / 4) * LDS + lane % 4 * 2;
        RA_UNROLL
        for (int e = 0; e < QUERIES / 4; e++) {
          const float2 two = load_pair(from + e % 2 * 8 * LDS + e / 2 * 8);
          whole[0][e / 2][e % 2 * 2] = two.x;
          whole[0][e / 2][e % 2 * 2 + 1] = two.y;
        }
      };
      gather(p_tile);
      multiply_weights<LDV>(dv_sums, whole, dout_tile + half * (BV / 2));
      gather(ds_tile);
      multiply_weights<LDK>(dk_sums, whole, q_tile + half * (BD / 2));
#endif
      if (RA_STAGES == 1 && next < last) {
        __syncthreads(); // everyone is done with the queries
        load_queries(next, 0);
      }
      before = tile;
      tile = next;
      turn = 1 - turn;
    }
    __syncthreads(); // ds is there
    settle();
    settled = before;
    if (before >= 0) {
      finish_dq(before, 1 - turn);
    }

    RA_UNROLL
    for (int r = 0; r < 2; r++) {
      const int row = 16 * key_warp + lane / 4 + 8 * r;
      const long long at = place * k_len + key + row;
      RA_UNROLL
      for (int i = 0; i < BD / RA_HALVES / 8; i++) {
        const int d = half * (BD / RA_HALVES) + 8 * i + lane % 4 * 2;
        store_two<RA_D>(dk + at * RA_D + d, &dk_sums[0][i][2 * r], row < keys_here ? RA_D - d : 0);
      }
      RA_UNROLL
      for (int i = 0; i < BV / RA_HALVES / 8; i++) {
        const int d = half * (BV / RA_HALVES) + 8 * i + lane % 4 * 2;
        store_two<RA_DV>(dv + at * RA_DV + d, &dv_sums[0][i][2 * r], row < keys_here ? RA_DV - d : 0);
      }
    }
  }

  // Queries that saw none of the keys
  settle();
  __syncthreads();
  for (int tile = 0; tile < q_tile_count; tile++) {
    if (!begun[tile]) {
      float4* to = dq_of(tile);
      for (int i = 0; i < RA_FRAGMENTS * 2 * CHUNKS; i++) {
        to[32 * i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }
