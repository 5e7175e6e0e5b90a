// NaN and infinity in a tile

// Whether one of the numbers in four bytes is NaN or infinity: all bits of its exponent are set.
RA_FUNC bool is_odd(unsigned word) {
#if RA_MATRIX
  constexpr unsigned exponent = RA_BFLOAT ? 0x7f80u : 0x7c00u;
  return (word & exponent) == exponent || (word >> 16 & exponent) == exponent;
#else
  return (word & 0x7f800000u) == 0x7f800000u;
#endif
}

// Whether this thread finds NaN or infinity in its part of a tile.
template <int COUNT, int WIDTH, int LD>
RA_FUNC bool finds_odd(const RA_T* x) {
  bool odd = false;
#pragma unroll 2
  for (int i = unknown(threadIdx.x); i < COUNT * (WIDTH / PART); i += THREADS) {
    const int at = place<COUNT, LD>(i / (WIDTH / PART), i % (WIDTH / PART) * PART);
    const uint4 part = *reinterpret_cast<const uint4*>(x + at);
    odd |= is_odd(part.x) | is_odd(part.y) | is_odd(part.z) | is_odd(part.w);
  }
  return odd;
}

RA_FUNC bool is_odd(RA_T x) {
  return !(fabsf(float(x)) < RA_INFINITY);
}

// Add NaN and infinity to the sums of the rows that see them, by the bits of `seen`.
template <int BK, int LD, int F, int W, int WORDS>
RA_FUNC void add_odd_values(float (&acc)[F][W][4], const unsigned (&seen)[F][WORDS], const RA_T* v) {
  constexpr int ROWS = 2 * F;
  const int lane = threadIdx.x % 32, first = lane & ~3;
#pragma unroll 1
  for (int key = 0; key < BK; key++) {
    bool sees[ROWS];
    RA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      unsigned bits = 0;
      RA_UNROLL
      for (int i = 0; i < WORDS; i++) {
        const unsigned word = __shfl_sync(ALL_LANES, seen[r / 2][i], first + key % 8 / 2);
        bits |= key / 64 == i ? word : 0;
      }
      sees[r] = bits >> (key / 8 % 8 * 4 + r % 2 * 2 + key % 2) & 1;
    }
    RA_UNROLL
    for (int i = 0; i < 2 * W; i++) { // two neighbours of each 8 dims
      const RA_T value = v[place<BK, LD>(key, i / 2 * 8 + lane % 4 * 2 + i % 2)];
      RA_UNROLL
      for (int r = 0; r < ROWS; r++) {
        acc[r / 2][i / 2][r % 2 * 2 + i % 2] += sees[r] && is_odd(value) ? float(value) : 0.0f;
      }
    }
  }
}

// Put zeros in the place of NaN and infinity: 0 * NaN is NaN, also in the rows that do not see it.
template <int COUNT, int WIDTH, int LD>
RA_FUNC void clear_odd(RA_T* v) {
#pragma unroll 1
  for (int i = unknown(threadIdx.x); i < COUNT * WIDTH; i += THREADS) {
    RA_T& x = v[place<COUNT, LD>(i / WIDTH, i % WIDTH)];
    x = is_odd(x) ? RA_T(0.0f) : x;
  }
}

// Put zeros in the place of NaN and infinity in a row of a tile, and return whether there were any.
template <int COUNT, int WIDTH, int LD>
RA_FUNC bool clear_odd_row(RA_T* tile, int row) {
  bool odd = false;
  for (int d = 0; d < WIDTH; d++) {
    RA_T& x = tile[place<COUNT, LD>(row, d)];
    if (is_odd(x)) {
      x = RA_T(0.0f);
      odd = true;
    }
  }
  return odd;
}
