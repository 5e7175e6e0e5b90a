// The gradient of attention by wgmma, from the saved lse. A block holds the tokens of one tile of keys (RA_OF_KEYS) or of
// queries, and the tokens of the other side pass. With rows of held and columns of passing tokens,
//   s = k q^T     dp = v dout^T     dv += p dout     dk += ds q            where keys are held,
//   s = q k^T     dp = dout v^T                      dq += ds k            where queries are held,
// p = exp(s - lse) and ds = p (dp - delta). So p and ds never leave the registers of the rows that have them, and nothing
// is added up in memory: no atomics, and the same bits in every run. s and dp are computed twice, which costs less than
// to add up dq in memory (FlashAttention-2, arXiv 2307.08691, computes them once). Where the registers do not hold both dk
// and dv (RA_SUM_K, RA_SUM_V), each has a call of its own; that of dv has no dp.
//
// A warpgroup has 64 held tokens and goes its own way: a passing tile arrives at one barrier and is released at another.

  constexpr int HELD = 16 * RA_WARPS, PASSING = RA_PASSING, STAGES = RA_STAGES; // tokens of the tiles
  constexpr int AHEAD = STAGES - 2;                                             // tiles that are loaded early
  constexpr long long CACHE = 32 << 20; // bytes of the L2 cache that passing tokens may take
  constexpr int PANEL_BYTES = PASSING * PANEL * sizeof(RA_T);
  constexpr int K_SIZE = tile_size(PASSING, BD), V_SIZE = tile_size(PASSING, BV);
  constexpr bool D_PARTS = RA_D % PART == 0, DV_PARTS = RA_DV % PART == 0; // rows begin at 16 bytes

  extern __shared__ __align__(1024) unsigned char memory[];
  RA_T* held_k = reinterpret_cast<RA_T*>(memory); // keys or queries
  RA_T* held_v = held_k + tile_size(HELD, BD);    // values or dout, for dp
  RA_T* k_tiles = held_v + (RA_SUM_K ? tile_size(HELD, BV) : 0); // queries or keys
  RA_T* v_tiles = k_tiles + STAGES * K_SIZE;                     // dout or values
  float* saved = reinterpret_cast<float*>(v_tiles + STAGES * V_SIZE); // lse and delta of passing queries
  unsigned long long* arrived = reinterpret_cast<unsigned long long*>(saved + STAGES * 2 * PASSING);
  unsigned long long* released = arrived + STAGES;
  bool* odd_held = reinterpret_cast<bool*>(released + STAGES); // tokens with NaN or infinity
  bool* odd_passing = odd_held + HELD;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int q_len = queries_shape[2], k_len = keys_shape[2], heads = queries_shape[1], kv_heads = keys_shape[1];
  const int batch = blockIdx.z, heads_here = heads / gridDim.y;
  const int held_len = RA_OF_KEYS ? k_len : q_len, passing_len = RA_OF_KEYS ? q_len : k_len;

  // Blocks begin with the longest tiles of as many heads as fit into the cache together: then they end at about one time
  const long long passing_bytes =
      (RA_OF_KEYS ? heads : kv_heads) * static_cast<long long>(passing_len) * ((RA_D + RA_DV) * sizeof(RA_T));
  const int columns = gridDim.x, rows = gridDim.y, turn = blockIdx.x + columns * blockIdx.y; // of the grid
  const int together = static_cast<int>(max(1ll, min(rows * CACHE / passing_bytes, static_cast<long long>(rows))));
  const int first_row = turn / (columns * together) * together, rows_here = min(together, rows - first_row);
  const int turn_here = turn - first_row * columns, y = first_row + turn_here % rows_here;
  const int block = order[turn_here / rows_here], first_head = y * heads_here;
  const int held = block * HELD, held_here = min(held_len - held, HELD);
  const int row = 16 * warp + lane / 4; // of this lane; the other is 8 below
  const long long kv_place = (static_cast<long long>(batch) * kv_heads + first_head / (heads / kv_heads)) * k_len;
  auto q_place = [&](int head) { return (static_cast<long long>(batch) * heads + head) * q_len; };
  const float scale = numbers[0];

  // Which tiles pass
  int first = reach[4 * block];
  const int last = reach[4 * block + 3];
#if RA_SEGMENTS
  const int* q_bounds = query_bounds + 2 * batch * query_bounds_shape[1];
  const int* k_bounds = key_bounds + 2 * batch * key_bounds_shape[1];
  const int* passing_bounds = RA_OF_KEYS ? q_bounds : k_bounds;
  const int2 held_bounds = bounds_of(RA_OF_KEYS ? k_bounds : q_bounds, block);
  first = next_shared(first, last, held_bounds, passing_bounds);
