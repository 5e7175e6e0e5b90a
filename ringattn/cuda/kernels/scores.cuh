// The scores of a tile of keys, their softmax and the state that it changes, as the lanes of a warp hold them: fragments
// of 16 rows x 8 columns, of which a lane has two neighbours in row lane / 4 and two in row lane / 4 + 8.

// The query rows of a tile: tokens x RA_G heads. Rows that do not exist stand in for the last one.
struct Rows {
  int batch, heads, first_head, q_len;

  RA_FUNC int count() const {
    return q_len * RA_G;
  }
  RA_FUNC int head(int row) const {
    return first_head + row % RA_G;
  }
  // Where a row is in arrays of one number for each [batch, head, token]
  RA_FUNC long long place(int row) const {
    return (static_cast<long long>(batch) * heads + head(row)) * q_len + row / RA_G;
  }
};

// Load `count` rows of a tile of COUNT, from its row `from` on, by BY threads; `first` is the tile's first row.
template <int COUNT, int LD, int BY, typename Shape, typename Strides>
RA_FUNC void load_queries(RA_T* tile, const RA_T* queries, const Shape& shape, const Strides& strides, const Rows& rows,
                          int first, int from = 0, int count = COUNT) {
  const bool parts = in_parts(queries, shape, strides, RA_D);
  constexpr int WIDTH = BD / PART;
  queries += rows.batch * strides[0];
  for (int i = threadIdx.x % BY; i < count * WIDTH; i += BY) {
    const int row = first + from + i / WIDTH, d = i % WIDTH * PART;
    const RA_T* x = queries + rows.head(row) * strides[1] + row / RA_G * strides[2];
    RA_T* to = tile + place<COUNT, LD>(from + i / WIDTH, d);
    if (parts) {
      const bool there = row < rows.count() && d < RA_D;
      copy_async(to, there ? x + d : queries, there);
    } else {
      for (int e = 0; e < PART; e++) {
        to[e] = row < rows.count() && d + e < RA_D ? x[(d + e) * strides[3]] : RA_T(0.0f);
      }
    }
  }
}

// What decides which keys a row sees. Pointers are those of this batch.
struct Rules {
  float scale, softcap;
#if RA_BAND
  const int *query_at, *key_at, *limits;
#endif
#if RA_SEGMENTS
  const int *query_ids, *key_ids;
#endif
#if RA_MASK
  const RA_MASK_T* mask;
  long long mask_head, mask_row, mask_key; // strides
#endif
#if RA_COLUMNS
  const int* mask_columns;
#endif
};

// Where the results of this run of keys go
struct Results {
#if RA_STATE_OUT
  float *acc, *m, *l;
#else
  RA_OUT* out;
#if RA_LSE
  float* lse;
#endif
#if RA_SINKS
  const float* sinks;
#endif
#endif
};

RA_FUNC int within_int(long long x) {
  return static_cast<int>(min(max(x, static_cast<long long>(LEAST_INT)), static_cast<long long>(MOST_INT)));
}

// Products to scores, but for the scale if that waits for the softmax.
template <int F, int N>
RA_FUNC void finish_scores(float (&s)[F][N][4], const Rules& rules, bool with_scale) {
  if (with_scale || RA_SOFTCAP) {
    RA_UNROLL
    for (int e = 0; e < 4 * F * N; e++) {
      float& x = s[e / (4 * N)][e / 4 % N][e % 4];
      x *= rules.scale;
#if RA_SOFTCAP
      x = rules.softcap * tanhf(x / rules.softcap);
#endif
    }
  }
}

