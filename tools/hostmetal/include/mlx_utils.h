// The names of MLX's `utils.h`, which MLX puts before every custom kernel, that kernels use.

#pragma once

#include "metal_words.h"

typedef half float16_t;
typedef bfloat bfloat16_t;
#define MTL_CONST constant
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")

template <typename U, typename = void>
struct Limits {
  static constexpr constant U max = metal::numeric_limits<U>::max();
  static constexpr constant U min = metal::numeric_limits<U>::min();
  static constexpr constant U finite_max = max;
  static constexpr constant U finite_min = min;
};
template <typename U>
struct Limits<U, metal::enable_if_t<metal::is_floating_point_v<U>>> {
  static constexpr constant U max = metal::numeric_limits<U>::infinity();
  static constexpr constant U min = -metal::numeric_limits<U>::infinity();
  static constexpr constant U finite_max = metal::numeric_limits<U>::max();
  static constexpr constant U finite_min = -metal::numeric_limits<U>::max();
};
template <>
struct Limits<bool, void> {
  static constexpr constant bool max = true;
  static constexpr constant bool min = false;
};

template <typename T, typename U>
METAL_FUNC T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}

template <typename Index = int64_t>
METAL_FUNC Index elem_to_loc(Index elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  Index at = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    at += (elem % shape[i]) * Index(strides[i]);
    elem /= shape[i];
  }
  return at;
}