#endif
  auto after = [&](int tile) {
#if RA_SEGMENTS
    return next_shared(tile + 1, last, held_bounds, passing_bounds);
#else
    return tile + 1;
#endif
  };

  struct Place {
    int head, tile;
  };
  const int last_head = first < last ? first_head + heads_here : first_head;
  auto step = [&](Place& x) {
    x.tile = after(x.tile);
    if (x.tile >= last) {
      x.tile = first;
      x.head++;
    }
  };

  Place to_load{first_head, first};
  Slot load_at{0, 1};
  auto load_next = [&] {
    if (to_load.head == last_head) {
      return;
    }
    const int here = passing_len - to_load.tile * PASSING;
    RA_T* to_k = k_tiles + load_at.stage * K_SIZE;
    RA_T* to_v = v_tiles + load_at.stage * V_SIZE;
    wait_for(released + load_at.stage, load_at.parity);
#if RA_OF_KEYS
    const long long place_of_tile = q_place(to_load.head) + to_load.tile * PASSING;
    load<PASSING, BD, SWIZZLED>(to_k, queries + place_of_tile * RA_D, RA_D, 1, RA_D, here, D_PARTS);
    load<PASSING, BV, SWIZZLED>(to_v, dout + place_of_tile * RA_DV, RA_DV, 1, RA_DV, here, DV_PARTS);
    for (int i = threadIdx.x; i < 2 * PASSING; i += THREADS) {
      copy_word(saved + load_at.stage * 2 * PASSING + i,
                (i < PASSING ? lse : delta) + place_of_tile + min(i % PASSING, here - 1));
    }
#else
    const long long place_of_tile = kv_place + to_load.tile * PASSING;
    load<PASSING, BD, SWIZZLED>(to_k, keys + place_of_tile * RA_D, RA_D, 1, RA_D, here, D_PARTS);
    load<PASSING, BV, SWIZZLED>(to_v, values + place_of_tile * RA_DV, RA_DV, 1, RA_DV, here, DV_PARTS);
#endif
    if (D_PARTS && DV_PARTS) {
      arrive_after_copies(arrived + load_at.stage);
    } else {
      wait_for_copies();
      arrive(arrived + load_at.stage);
    }
    load_at.step<STAGES>();
    step(to_load);
  };

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      make_barrier(arrived + stage, THREADS);
      make_barrier(released + stage, RA_WARPS * RA_ARRIVALS);
    }
  }
  __syncthreads();
#if RA_OF_KEYS
  load<HELD, BD, SWIZZLED>(held_k, keys + (kv_place + held) * RA_D, RA_D, 1, RA_D, held_here, D_PARTS);
#if RA_SUM_K
  load<HELD, BV, SWIZZLED>(held_v, values + (kv_place + held) * RA_DV, RA_DV, 1, RA_DV, held_here, DV_PARTS);
#endif
#else
  const long long held_place = q_place(first_head) + held;
  load<HELD, BD, SWIZZLED>(held_k, queries + held_place * RA_D, RA_D, 1, RA_D, held_here, D_PARTS);
  load<HELD, BV, SWIZZLED>(held_v, dout + held_place * RA_DV, RA_DV, 1, RA_DV, held_here, DV_PARTS);
#endif
  for (int i = 0; i < AHEAD; i++) {
    load_next();
  }
  wait_for_copies();
  publish_to_products();

#if RA_OF_KEYS // held tokens with NaN or infinity are zeros in the products, and NaN in the scores of those they see
  __syncthreads();
  const bool odd_block = __syncthreads_or(finds_odd<HELD, BD, SWIZZLED>(held_k));
  if (odd_block) {
    if (threadIdx.x < HELD) {
      odd_held[threadIdx.x] = clear_odd_row<HELD, BD, SWIZZLED>(held_k, threadIdx.x);
    }
    publish_to_products();
    __syncthreads();
  }
#else // NaN and infinity stay in their rows
  __syncthreads();
  constexpr bool odd_block = false;
  float row_tops[2], row_deltas[2];
  RA_UNROLL
  for (int r = 0; r < 2; r++) {
    const long long at = held_place + min(row + 8 * r, held_here - 1);
    row_tops[r] = -RA_LOG2E * lse[at];
    row_deltas[r] = delta[at];
  }
#endif
  const unsigned held_k_rows = description_of(held_k + warp / 4 * 64 * PANEL);