// Make the scores of keys that a row does not see -inf. `here` keys from `key` on are in this tile, and `first_row` is the
// first of this lane. `seen` gets a bit for each score.
template <int F, int N, int WORDS>
RA_FUNC void hide(float (&s)[F][N][4], unsigned (&seen)[F][WORDS], const Rules& rules, const Rows& rows, int first_row,
                  int key, int here) {
  const int lane = threadIdx.x % 32;
  RA_UNROLL
  for (int i = 0; i < F * WORDS; i++) {
    seen[i / WORDS][i % WORDS] = 0;
  }
  RA_UNROLL
  for (int r = 0; r < 2 * F; r++) {
    const int row = min(first_row + 8 * r, rows.count() - 1), token = row / RA_G;
#if RA_BAND
    const long long q_at = rules.query_at[token];
    const int low = rules.limits[0] == LEAST_INT ? LEAST_INT : within_int(q_at + rules.limits[0]);
    const int high = rules.limits[1] == MOST_INT ? MOST_INT : within_int(q_at + rules.limits[1]);
#endif
#if RA_SEGMENTS
    const int q_id = rules.query_ids[token];
#endif
#if RA_MASK
    const auto* mask_row = rules.mask + rows.head(row) * rules.mask_head + token * rules.mask_row;
#endif
    RA_UNROLL
    for (int e = 0; e < 2 * N; e++) {
      const int j = e / 2, c = e % 2, column = 8 * j + lane % 4 * 2 + c;
      bool sees = column < here;
      const int at = key + (sees ? column : 0);
      float& x = s[r / 2][j][r % 2 * 2 + c];
#if RA_BAND
      const int k_at = rules.key_at[at];
      sees = sees & (k_at >= low) & (k_at <= high);
#endif
#if RA_SEGMENTS
      const int id = rules.key_ids[at];
      sees = sees & (id == q_id) & (id >= 0);
#endif
#if RA_COLUMNS
      const long long mask_at = rules.mask_columns[at] * rules.mask_key;
#elif RA_MASK
      const long long mask_at = at * rules.mask_key;
#endif
#if RA_MASK == 1
      sees = sees && mask_row[mask_at];
#elif RA_MASK == 2
      const float added = sees ? float(mask_row[mask_at]) : 0.0f;
      sees = sees && added != -RA_INFINITY;
      x += added;
#endif
      x = sees ? x : -RA_INFINITY;
      seen[r / 2][j / 8] |= unsigned(sees) << (4 * (j % 8) + r % 2 * 2 + c);
    }
  }
}

// Online softmax: scores, still without `factor`, to weights. `m` and `l`, the sums of this lane's columns, follow; `kept`
// is what is left of earlier sums. Return whether a maximum of this warp has grown. Two chains hide some latency.
template <int F, int N, int ROWS>
RA_FUNC bool weigh(float (&s)[F][N][4], float (&m)[ROWS], float (&l)[ROWS], float (&kept)[ROWS], float factor) {
  bool grown = false;
  float tops[ROWS][2];
  RA_UNROLL
  for (int e = 0; e < N; e++) {
    RA_UNROLL
    for (int r = 0; r < 2 * ROWS; r++) {
      const float x = s[r / 4][e][r % 4];
      tops[r / 2][r % 2] = e == 0 ? x : fmaxf(tops[r / 2][r % 2], x);
    }
  }
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const float top = fmaxf(m[r], quad_max(fmaxf(tops[r][0], tops[r][1])) * factor);
    kept[r] = weight(m[r], top);
    grown |= m[r] != top;
    m[r] = top;
  }
  float sums[ROWS][2];
  RA_UNROLL
  for (int e = 0; e < N; e++) {
    RA_UNROLL
    for (int r = 0; r < 2 * ROWS; r++) {
      float& x = s[r / 4][e][r % 4];
      x = tile_weight(x, m[r / 2], factor);
      sums[r / 2][r % 2] = e == 0 ? x : sums[r / 2][r % 2] + x;
    }
  }
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    l[r] = l[r] * kept[r] + (sums[r][0] + sums[r][1]);
  }
  return __any_sync(ALL_LANES, grown);
}

template <int F, int W, int ROWS>
RA_FUNC void shrink(float (&acc)[F][W][4], const float (&kept)[ROWS]) {
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    RA_UNROLL
    for (int i = 0; i < 2 * W; i++) {
      acc[r / 2][i / 2][r % 2 * 2 + i % 2] *= kept[r];
    }
  }
}

