// The two matrix products of attention with the M5's matrix units (Metal 4 tensor operations). Threadgroup memory is not
// used: each simdgroup reads Q, K and V from device memory into the fragments of its lanes.

// c += a b, or c += a b^T: a is 16 x 16, b is 16 x 32 (stored as 32 x 16 where TRANSPOSED), c is 16 x 32. Where a float is
// multiplied with a half, the unit rounds the float to the precision that "relaxed" allows. P is rounded so, sums are not.
template <bool TRANSPOSED, typename A, typename B>
RA_FUNC void multiply_add(const thread A* a, const thread B* b, thread float* c) {
  constexpr auto what = mpp::tensor_ops::matmul2d_descriptor(
      16, 32, 16, false, TRANSPOSED, true, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<what, metal::execution_simdgroup> product;
  auto left = product.template get_left_input_cooperative_tensor<A, B, float>();
  auto right = product.template get_right_input_cooperative_tensor<A, B, float>();
  auto sum = product.template get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  RA_UNROLL
  for (short i = 0; i < 8; i++) {
    left[i] = a[i];
  }
  RA_UNROLL
  for (short i = 0; i < 16; i++) {
    right[i] = b[i];
    sum[i] = c[i];
  }
  product.run(left, right, sum);
  RA_UNROLL
  for (short i = 0; i < 16; i++) {
    c[i] = sum[i];
  }
}

// Copy four adjacent elements of a row, of which `count` exist. Write zeros for the others.
template <typename T, bool ALL>
RA_FUNC void fetch(thread T* to, const device T* from, long stride, short count) {
  if ((ALL || count >= 4) && stride == 1) {
    RA_UNROLL
    for (short j = 0; j < 4; j++) {
      to[j] = from[j];
    }
  } else {
    RA_UNROLL
    for (short j = 0; j < 4; j++) {
      to[j] = j < count ? from[j * stride] : T(0);
    }
  }
}

// S += Q K^T for 16 queries and 32 keys, of which `here` exist (ALL: all of them). `q` and `q_below` are the lane's rows,
// taken as zeros where they do not exist. `k` is the tile's first key.
template <typename T, short D, bool ALL>
RA_FUNC void multiply_keys(
    thread float* s,
    const device T* q,
    const device T* q_below,
    bool exists,
    bool exists_below,
    long q_stride,
    const device T* k,
    long row_stride,
    long stride,
    short here,
    Lane at) {
  RA_UNROLL
  for (short first = 0; first < D; first += 16) {
    metal::simdgroup_barrier(metal::mem_flags::mem_none); // keeps the compiler from fetching all of Q and K ahead
    constexpr bool whole = D % 16 == 0;
    const short d = first + at.column, count = D - d;
    T queries_of[8], keys_of[16];
    fetch<T, false>(queries_of, q + d * q_stride, q_stride, exists ? count : 0);
    fetch<T, false>(queries_of + 4, q_below + d * q_stride, q_stride, exists_below ? count : 0);
    RA_UNROLL
    for (short r = 0; r < 4; r++) {
      const short key = at.row + 8 * r;
      fetch<T, whole && ALL>(keys_of + 4 * r, k + key * row_stride + d * stride, stride, ALL || key < here ? count : 0);
    }
    multiply_add<true>(queries_of, keys_of, s);
  }
}

// O += P V for 16 queries and 32 keys. Where V has NaN or infinities in a partial tile, the rows that see them get NaN, and
// no other row gets 0 * NaN. Bit e of `seen` says whether the lane's row sees its key in element e of P.
template <typename T, short DV, short BV, bool ALL>
RA_FUNC void multiply_values(
    thread float* o, const thread float* p, const device T* v, long row_stride, long stride, short here, ushort seen, Lane at) {
  RA_UNROLL
  for (short first = 0; first < BV; first += 32) {
    metal::simdgroup_barrier(metal::mem_flags::mem_none);
    thread float* sum = o + first / 2;
    RA_UNROLL
    for (short half_of = 0; half_of < 2; half_of++) { // 16 keys
      constexpr bool whole = DV % 32 == 0;
      T values_of[16];
      RA_UNROLL
      for (short r = 0; r < 4; r++) {
        const short key = 16 * half_of + at.row + r % 2 * 8, d = first + r / 2 * 16 + at.column;
        fetch<T, whole && ALL>(
            values_of + 4 * r, v + key * row_stride + d * stride, stride, ALL || key < here ? DV - d : 0);
      }
      if (!ALL) {
        T bad[16], sees[8];
        float hits[16];
        bool nonfinite = false;
        RA_UNROLL
        for (short i = 0; i < 16; i++) {
          const bool fine = metal::isfinite(float(values_of[i]));
          bad[i] = T(fine ? 0 : 1);
          values_of[i] = fine ? values_of[i] : T(0);
          nonfinite |= !fine;
          hits[i] = 0;
        }
        if (metal::simd_max(int(nonfinite)) > 0) {
          RA_UNROLL
          for (short i = 0; i < 8; i++) {
            sees[i] = T((seen >> (8 * half_of + i)) & 1);
          }
          multiply_add<false>(sees, bad, hits);
          RA_UNROLL
          for (short i = 0; i < 16; i++) {
            sum[i] = hits[i] > 0 ? NAN : sum[i];
          }
        }
      }
      multiply_add<false>(p + 8 * half_of, values_of, sum);
    }
  }
}
