// The elementwise work of the gradient: from a block of scores q k^T and of dout v^T, the weights p and the gradient with
// respect to q k^T (the formulas are in ringattn/core/gradients.py). Arrays are [B, H, queries, keys]. A thread computes
// RUN adjacent elements of a row. Threads beyond the last row do nothing.

  constexpr short RUN = 4;

  const int q_len = scores_shape[2], k_len = scores_shape[3], heads = scores_shape[1];
  const int threads = (k_len + RUN - 1) / RUN; // for each row
  const int key = thread_position_in_grid.x % threads * RUN;
  const long row = thread_position_in_grid.x / threads;
  if (row >= long(scores_shape[0]) * heads * q_len) {
    return;
  }
  const int token = row % q_len, head = row / q_len % heads, batch = row / q_len / heads;
  const float own_lse = lse[row], own_delta = delta[row];
  const float scale = numbers[0];
#if RA_BAND
  const int q_at = query_at[token];
  const int low = shifted(q_at, limits[0] == RA_INT_MIN ? -(1l << 33) : limits[0]);
  const int high = shifted(q_at, limits[1] == RA_INT_MAX ? 1l << 33 : limits[1]);
#endif
#if RA_SEGMENTS
  const int q_id = query_ids[long(batch) * q_len + token];
#endif
#if RA_MASK
  const long mask_row = batch * mask_strides[0] + head * mask_strides[1] + token * mask_strides[2];
#endif

  RA_UNROLL
  for (short e = 0; e < RUN; e++) {
    const int j = key + e;
    if (j >= k_len) {
      break;
    }
    const long at = row * k_len + j;
    float s = scores[at] * scale, slope = scale;
    if (SOFTCAP) {
      const float capped = metal::precise::tanh(s / numbers[1]);
      s = numbers[1] * capped;
      slope *= 1 - capped * capped;
    }
    bool sees = true;
#if RA_BAND
    const int position = key_at[j];
    sees = sees & (position >= low) & (position <= high);
#endif
#if RA_SEGMENTS
    const int id = key_ids[long(batch) * k_len + j];
    sees = sees & (id == q_id) & (id >= 0);
#endif
#if RA_MASK == 1
    sees = sees && mask[mask_row + j * mask_strides[3]];
#elif RA_MASK == 2
    const float added = mask[mask_row + j * mask_strides[3]];
    sees = sees && added != -INFINITY;
    s += added;
#endif
    const float p = sees ? metal::fast::exp2((s - own_lse) * RA_LOG2E) : 0.0f;
    const float dscore = sees ? p * (dweights[at] - own_delta) : 0.0f;
    weights[at] = p;
    dproducts[at] = sees ? dscore * slope : 0.0f; // the slope of a hidden pair may be NaN
#if RA_MASK == 2
    dmask[at] = dscore;
#endif
  }
