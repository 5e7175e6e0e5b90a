// What one lane of a simdgroup holds, and how lanes work together.

#define RA_FUNC inline __attribute__((__always_inline__))
#define RA_UNROLL _Pragma("clang loop unroll(full)")

constant constexpr const float RA_LOG2E = 1.44269504088896340736f;
constant constexpr const int RA_INT_MAX = 2147483647;
constant constexpr const int RA_INT_MIN = -2147483647 - 1;

// Of an 8 x 8 simdgroup matrix a lane holds two elements: row `row`, columns `column` and `column + 1`.
struct Lane {
  short row;
  short column;
};

RA_FUNC Lane lane_at(ushort lane) {
  const short quad = lane / 4;
  return Lane{short((quad & 4) + (lane / 2) % 4), short((quad & 2) * 2 + (lane % 2) * 2)};
}

// a b + c for 8 x 8 matrices, each given by the lane's two elements.
RA_FUNC float2 multiply_add(float2 a, float2 b, float2 c) {
  metal::simdgroup_matrix<float, 8, 8> A, B, C;
  reinterpret_cast<thread float2&>(A.thread_elements()) = a;
  reinterpret_cast<thread float2&>(B.thread_elements()) = b;
  reinterpret_cast<thread float2&>(C.thread_elements()) = c;
  metal::simdgroup_multiply_accumulate(C, A, B, C);
  return reinterpret_cast<thread float2&>(C.thread_elements());
}

// The lanes that share a row of a matrix differ in bits 0 and 3.
RA_FUNC float row_max(float x) {
  x = metal::max(x, metal::simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, metal::simd_shuffle_xor(x, ushort(8)));
}

RA_FUNC float row_sum(float x) {
  x += metal::simd_shuffle_xor(x, ushort(1));
  return x + metal::simd_shuffle_xor(x, ushort(8));
}

// exp(x - top), where top = -inf (no key seen so far) makes every weight 0.
RA_FUNC float weight(float x, float top) {
  return metal::fast::exp2((x - (top == -INFINITY ? 0.0f : top)) * RA_LOG2E);
}

// x + by, held within int32.
RA_FUNC int shifted(int x, long by) {
  return int(metal::clamp(long(x) + by, long(RA_INT_MIN), long(RA_INT_MAX)));
}