#if RA_SUM_K
  const unsigned held_v_rows = description_of(held_v + warp / 4 * 64 * PANEL);
  float k_sums[BD / 8][4] = {}; // dk or dq
#endif
#if RA_SUM_V
  float v_sums[BV / 8][4] = {}; // dv
#endif

  Slot at{0, 0};
  for (Place here{first_head, first}; here.head < last_head; step(here)) {
    const int head = here.head, tile = here.tile;
    const int passing = tile * PASSING, passing_here = min(passing_len - passing, PASSING);
    RA_T* k_tile = k_tiles + at.stage * K_SIZE;
    RA_T* v_tile = v_tiles + at.stage * V_SIZE;
#if RA_SEGMENTS
    const bool same = all_same(held_bounds, bounds_of(passing_bounds, tile));
#else
    constexpr bool same = true;
#endif
    const bool full = !RA_MASK && same && !odd_block && tile >= reach[4 * block + 1] && tile < reach[4 * block + 2];

    wait_for(arrived + at.stage, at.parity);
    publish_to_products();
    bool odd_tile = false;
    if (!full) { // 0 * NaN is NaN: passing tokens with NaN or infinity become zeros as well
      bool odd = finds_odd<PASSING, BD, SWIZZLED>(k_tile);
#if RA_OF_KEYS
      odd |= finds_odd<PASSING, BV, SWIZZLED>(v_tile);
#endif
      odd_tile = __syncthreads_or(odd);
      if (odd_tile) {
        if (threadIdx.x < PASSING) {
          bool found = clear_odd_row<PASSING, BD, SWIZZLED>(k_tile, threadIdx.x);
#if RA_OF_KEYS
          found |= clear_odd_row<PASSING, BV, SWIZZLED>(v_tile, threadIdx.x);
#endif
          odd_passing[at.stage * PASSING + threadIdx.x] = found;
        }
        publish_to_products();
        __syncthreads();
      }
    }

    float s[PASSING / 8][4];
    begin_products();
    multiply_rows_of<HELD, PASSING, BD>(s, held_k_rows, description_of(k_tile));
    commit_products();
#if RA_SUM_K
    float dp[PASSING / 8][4];
    multiply_rows_of<HELD, PASSING, BV>(dp, held_v_rows, description_of(v_tile));
    commit_products();
#endif
    wait_for_products<RA_SUM_K>(); // s
    pin(s);
    load_next();

    // p
#if RA_SOFTCAP && RA_SUM_K
    float slope[PASSING / 8][4];
#endif
    if (!full || RA_SOFTCAP) {
      RA_UNROLL
      for (int e = 0; e < PASSING / 2; e++) {
        float& x = s[e / 4][e % 4];
        x *= scale;
#if RA_SOFTCAP
        const float bent = tanhf(x / numbers[1]);
        x = numbers[1] * bent;
#if RA_SUM_K
        slope[e / 4][e % 4] = 1.0f - bent * bent;
#endif
#endif
      }
    }
    unsigned hidden[(PASSING + 63) / 64] = {};
    if (!full) {
      RA_UNROLL
      for (int r = 0; r < 2; r++) {
        const int mine = min(held + row + 8 * r, held_len - 1);
        const bool odd = odd_block && odd_held[row + 8 * r];
#if RA_BAND
        const int* passing_at = RA_OF_KEYS ? query_at : key_at;
        const int2 span = RA_OF_KEYS ? queries_seeing(key_at[mine], limits) : keys_seen(query_at[mine], limits);
#endif
#if RA_SEGMENTS
        const int id = (RA_OF_KEYS ? key_ids : query_ids)[static_cast<long long>(batch) * held_len + mine];
        const int* passing_ids = (RA_OF_KEYS ? query_ids : key_ids) + static_cast<long long>(batch) * passing_len;
#endif
        RA_UNROLL
        for (int e = 0; e < PASSING / 4; e++) {
          const int column = e / 2 * 8 + lane % 4 * 2 + e % 2, other = min(passing + column, passing_len - 1);
          const int bit = e / 2 * 4 + r * 2 + e % 2;
          float& x = s[bit / 4][bit % 4];
          bool sees = column < passing_here;
          x = odd || (odd_tile && odd_passing[at.stage * PASSING + column]) ? RA_NAN : x;
#if RA_BAND
          sees = sees & (passing_at[other] >= span.x) & (passing_at[other] <= span.y);
#endif
#if RA_SEGMENTS
          sees = sees & (id >= 0) & (passing_ids[other] == id);
#endif
#if RA_MASK
          const int i = RA_OF_KEYS ? other : mine, j = RA_OF_KEYS ? mine : other;
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
          hidden[bit / 32] |= unsigned(!sees) << bit % 32;
        }
      }
    }
    auto hide = [&](float (&x)[PASSING / 8][4]) { // by selection: 0 * NaN is NaN
      RA_UNROLL
      for (int e = 0; e < PASSING / 2; e++) {
        x[e / 4][e % 4] = hidden[e / 32] >> e % 32 & 1 ? 0.0f : x[e / 4][e % 4];
      }
    };
    const float factor = RA_LOG2E * (full && !RA_SOFTCAP ? scale : 1.0f);
    const float2* saved_columns = reinterpret_cast<const float2*>(saved + at.stage * 2 * PASSING + lane % 4 * 2);
    RA_UNROLL
    for (int j = 0; j < PASSING / 8; j++) {
#if RA_OF_KEYS
      const float tops[2] = {-RA_LOG2E * saved_columns[4 * j].x, -RA_LOG2E * saved_columns[4 * j].y};
#else
      const float(&tops)[2] = row_tops;
#endif
      RA_UNROLL
      for (int i = 0; i < 4; i++) {
        s[j][i] = power_of_2(fmaf(s[j][i], factor, tops[RA_OF_KEYS ? i % 2 : i / 2]));
      }
    }
    if (!full) {
      hide(s);
    }

#if RA_SUM_K // ds
    wait_for_products<0>();
    pin(dp);
    RA_UNROLL
    for (int j = 0; j < PASSING / 8; j++) {
#if RA_OF_KEYS
      const float2 two = saved_columns[PASSING / 2 + 4 * j];
      const float deltas[2] = {two.x, two.y};
#else
      const float(&deltas)[2] = row_deltas;
#endif
      RA_UNROLL
      for (int i = 0; i < 4; i++) {
        dp[j][i] = s[j][i] * (dp[j][i] - deltas[RA_OF_KEYS ? i % 2 : i / 2]);
      }
    }
#if RA_MASK == 2 && !RA_OF_KEYS
    RA_UNROLL
    for (int e = 0; e < PASSING / 2; e++) {
      const int mine = row + e % 4 / 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
      if (mine < held_here && column < passing_here) {
        dmask[(held_place + mine) * k_len + passing + column] = hidden[e / 32] >> e % 32 & 1 ? 0.0f : dp[e / 4][e % 4];
      }
    }
#endif
#if RA_SOFTCAP
    RA_UNROLL
    for (int e = 0; e < PASSING / 2; e++) {
      dp[e / 4][e % 4] *= slope[e / 4][e % 4];
    }
#endif
    if (!full) {
      hide(dp);
    }
    unsigned changes[PASSING / 16][4];
    pack(changes, dp);
#endif
#if RA_SUM_V
    unsigned weights[PASSING / 16][4];
    pack(weights, s);
#endif
    begin_products();
#if RA_SUM_V
    multiply_weights_of<PASSING>(v_sums, weights, description_of(v_tile, PANEL_BYTES));
#endif
#if RA_SUM_K
    multiply_weights_of<PASSING>(k_sums, changes, description_of(k_tile, PANEL_BYTES));
#endif
    commit_products();
    wait_for_products<0>();
#if RA_SUM_K
    pin(k_sums);
#endif
#if RA_SUM_V
    pin(v_sums);
#endif
    __syncwarp(); // all lanes have read what is saved
    if (lane < RA_ARRIVALS) {
      arrive(released + at.stage);
    }
    at.step<STAGES>();
  }

#if RA_ADDS
#define RA_BEFORE(sums) sums
#else
#define RA_BEFORE(sums) nullptr
#endif
  RA_UNROLL
  for (int r = 0; r < 2; r++) {
    const int mine = row + 8 * r;
    if (mine < held_here) {
#if RA_OF_KEYS
      const long long to = (static_cast<long long>(batch) * gridDim.y + y) * k_len + held + mine;
#if RA_SUM_K
      const long long k_to = to * RA_D;
      store_row<RA_D, RA_ADDS>(dk + k_to, RA_BEFORE(dk_before + k_to), k_sums, r, RA_SCALES ? scale : 1.0f);
#endif
#if RA_SUM_V
      const long long v_to = to * RA_DV;
      store_row<RA_DV, RA_ADDS>(dv + v_to, RA_BEFORE(dv_before + v_to), v_sums, r, 1.0f);
#endif
#else
      const long long to = (held_place + mine) * RA_D;
      store_row<RA_D, RA_ADDS>(dq + to, RA_BEFORE(dq_before + to), k_sums, r, scale);
#endif
    }
  }
