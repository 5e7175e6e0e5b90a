// Attention of a tile of BQ query rows to their keys for compute capability 9.0, after FlashAttention-3 (Shah et al.,
// arXiv 2407.08608). One warpgroup loads keys and values, RA_STAGES tiles of each ahead at most. The others have 64 rows
// each: while they take the softmax of one tile, the matrix units multiply the weights of the tile before with its
// values. With RA_TURNS these warpgroups issue their products in turn, so that one's softmax meets another's products.
// What a row may not see is decided in partial tiles alone, which have no such overlap.

  constexpr int BQ = 16 * RA_WARPS, BK = RA_BK, GROUPS = RA_WARPS / 4; // rows, keys, warpgroups with rows
  constexpr int K_SIZE = tile_size(BK, BD), V_SIZE = tile_size(BK, BV);
  constexpr int TURN = 1, ROWS_LOADED = TURN + GROUPS, ALL_ROWS = ROWS_LOADED + GROUPS; // numbered barriers
  extern __shared__ unsigned char memory[];
  RA_T* q_tile = reinterpret_cast<RA_T*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  RA_T* k_tiles = q_tile + tile_size(BQ, BD);
  RA_T* v_tiles = k_tiles + RA_STAGES * K_SIZE;
  unsigned long long* k_full = reinterpret_cast<unsigned long long*>(v_tiles + RA_STAGES * V_SIZE);
  unsigned long long *v_full = k_full + RA_STAGES, *k_free = v_full + RA_STAGES, *v_free = k_free + RA_STAGES;
