// Vectors: clang's own, which have Metal's swizzles. They have no constructor `float2(a, b)`, so each name is also a macro
// for a function that makes a vector. The rewriting of the source does the same for `vec<T, N>(a, b)`.

#pragma once

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <typename V>
struct vector_traits {
  using element = V;
  static constexpr int size = 1;
};
template <typename T, int N>
struct vector_traits<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
};
template <typename V>
constexpr bool is_vector_v = vector_traits<V>::size > 1;

template <typename V, typename A>
METAL_FUNC constexpr void put(V& to, int& at, A from) {
  using T = typename vector_traits<V>::element;
  if constexpr (is_vector_v<A>) {
    for (int i = 0; i < vector_traits<A>::size; i++) {
      to[at++] = T(from[i]);
    }
  } else {
    to[at++] = T(from);
  }
}

template <typename T, int N, typename... Args>
METAL_FUNC constexpr vec<T, N> make_vec(Args... args) {
  vec<T, N> to = {};
  int at = 0;
  if constexpr (sizeof...(Args) == 1 && (!is_vector_v<Args> && ...)) {
    for (int i = 0; i < N; i++) {
      put(to, at, args...); // one scalar fills all
    }
  } else {
    static_assert(((vector_traits<Args>::size) + ... + 0) == N || sizeof...(Args) == 0, "elements of a vector");
    (put(to, at, args), ...);
  }
  return to;
}

#define HOSTMETAL_VECTORS(T)                                     \
  typedef vec<T, 2> T##2;                                        \
  typedef vec<T, 3> T##3;                                        \
  typedef vec<T, 4> T##4;                                        \
  template <typename... Args>                                    \
  METAL_FUNC constexpr T##2 make_##T##2(Args... args) {          \
    return make_vec<T, 2>(args...);                              \
  }                                                              \
  template <typename... Args>                                    \
  METAL_FUNC constexpr T##3 make_##T##3(Args... args) {          \
    return make_vec<T, 3>(args...);                              \
  }                                                              \
  template <typename... Args>                                    \
  METAL_FUNC constexpr T##4 make_##T##4(Args... args) {          \
    return make_vec<T, 4>(args...);                              \
  }

HOSTMETAL_VECTORS(bool)
HOSTMETAL_VECTORS(char)
HOSTMETAL_VECTORS(uchar)
HOSTMETAL_VECTORS(short)
HOSTMETAL_VECTORS(ushort)
HOSTMETAL_VECTORS(int)
HOSTMETAL_VECTORS(uint)
HOSTMETAL_VECTORS(long)
HOSTMETAL_VECTORS(ulong)
HOSTMETAL_VECTORS(half)
HOSTMETAL_VECTORS(float)
HOSTMETAL_VECTORS(bfloat)
#undef HOSTMETAL_VECTORS

} // namespace metal

using namespace metal;

#define bool2(...) make_bool2(__VA_ARGS__)
#define bool3(...) make_bool3(__VA_ARGS__)
#define bool4(...) make_bool4(__VA_ARGS__)
#define char2(...) make_char2(__VA_ARGS__)
#define char3(...) make_char3(__VA_ARGS__)
#define char4(...) make_char4(__VA_ARGS__)
#define uchar2(...) make_uchar2(__VA_ARGS__)
#define uchar3(...) make_uchar3(__VA_ARGS__)
#define uchar4(...) make_uchar4(__VA_ARGS__)
#define short2(...) make_short2(__VA_ARGS__)
#define short3(...) make_short3(__VA_ARGS__)
#define short4(...) make_short4(__VA_ARGS__)
#define ushort2(...) make_ushort2(__VA_ARGS__)
#define ushort3(...) make_ushort3(__VA_ARGS__)
#define ushort4(...) make_ushort4(__VA_ARGS__)
#define int2(...) make_int2(__VA_ARGS__)
#define int3(...) make_int3(__VA_ARGS__)
#define int4(...) make_int4(__VA_ARGS__)
#define uint2(...) make_uint2(__VA_ARGS__)
#define uint3(...) make_uint3(__VA_ARGS__)
#define uint4(...) make_uint4(__VA_ARGS__)
#define long2(...) make_long2(__VA_ARGS__)
#define long3(...) make_long3(__VA_ARGS__)
#define long4(...) make_long4(__VA_ARGS__)
#define ulong2(...) make_ulong2(__VA_ARGS__)
#define ulong3(...) make_ulong3(__VA_ARGS__)
#define ulong4(...) make_ulong4(__VA_ARGS__)
#define half2(...) make_half2(__VA_ARGS__)
#define half3(...) make_half3(__VA_ARGS__)
#define half4(...) make_half4(__VA_ARGS__)
#define float2(...) make_float2(__VA_ARGS__)
#define float3(...) make_float3(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)
#define bfloat2(...) make_bfloat2(__VA_ARGS__)
#define bfloat3(...) make_bfloat3(__VA_ARGS__)
#define bfloat4(...) make_bfloat4(__VA_ARGS__)
