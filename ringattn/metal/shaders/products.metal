// The two matrix products of attention with simdgroup matrices, on tiles in threadgroup memory. Only the matrices of 8
// keys from `first` to `last` are used. ALL: these are all TK matrices, and the limits are not checked.

// c += a b for 8 x 8 matrices, each given by the lane's two elements.
RA_FUNC void multiply_add(float2 a, float2 b, thread float* c) {
  metal::simdgroup_matrix<float, 8, 8> A, B, C;
  reinterpret_cast<thread float2&>(A.thread_elements()) = a;
  reinterpret_cast<thread float2&>(B.thread_elements()) = b;
  reinterpret_cast<thread float2&>(C.thread_elements()) = float2(c[0], c[1]);
  metal::simdgroup_multiply_accumulate(C, A, B, C);
  const float2 sum = reinterpret_cast<thread float2&>(C.thread_elements());
  c[0] = sum.x;
  c[1] = sum.y;
}

// S += Q K^T over TD matrices of 8 head dims; `q_own` is used where Q is in registers, else `q_from`.
template <typename T, short TD, short TK, short LDK, bool OWN, bool ALL>
RA_FUNC void multiply_keys(
    thread float* s, const thread T* q_own, const threadgroup T* q_from, const threadgroup T* k_from, short first, short last) {
  RA_UNROLL
  for (short i = 0; i < TD; i++) {
    metal::simdgroup_barrier(metal::mem_flags::mem_none); // keeps the compiler from fetching all of Q and K ahead
    float2 q;
    if (OWN) {
      q = float2(q_own[2 * i], q_own[2 * i + 1]);
    } else {
      q = float2(q_from[8 * i], q_from[8 * i + 1]);
    }
    RA_UNROLL
    for (short j = 0; j < TK; j++) {
      if (ALL || (j >= first && j < last)) {
        const threadgroup T* k = k_from + 8 * i * LDK + 8 * j;
        multiply_add(q, float2(k[0], k[1]), s + 2 * j);
      }
    }
  }
}

// O += P V over TV matrices of 8 value dims.
template <typename T, short TV, short TK, short LDV, bool ALL>
RA_FUNC void multiply_values(thread float* o, const thread float* p, const threadgroup T* v_from, short first, short last) {
  RA_UNROLL
  for (short i = 0; i < TV; i++) {
    metal::simdgroup_barrier(metal::mem_flags::mem_none);
    RA_UNROLL
    for (short j = 0; j < TK; j++) {
      if (ALL || (j >= first && j < last)) {
        const threadgroup T* v = v_from + 8 * j * LDV + 8 * i;
        multiply_add(float2(p[2 * j], p[2 * j + 1]), float2(v[0], v[1]), o + 2 * i);
      }
    }
  }
}

// O += P V where V has NaN or infinities: the rows that see them get NaN, and no other row gets 0 * NaN. Bit e of `seen`
// says whether the lane's row sees its key in element e of the scores.
template <typename T, short TV, short TK, short LDV>
RA_FUNC void multiply_nonfinite_values(thread float* o, const thread float* p, const threadgroup T* v_from, ushort seen) {
  RA_UNROLL
  for (short i = 0; i < TV; i++) {
    float hits[2] = {0, 0};
    RA_UNROLL
    for (short j = 0; j < TK; j++) {
      const threadgroup T* from = v_from + 8 * j * LDV + 8 * i;
      const float2 v = float2(from[0], from[1]);
      const bool fine_x = metal::isfinite(v.x), fine_y = metal::isfinite(v.y);
      const float2 sees = float2((seen >> (2 * j)) & 1, (seen >> (2 * j + 1)) & 1);
      multiply_add(float2(p[2 * j], p[2 * j + 1]), float2(fine_x ? v.x : 0.0f, fine_y ? v.y : 0.0f), o + 2 * i);
      multiply_add(sees, float2(fine_x ? 0.0f : 1.0f, fine_y ? 0.0f : 1.0f), hits);
    }
    o[2 * i] = hits[0] > 0 ? NAN : o[2 * i];
    o[2 * i + 1] = hits[1] > 0 ? NAN : o[2 * i + 1];
  }
}
