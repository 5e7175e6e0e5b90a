// 8 x 8 matrices of a simdgroup, with two elements in each lane.

#pragma once

HOSTMETAL_MEET metal::float2 hostmetal_multiply(metal::float2 a, metal::float2 b, metal::float2 c, int place);
HOSTMETAL_MEET void hostmetal_together(int place);

namespace metal {

template <typename T, int ROWS, int COLS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLS == 8, "only 8 x 8 matrices exist");
  vec<T, 2> elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const short2 at = place();
    elements[0] = at.y == at.x ? diagonal : T(0);
    elements[1] = at.y == at.x + 1 ? diagonal : T(0);
  }
  METAL_FUNC vec<T, 2>& thread_elements() { return elements; }
  METAL_FUNC const vec<T, 2>& thread_elements() const { return elements; }

  // Column and row of this lane's first element.
  METAL_FUNC static short2 place() {
    const short lane = hostmetal_lane();
    const short quad = lane / 4;
    return short2{short((quad & 2) * 2 + (lane % 2) * 2), short((quad & 4) + (lane / 2) % 4)};
  }
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c,
    HOSTMETAL_HERE) {
  const float2 product = hostmetal_multiply(
      float2{float(a.elements[0]), float(a.elements[1])},
      float2{float(b.elements[0]), float(b.elements[1])},
      float2{float(c.elements[0]), float(c.elements[1])},
      place);
  d.elements[0] = D(product[0]);
  d.elements[1] = D(product[1]);
}
template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b,
    HOSTMETAL_HERE) {
  simdgroup_matrix<float, 8, 8> zero;
  zero.elements[0] = zero.elements[1] = 0;
  simdgroup_multiply_accumulate(d, a, b, zero, place);
}
template <typename T, int ROWS, int COLS>
METAL_FUNC simdgroup_matrix<T, ROWS, COLS> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, ROWS, COLS> filled;
  filled.elements[0] = filled.elements[1] = value;
  return filled;
}

// The element's place in memory: `origin` is (column, row).
METAL_FUNC long matrix_place(int j, ulong per_row, ulong2 origin, bool transpose) {
  const short2 at = simdgroup_matrix<float, 8, 8>::place();
  const long column = transpose ? at.y : at.x + j, row = transpose ? at.x + j : at.y;
  return (row + long(origin[1])) * long(per_row) + column + long(origin[0]);
}

#define HOSTMETAL_LOAD_STORE(SPACE)                                                                              \
  template <typename T>                                                                                          \
  METAL_FUNC void simdgroup_load(                                                                                \
      simdgroup_matrix<T, 8, 8>& m, const SPACE T* from, ulong per_row = 8, ulong2 origin = ulong2{0, 0},        \
      bool transpose = false, HOSTMETAL_HERE) {                                                                  \
    hostmetal_together(place);                                                                                   \
    m.elements[0] = from[matrix_place(0, per_row, origin, transpose)];                                           \
    m.elements[1] = from[matrix_place(1, per_row, origin, transpose)];                                           \
  }                                                                                                              \
  template <typename T>                                                                                          \
  METAL_FUNC void simdgroup_store(                                                                               \
      const simdgroup_matrix<T, 8, 8>& m, SPACE T* to, ulong per_row = 8, ulong2 origin = ulong2{0, 0},          \
      bool transpose = false, HOSTMETAL_HERE) {                                                                  \
    hostmetal_together(place);                                                                                   \
    to[matrix_place(0, per_row, origin, transpose)] = m.elements[0];                                             \
    to[matrix_place(1, per_row, origin, transpose)] = m.elements[1];                                             \
  }
HOSTMETAL_LOAD_STORE(device)
HOSTMETAL_LOAD_STORE(threadgroup)
#undef HOSTMETAL_LOAD_STORE

} // namespace metal