// The state of a row that has seen no key
template <int F, int W, int ROWS>
RA_FUNC void clear_state(float (&acc)[F][W][4], float (&m)[ROWS], float (&l)[ROWS]) {
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    m[r] = -RA_INFINITY;
    l[r] = 0;
    RA_UNROLL
    for (int i = 0; i < 2 * W; i++) {
      acc[r / 2][i / 2][r % 2 * 2 + i % 2] = 0;
    }
  }
}

// What is left of two sums where they meet.
struct Weights {
  float own, other;
};

// Let a row's maximum be the larger of it and another one.
RA_FUNC Weights join_maximum(float& m, float other) {
  const float top = fmaxf(m, other), own = weight(m, top);
  m = top;
  return {own, weight(other, top)};
}

// Add what earlier keys left of row `r` of this lane, at `place` of the arrays. A kernel that began with it would wait
// for memory before its first product, and the compiler would order its loop worse.
template <int F, int W, int ROWS>
RA_FUNC void add_state(float (&acc)[F][W][4], float (&m)[ROWS], float (&l)[ROWS], int r, long long place,
                       const float* acc_in, const float* m_in, const float* l_in) {
  const int lane = threadIdx.x % 32;
  const Weights weights = join_maximum(m[r], m_in[place]);
  l[r] = l[r] * weights.own + (lane % 4 == 0 ? l_in[place] * weights.other : 0.0f);
  RA_UNROLL
  for (int i = 0; i < W; i++) {
    const int d = i * 8 + lane % 4 * 2;
    const auto two = load_two<RA_DV>(acc_in + place * RA_DV + d, RA_DV - d);
    float &first = acc[r / 2][i][r % 2 * 2], &second = acc[r / 2][i][r % 2 * 2 + 1];
    first = first * weights.own + two.first * weights.other;
    second = second * weights.own + two.second * weights.other;
  }
}

// Bring what earlier keys left of a row, at `place` of the arrays, into the L2 cache.
RA_FUNC void prefetch_state(long long place, const float* acc_in, const float* m_in, const float* l_in) {
  for (int d = 0; d < RA_DV; d += 32) {
    prefetch(acc_in + place * RA_DV + d);
  }
  prefetch(m_in + place);
  prefetch(l_in + place);
}

// Store this lane's sums of row `r`, times `factor`.
template <int F, int W, typename T>
RA_FUNC void store_sums(T* to, const float (&acc)[F][W][4], int r, float factor) {
  const int lane = threadIdx.x % 32;
  RA_UNROLL
  for (int i = 0; i < W; i++) {
    const int d = i * 8 + lane % 4 * 2;
    const float* two = &acc[r / 2][i][r % 2 * 2];
    const float scaled[2] = {two[0] * factor, two[1] * factor};
    store_two<RA_DV>(to + d, scaled, RA_DV - d);
  }
}

// Store what a tile ends in: its state, or the output and its log-sum-exp. Rows that do not exist are not written.
template <int F, int W, int ROWS>
RA_FUNC void store_results(const Results& to, const Rows& rows, int first_row, const float (&acc)[F][W][4],
                           const float (&m)[ROWS], const float (&l)[ROWS]) {
  RA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const int row = first_row + 8 * r;
    const long long place = rows.place(row);
    float sum = quad_sum(l[r]);
    if (row >= rows.count()) {
      continue;
    }
#if RA_STATE_OUT
    store_sums(to.acc + place * RA_DV, acc, r, 1.0f);
    if (threadIdx.x % 4 == 0) {
      to.m[place] = m[r];
      to.l[place] = sum;
    }
#else
    float top = m[r], kept = 1.0f;
#if RA_SINKS
    const float sink = to.sinks[rows.head(row)];
    top = fmaxf(m[r], sink);
    kept = weight(m[r], top);
    sum = sum * kept + weight(sink, top);
#endif
    store_sums(to.out + place * RA_DV, acc, r, sum == 0.0f ? 0.0f : kept / sum);
#if RA_LSE
    if (threadIdx.x % 4 == 0) {
      to.lse[place] = sum == 0.0f ? -RA_INFINITY : top + logf(sum);
    }
#endif
#endif
  }
}
