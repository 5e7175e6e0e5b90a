// Merge the states of several runs of keys: m = max_s m_s; l and acc are the sums of all l_s and acc_s, each times
// exp(m_s - m) (Dao et al., arXiv 2205.14135). One thread computes one value dim of one row. States are [runs, B, H, L].

  const int d = thread_position_in_grid.x;
  const long row = thread_position_in_grid.y;
  if (d >= DV) {
    return;
  }
  const int runs = m_in_shape[0];
  const long rows = long(m_in_shape[1]) * m_in_shape[2] * m_in_shape[3];

  float m = -INFINITY;
  for (int run = 0; run < runs; run++) {
    m = metal::max(m, m_in[run * rows + row]);
  }
#if RA_SINKS
  const float sink = sinks[row / m_in_shape[3] % m_in_shape[2]];
  m = metal::max(m, sink);
#endif
  float l = 0, acc = 0;
  for (int run = 0; run < runs; run++) {
    const float decay = weight(m_in[run * rows + row], m);
    l += decay * l_in[run * rows + row];
    acc += decay * acc_in[(run * rows + row) * DV + d];
  }
#if RA_SINKS
  l += weight(sink, m);
#endif

#if RA_STATE_OUT
  acc_out[row * DV + d] = acc;
  if (d == 0) {
    m_out[row] = m;
    l_out[row] = l;
  }
#else
  out[row * DV + d] = Out(l == 0 ? 0.0f : acc / l);
#if RA_LSE
  if (d == 0) {
    lse[row] = l == 0 ? -INFINITY : m + metal::precise::log(l);
  }
#endif
#endif
