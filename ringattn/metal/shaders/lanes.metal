// The elements that one lane of a simdgroup holds, and reductions over lanes.

#define RA_FUNC inline __attribute__((__always_inline__))
#define RA_UNROLL _Pragma("clang loop unroll(full)")

constant constexpr const float RA_LOG2E = 1.44269504088896340736f;
constant constexpr const int RA_INT_MAX = 2147483647;
constant constexpr const int RA_INT_MIN = -2147483647 - 1;

// A simdgroup holds RA_ROWS rows of scores and of the output. A lane holds these elements of them. With simdgroup matrices
// of 8 x 8: in row `row` two columns of each matrix. With the M5's fragments of 16 x 16: in rows `row` and `row + 8` four
// columns of each fragment. (MLX's own kernels assume this too; Apple does not document it.)
struct Lane {
  short row;
  short column;
};

#if RA_TENSOR
constant constexpr const short RA_ROWS = 16, RA_LANE_ROWS = 2, RA_RUN = 4;

RA_FUNC constexpr short row_of(short element) {
  return element / 4 % 2;
}
RA_FUNC constexpr short column_of(short element) {
  return element / 8 * 16 + element % 4;
}
#else
constant constexpr const short RA_ROWS = 8, RA_LANE_ROWS = 1, RA_RUN = 2;

RA_FUNC constexpr short row_of(short) {
  return 0;
}
RA_FUNC constexpr short column_of(short element) {
  return element / 2 * 8 + element % 2;
}
#endif

RA_FUNC Lane lane_at(ushort lane) {
  const short quad = lane / 4;
  return Lane{short((quad & 4) + (lane / 2) % 4), short(((quad & 2) + lane % 2) * RA_RUN)};
}

// The lanes that share a row differ in bits 0 and 3.
RA_FUNC float row_max(float x) {
  x = metal::max(x, metal::simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, metal::simd_shuffle_xor(x, ushort(8)));
}

RA_FUNC float row_sum(float x) {
  x += metal::simd_shuffle_xor(x, ushort(1));
  return x + metal::simd_shuffle_xor(x, ushort(8));
}

// exp(x - top). Where top = -inf (no visible key so far) every weight is 0.
RA_FUNC float weight(float x, float top) {
  return metal::fast::exp2((x - (top == -INFINITY ? 0.0f : top)) * RA_LOG2E);
}

// x + by, clamped to int32.
RA_FUNC int shifted(int x, long by) {
  return int(metal::clamp(long(x) + by, long(RA_INT_MIN), long(RA_INT_MAX)));
}
