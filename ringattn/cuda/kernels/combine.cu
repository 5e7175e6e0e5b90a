// Merge the states that several runs of keys left: m = max_s m_s, and l and acc are the sums of theirs, each times
// exp(m_s - m) (Dao et al., arXiv 2205.14135). One thread for each value dim of each row; states are [runs, B, H, L].

  const long long rows = static_cast<long long>(m_in_shape[1]) * m_in_shape[2] * m_in_shape[3];
  const long long place = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, row = place / RA_DV;
  const int runs = m_in_shape[0], d = place % RA_DV;
  if (row >= rows) {
    return;
  }

  float m = -__int_as_float(0x7f800000);
#pragma unroll 8
  for (int run = 0; run < runs; run++) {
    m = fmaxf(m, m_in[run * rows + row]);
  }
#if RA_SINKS
  const float sink = sinks[row / m_in_shape[3] % m_in_shape[2]];
  m = fmaxf(m, sink);
#endif
  float l = 0, acc = 0;
#pragma unroll 8
  for (int run = 0; run < runs; run++) {
    const float kept = weight(m_in[run * rows + row], m);
    l += kept * l_in[run * rows + row];
    acc += kept * acc_in[(run * rows + row) * RA_DV + d];
  }
#if RA_SINKS
  l += weight(sink, m);
#endif

#if RA_STATE_OUT
  acc_out[place] = acc;
  if (d == 0) {
    m_out[row] = m;
    l_out[row] = l;
  }
#else
  out[place] = RA_OUT(l == 0.0f ? 0.0f : acc / l);
#if RA_LSE
  if (d == 0) {
    lse[row] = l == 0.0f ? -__int_as_float(0x7f800000) : m + logf(l);
  }
#endif
#endif