#include "forward_begin.cu"

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < RA_STAGES; stage++) {
      make_barrier(k_full + stage, WARPGROUP);
      make_barrier(v_full + stage, WARPGROUP);
      make_barrier(k_free + stage, RA_WARPS * RA_ARRIVALS);
      make_barrier(v_free + stage, RA_WARPS * RA_ARRIVALS);
    }
  }
  __syncthreads();
  const int group = uniform(threadIdx.x / WARPGROUP);

  auto after = [&](int kb) { // the next tile
#if RA_SEGMENTS
    return next_shared(kb + 1, last, q_bounds, k_bounds);
#else
    return kb + 1;
#endif
  };

  if (group == GROUPS) { // loads
    give_registers<RA_LOADER_REGISTERS>();
    const int thread = threadIdx.x - GROUPS * WARPGROUP;
    Slot at{0, 1};
    for (int kb = first; kb < last; kb = after(kb), at.step<RA_STAGES>()) {
      const long long key = static_cast<long long>(kb) * BK;
      wait_for(k_free + at.stage, at.parity);
      load<BK, BD, SWIZZLED, WARPGROUP>(k_tiles + at.stage * K_SIZE, k + key * keys_strides[2], keys_strides[2],
                                        keys_strides[3], RA_D, k_len - kb * BK, k_parts, thread);
      k_parts ? arrive_after_copies(k_full + at.stage) : arrive(k_full + at.stage);
      wait_for(v_free + at.stage, at.parity);
      load<BK, BV, SWIZZLED, WARPGROUP>(v_tiles + at.stage * V_SIZE, v + key * values_strides[2], values_strides[2],
                                        values_strides[3], RA_DV, k_len - kb * BK, v_parts, thread);
      v_parts ? arrive_after_copies(v_full + at.stage) : arrive(v_full + at.stage);
    }
#if RA_STATE_IN
    for (int i = thread, row = unknown(tile) * BQ + i; i < BQ && row < rows.count(); i += WARPGROUP, row += WARPGROUP) {
      prefetch_state(rows.place(row), acc_in, m_in, l_in);
    }
#endif
    wait_for_copies();
  } else { // computes
    take_registers<RA_ROW_REGISTERS>();
    const int lane = threadIdx.x % 32, first_row = tile * BQ + 16 * (threadIdx.x / 32) + lane / 4;
    load_queries<BQ, SWIZZLED, WARPGROUP>(q_tile, queries, queries_shape, queries_strides, rows, tile * BQ, 64 * group,
                                          64);
    float acc[1][BV / 8][4], m[2], l[2]; // l: of this lane's columns alone, until the end
    clear_state(acc, m, l);
    wait_for_copies(); // of queries
    publish_to_products();
    meet(ROWS_LOADED + group, WARPGROUP);

    float s[1][BK / 8][4], kept[2];
    unsigned p[BK / 16][4], seen[1][(BK + 63) / 64];
    Slot at{0, 0}; // of the tile whose scores are taken
    bool full, grown;

    const unsigned q_low = description_of(q_tile + 64 * PANEL * group), k_low = description_of(k_tiles);
    const unsigned v_low = description_of(v_tiles, BK * PANEL * sizeof(RA_T));
    auto await = [&](unsigned long long* there, const Slot& at) {
      wait_for(there + at.stage, at.parity);
      publish_to_products();
    };
    auto begin_scores = [&] {
      begin_products();
      multiply_rows_of<BQ, BK, BD>(s[0], q_low, k_low, at.stage * K_SIZE);
      commit_products();
    };
    auto begin_sums = [&](const Slot& at) {
      begin_products();
      multiply_weights_of<BK>(acc[0], p, v_low, at.stage * V_SIZE);
      commit_products();
    };
    auto release = [&](unsigned long long* free, const Slot& at) {
      if (lane < RA_ARRIVALS) {
        arrive(free + at.stage);
      }
    };
    auto take_softmax = [&](int kb) {
      pin(s[0]);
      release(k_free, at);
#if RA_SEGMENTS
      const bool same = all_same(q_bounds, bounds_of(k_bounds, kb));
#else
      constexpr bool same = true;
#endif
      full = !RA_MASK && same && kb >= full_first && kb < full_last;
      if (full) {
        finish_scores(s, rules, false); // the scale, which is not below 0, waits for the softmax
        grown = weigh(s, m, l, kept, RA_SOFTCAP ? 1.0f : rules.scale);
        pin(s[0]);
      } else {
        wait_for_products<0>(); // the rules need the registers
        finish_scores(s, rules, true);
        hide(s, seen, rules, rows, first_row, kb * BK, min(k_len - kb * BK, BK));
        grown = weigh(s, m, l, kept, 1.0f);
      }
    };
    auto take_weights = [&] {
      if (grown) {
        shrink(acc, kept);
      }
      if (!full) {
        RA_T* v_tile = v_tiles + at.stage * V_SIZE;
        wait_for(v_full + at.stage, at.parity);
        if (meet_or(ALL_ROWS, THREADS, finds_odd<BK, BV, SWIZZLED>(v_tile))) {
          add_odd_values<BK, SWIZZLED>(acc, seen, v_tile);
          meet(ALL_ROWS, THREADS);
          clear_odd<BK, BV, SWIZZLED>(v_tile);
          publish_to_products();
          meet(ALL_ROWS, THREADS);
        }
      }
      pack(p, s[0]);
    };
    if (RA_TURNS && group == GROUPS - 1) {
      pass(TURN, 2 * WARPGROUP);
    }
    if (first < last) {
      await(k_full, at);
      begin_scores();
      wait_for_products<0>();
      take_softmax(first);
      take_weights();
      for (int kb = after(first); kb < last; kb = after(kb)) {
        const Slot before = at;
        at.step<RA_STAGES>();
        await(k_full, at);
        if (RA_TURNS) {
          meet(TURN + group, 2 * WARPGROUP);
        }
        begin_scores();
        await(v_full, before);
        begin_sums(before);
        if (RA_TURNS) {
          pass(TURN + (group + 1) % GROUPS, 2 * WARPGROUP);
        }
        wait_for_products<1>();
        take_softmax(kb);
        wait_for_products<0>();
        pin(acc[0]);
        release(v_free, before);
        take_weights();
      }
      await(v_full, at);
      begin_sums(at);
      wait_for_products<0>();
      pin(acc[0]);
    }
#if RA_TAIL
    if (splits > 1) {
      const int rows_of = unknown((block - whole) * GROUPS + group); // 64 rows of a tile that is cut
      float* sums = parts + static_cast<long long>(rows_of) * runs * (4 * (BV / 8 + 1) * WARPGROUP);
      if (!join_runs(acc, m, l, sums, const_cast<int*>(arrived) + rows_of, split, runs, ROWS_LOADED + group)) {
        return;
      }
    }
#endif
    const int stored_row = unknown(first_row);
#if RA_STATE_IN
    RA_UNROLL
    for (int r = 0; r < 2; r++) {
      const int row = stored_row + 8 * r;
      if ((RA_TAIL || split == 0) && row < rows.count()) {
        add_state(acc, m, l, r, rows.place(row), acc_in, m_in, l_in);
      }
    }
#endif
    store_results(results, rows, stored_row, acc, m, l);
  }
