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
#include "forward_begin.cu"

  const int first_row = tile * BQ + 16 * RA_FRAGMENTS * warp + lane / 4; // of this lane; the others are 8 apart

  load_queries<BQ, LDK, THREADS>(q_tile, queries, queries_shape, queries_strides, rows, tile * BQ);

  float acc[RA_FRAGMENTS][BV / 8][4], m[ROWS], l[ROWS]; // l: of this lane's columns alone, until the end
  clear_state(acc, m, l);

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

    // In a full tile the scale, which is not below 0, waits for the softmax
    finish_scores(s, rules, !full);
    unsigned seen[RA_FRAGMENTS][1] = {};
    bool spoiled = false;
    if (!full) {
      spoiled = __syncthreads_or(finds_odd<BK, BV, LDV>(v_tile));
      hide(s, seen, rules, rows, first_row, key, here);
    }
    float kept[ROWS];
    if (weigh(s, m, l, kept, full && !RA_SOFTCAP ? rules.scale : 1.0f)) {
      shrink(acc, kept);
    }
    if (spoiled) {
      add_odd_values<BK, LDV>(acc, seen, v_tile);
      __syncthreads();
      clear_odd<BK, BV, LDV>(v_tile);
      __syncthreads();
    }
    multiply_weights<LDV>(acc, s, v_tile);
    kb = next;
  }

  wait_for_copies();
#if RA_STATE_IN
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int row = unknown(first_row) + 8 * r;
    if (split == 0 && row < rows.count()) {
      add_state(acc, m, l, r, rows.place(row), acc_in, m_in, l_in);
    }
  }
#endif
  store_results(results, rows, unknown(first_row), acc, m, l);
