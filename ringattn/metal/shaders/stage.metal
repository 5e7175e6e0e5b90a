// From device memory into threadgroup memory.

// N elements of one row, of which `count` exist; zeros for the others. True if any of them is NaN or infinite.
template <typename T, short N, short STEP>
RA_FUNC bool stage_row(threadgroup T* to, const device T* from, long stride, short count) {
  bool spoiled = false;
  if (count >= N && stride == 1) {
    RA_UNROLL
    for (short j = 0; j < N; j++) {
      const T x = from[j];
      to[j * STEP] = x;
      spoiled |= !metal::isfinite(float(x));
    }
  } else {
    RA_UNROLL
    for (short j = 0; j < N; j++) {
      const T x = j < count ? from[j * stride] : T(0);
      to[j * STEP] = x;
      spoiled |= !metal::isfinite(float(x));
    }
  }
  return spoiled;
}

// ROWS rows of D elements, of which `rows` exist, padded with zeros to COLS; element (i, j) goes to i * ROW + j * STEP.
// Each thread takes a piece of a row, so that neighbours read neighbouring memory.
template <typename T, short ROWS, short COLS, short D, short THREADS, short ROW, short STEP>
RA_FUNC bool stage(threadgroup T* to, const device T* from, long row_stride, long stride, short rows, short thread_id) {
  constexpr short PIECES = (THREADS < 128 ? 128 : THREADS) / ROWS;
  constexpr short N = COLS / PIECES;
  const short column = thread_id % PIECES * N;
  bool spoiled = false;
  RA_UNROLL
  for (short first = 0; first < ROWS; first += THREADS / PIECES) {
    const short row = first + thread_id / PIECES;
    const short count = row < rows ? D - column : 0;
    spoiled |= stage_row<T, N, STEP>(to + row * ROW + column * STEP, from + row * row_stride + column * stride, stride, count);
  }
  return spoiled;
}
