// The tensor operations of Metal 4 that attention uses: products of 16 x 16 and 16 x 32 matrices by one simdgroup, with
// operands in registers.
//
// Apple calls the layout opaque. MLX's own kernels rely on this one: of a 16 x 16 fragment a lane has the rows `fm` and
// `fm + 8` and the columns `fn` to `fn + 3`. B and C are two adjacent fragments along n.

#pragma once

#include "metal_words.h"

HOSTMETAL_MEET metal::vec<float, 16> hostmetal_tensor(
    metal::vec<float, 8> a, metal::vec<float, 16> b, metal::vec<float, 16> c, int transposed, int place);

namespace metal {
struct execution_simdgroup {};
} // namespace metal

namespace mpp {
namespace tensor_ops {

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };

  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;

  constexpr matmul2d_descriptor(
      int m, int n, int k, bool transpose_left = false, bool transpose_right = false, bool relaxed_precision = false,
      mode matmul_mode = mode::multiply)
      : m(m),
        n(n),
        k(k),
        transpose_left(transpose_left),
        transpose_right(transpose_right),
        relaxed_precision(relaxed_precision),
        matmul_mode(matmul_mode) {}

  // So that a descriptor can be a template argument.
  constexpr operator long() const {
    return m | n << 8 | k << 16 | long(transpose_left) << 24 | long(transpose_right) << 25 |
        long(relaxed_precision) << 26 | long(matmul_mode) << 27;
  }
};

template <typename T, int CAPACITY>
struct cooperative_tensor {
  using element_type = T;
  metal::vec<T, CAPACITY> elements;

  static constexpr ushort get_capacity() { return CAPACITY; }
  // clang has no reference to an element of a vector
  METAL_FUNC T& operator[](ushort i) { return reinterpret_cast<T*>(&elements)[i]; }
  METAL_FUNC T operator[](ushort i) const { return elements[i]; }
};

template <long DESCRIPTOR, typename Scope>
struct matmul2d {
  static constexpr bool transpose_left = DESCRIPTOR >> 24 & 1, transpose_right = DESCRIPTOR >> 25 & 1;
  static constexpr bool relaxed = DESCRIPTOR >> 26 & 1, accumulate = DESCRIPTOR >> 27 & 1;
  static_assert((DESCRIPTOR & 0xffffff) == (16 | 32 << 8 | 16 << 16), "only 16 x 32 x 16 is known here");
  static_assert(__is_same(Scope, execution_simdgroup), "only one simdgroup at a time");

  template <typename A, typename B, typename C>
  METAL_FUNC cooperative_tensor<A, 8> get_left_input_cooperative_tensor() const {
    return {};
  }
  template <typename A, typename B, typename C>
  METAL_FUNC cooperative_tensor<B, 16> get_right_input_cooperative_tensor() const {
    return {};
  }
  template <typename Left, typename Right, typename C>
  METAL_FUNC cooperative_tensor<C, 16> get_destination_cooperative_tensor() const {
    return {};
  }

  // Convert an element as the matrix units do: with relaxed precision a float keeps 10 bits of its fraction.
  template <typename T>
  METAL_FUNC static float operand(T x) {
    if constexpr (__is_same(T, float) && relaxed) {
      const uint bits = as_type<uint>(x);
      return x != x ? x : as_type<float>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
    } else {
      return float(x);
    }
  }

  template <typename A, typename B>
  METAL_FUNC void run(
      const cooperative_tensor<A, 8>& a,
      const cooperative_tensor<B, 16>& b,
      cooperative_tensor<float, 16>& c,
      HOSTMETAL_HERE) const {
    metal::vec<float, 8> left = {};
    metal::vec<float, 16> right = {}, sum = {};
    for (int i = 0; i < 8; i++) {
      left[i] = operand<A>(a.elements[i]);
    }
    for (int i = 0; i < 16; i++) {
      right[i] = operand<B>(b.elements[i]);
    }
    if (accumulate) {
      sum = c.elements;
    }
    c.elements = hostmetal_tensor(left, right, sum, transpose_left | transpose_right << 1, place);
  }
};

} // namespace tensor_ops
} // namespace mpp
