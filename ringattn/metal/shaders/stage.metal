// Copies from device memory to threadgroup memory. All return whether any copied element is NaN or infinite.

// Copy N elements of one row, of which `count` exist. Write zeros for the others.
template <typename T, short N, short STEP>
RA_FUNC bool stage_row(threadgroup T* to, const device T* from, long stride, short count) {
  bool nonfinite = false;
  if (count >= N && stride == 1) {
    RA_UNROLL
    for (short j = 0; j < N; j++) {
      const T x = from[j];
      to[j * STEP] = x;
      nonfinite |= !metal::isfinite(float(x));
    }
  } else {
    RA_UNROLL
    for (short j = 0; j < N; j++) {
      const T x = j < count ? from[j * stride] : T(0);
      to[j * STEP] = x;
      nonfinite |= !metal::isfinite(float(x));
    }
  }
  return nonfinite;
}

// Copy ROWS rows of D elements, of which `rows` exist, padded with zeros to COLS. Element (i, j) goes to i * ROW + j * STEP.
// Each thread copies part of a row, so that adjacent threads read adjacent memory.
template <typename T, short ROWS, short COLS, short D, short THREADS, short ROW, short STEP>
RA_FUNC bool stage(threadgroup T* to, const device T* from, long row_stride, long stride, short rows, short thread_id) {
  constexpr short PIECES = (THREADS < 128 ? 128 : THREADS) / ROWS;
  constexpr short N = COLS / PIECES;
  const short column = thread_id % PIECES * N;
  bool nonfinite = false;
  RA_UNROLL
  for (short first = 0; first < ROWS; first += THREADS / PIECES) {
    const short row = first + thread_id / PIECES;
    const short count = row < rows ? D - column : 0;
    nonfinite |= stage_row<T, N, STEP>(to + row * ROW + column * STEP, from + row * row_stride + column * stride, stride, count);
  }
  return nonfinite;
}
