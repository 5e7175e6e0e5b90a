// CUDA's types and functions, as far as the kernels use them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct int2 {
  int x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits_as");
  To result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}

using __half = _Float16;

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) { // to nearest, ties to even
    const uint32_t word = bits_as<uint32_t>(x);
    bits = x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};

struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 a) { return {float(a.x), float(a.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {float(a.x), float(a.y)}; }

template <typename A, typename B>
auto min(A a, B b) {
  using T = decltype(a + b);
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
auto max(A a, B b) {
  using T = decltype(a + b);
  return T(a) < T(b) ? T(b) : T(a);
}
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
template <typename T>
T __ldcg(const T* x) { return *x; }
inline void __threadfence() {}
inline int atomicAdd(int* x, int more) { return (*x += more) - more; } // blocks run one after the other
inline float exp2f_of(float x) { return std::exp2(x); }

// Shapes and strides, as MLX hands them to a kernel
template <typename T>
struct Eight {
  T values[8];
  T operator[](int i) const { return values[i]; }
};
namespace mlx::core::cu {
using Shape = Eight<int32_t>;
using Strides = Eight<int64_t>;
} // namespace mlx::core::cu
