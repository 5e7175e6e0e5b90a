// Functions of numbers, elementwise for vectors. The core counts calls of the functions that have counters.

#pragma once

extern "C" {
float hostmetal_exp(float);
float hostmetal_exp2(float);
float hostmetal_log(float);
float hostmetal_log2(float);
float hostmetal_tanh(float);
}

namespace metal {

template <typename V, typename F, typename... Vs>
METAL_FUNC constexpr V each(F f, V x, Vs... others) {
  if constexpr (is_vector_v<V>) {
    V out = {};
    for (int i = 0; i < vector_traits<V>::size; i++) {
      out[i] = f(x[i], others[i]...);
    }
    return out;
  } else {
    return f(x, others...);
  }
}

#define HOSTMETAL_FUNCTION(NAME, CALL)                                                             \
  template <typename V>                                                                            \
  METAL_FUNC V NAME(V v) {                                                                         \
    using T = typename vector_traits<V>::element;                                                  \
    static_assert(is_floating_point_v<T>, "a function of floating point numbers");                 \
    return each([](T x) __attribute__((always_inline)) { return T(CALL(float(x))); }, v);          \
  }
#define HOSTMETAL_FUNCTIONS                                    \
  HOSTMETAL_FUNCTION(exp, hostmetal_exp)                       \
  HOSTMETAL_FUNCTION(exp2, hostmetal_exp2)                     \
  HOSTMETAL_FUNCTION(log, hostmetal_log)                       \
  HOSTMETAL_FUNCTION(log2, hostmetal_log2)                     \
  HOSTMETAL_FUNCTION(tanh, hostmetal_tanh)                     \
  HOSTMETAL_FUNCTION(exp10, __builtin_exp10f)                  \
  HOSTMETAL_FUNCTION(log10, __builtin_log10f)                  \
  HOSTMETAL_FUNCTION(sqrt, __builtin_sqrtf)                    \
  HOSTMETAL_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf)            \
  HOSTMETAL_FUNCTION(sin, __builtin_sinf)                      \
  HOSTMETAL_FUNCTION(cos, __builtin_cosf)                      \
  HOSTMETAL_FUNCTION(tan, __builtin_tanf)                      \
  HOSTMETAL_FUNCTION(sinh, __builtin_sinhf)                    \
  HOSTMETAL_FUNCTION(cosh, __builtin_coshf)                    \
  HOSTMETAL_FUNCTION(floor, __builtin_floorf)                  \
  HOSTMETAL_FUNCTION(ceil, __builtin_ceilf)                    \
  HOSTMETAL_FUNCTION(round, __builtin_roundf)                  \
  HOSTMETAL_FUNCTION(rint, __builtin_rintf)                    \
  HOSTMETAL_FUNCTION(trunc, __builtin_truncf)                  \
  HOSTMETAL_FUNCTION(fabs, __builtin_fabsf)

HOSTMETAL_FUNCTIONS
namespace fast {
HOSTMETAL_FUNCTIONS
}
namespace precise {
HOSTMETAL_FUNCTIONS
}
#undef HOSTMETAL_FUNCTIONS
#undef HOSTMETAL_FUNCTION

// Ignores NaN if the other number is not NaN, like IEEE's maxNum.
template <typename V>
METAL_FUNC constexpr V max(V a, V b) {
  using T = typename vector_traits<V>::element;
  return each([](T x, T y) __attribute__((always_inline)) { return x < y || x != x ? y : x; }, a, b);
}
template <typename V>
METAL_FUNC constexpr V min(V a, V b) {
  using T = typename vector_traits<V>::element;
  return each([](T x, T y) __attribute__((always_inline)) { return y < x || x != x ? y : x; }, a, b);
}
// A number combined with a vector applies to all its elements.
template <typename V>
METAL_FUNC constexpr enable_if_t<is_vector_v<V>, V> max(V a, typename vector_traits<V>::element b) {
  return max(a, V(b));
}
template <typename V>
METAL_FUNC constexpr enable_if_t<is_vector_v<V>, V> min(V a, typename vector_traits<V>::element b) {
  return min(a, V(b));
}
template <typename V>
METAL_FUNC constexpr V fmax(V a, V b) {
  return max(a, b);
}
template <typename V>
METAL_FUNC constexpr V fmin(V a, V b) {
  return min(a, b);
}
template <typename V>
METAL_FUNC constexpr V max3(V a, V b, V c) {
  return max(max(a, b), c);
}
template <typename V>
METAL_FUNC constexpr V min3(V a, V b, V c) {
  return min(min(a, b), c);
}
template <typename V>
METAL_FUNC constexpr V clamp(V x, V low, V high) {
  return min(max(x, low), high);
}
template <typename V, typename T = typename vector_traits<V>::element>
METAL_FUNC constexpr enable_if_t<is_vector_v<V>, V> clamp(V x, T low, T high) {
  return min(max(x, low), high);
}
template <typename V>
METAL_FUNC constexpr V abs(V v) {
  using T = typename vector_traits<V>::element;
  if constexpr (is_floating_point_v<T>) {
    return fabs(v);
  } else {
    return each([](T x) __attribute__((always_inline)) { return x < 0 ? T(-x) : x; }, v);
  }
}
template <typename V>
METAL_FUNC V fma(V a, V b, V c) {
  using T = typename vector_traits<V>::element;
  return each(
      [](T x, T y, T z) __attribute__((always_inline)) { return T(__builtin_fmaf(float(x), float(y), float(z))); },
      a, b, c);
}
template <typename V>
METAL_FUNC V pow(V a, V b) {
  using T = typename vector_traits<V>::element;
  return each([](T x, T y) __attribute__((always_inline)) { return T(__builtin_powf(float(x), float(y))); }, a, b);
}
template <typename V>
METAL_FUNC V fmod(V a, V b) {
  using T = typename vector_traits<V>::element;
  return each([](T x, T y) __attribute__((always_inline)) { return T(__builtin_fmodf(float(x), float(y))); }, a, b);
}
template <typename V>
METAL_FUNC V divide(V a, V b) {
  return a / b;
}

template <typename V>
using truth = conditional_t<is_vector_v<V>, vec<uchar, is_vector_v<V> ? vector_traits<V>::size : 2>, bool>;

#define HOSTMETAL_TEST(NAME, TEST)                                                            \
  template <typename V>                                                                       \
  METAL_FUNC truth<V> NAME(V v) {                                                             \
    using T = typename vector_traits<V>::element;                                             \
    static_assert(is_floating_point_v<T>, "a question about floating point numbers");         \
    if constexpr (is_vector_v<V>) {                                                           \
      truth<V> out = {};                                                                      \
      for (int i = 0; i < vector_traits<V>::size; i++) {                                      \
        const float x = v[i];                                                                 \
        out[i] = TEST;                                                                        \
      }                                                                                       \
      return out;                                                                             \
    } else {                                                                                  \
      const float x = v;                                                                      \
      return TEST;                                                                            \
    }                                                                                         \
  }
HOSTMETAL_TEST(isnan, x != x)
HOSTMETAL_TEST(isinf, __builtin_fabsf(x) == INFINITY)
HOSTMETAL_TEST(isfinite, __builtin_fabsf(x) < INFINITY)
HOSTMETAL_TEST(isnormal, __builtin_fabsf(x) < INFINITY && __builtin_fabsf(x) >= FLT_MIN)
HOSTMETAL_TEST(signbit, (bits_as<uint>(x) >> 31) != 0)
#undef HOSTMETAL_TEST

// b where c holds, else a.
template <typename V, typename C>
METAL_FUNC constexpr V select(V a, V b, C c) {
  if constexpr (is_vector_v<V>) {
    V out = {};
    for (int i = 0; i < vector_traits<V>::size; i++) {
      out[i] = c[i] ? b[i] : a[i];
    }
    return out;
  } else {
    return c ? b : a;
  }
}
template <typename C>
METAL_FUNC bool any(C c) {
  bool found = false;
  for (int i = 0; i < vector_traits<C>::size; i++) {
    found |= bool(c[i]);
  }
  return found;
}
template <typename C>
METAL_FUNC bool all(C c) {
  bool found = true;
  for (int i = 0; i < vector_traits<C>::size; i++) {
    found &= bool(c[i]);
  }
  return found;
}
template <typename V>
METAL_FUNC auto dot(V a, V b) {
  typename vector_traits<V>::element sum = 0;
  for (int i = 0; i < vector_traits<V>::size; i++) {
    sum += a[i] * b[i];
  }
  return sum;
}

template <typename V>
METAL_FUNC V popcount(V v) {
  using T = typename vector_traits<V>::element;
  constexpr ulong mask = sizeof(T) == 8 ? ~0ul : (1ul << (sizeof(T) * 8)) - 1;
  return each([=](T x) __attribute__((always_inline)) { return T(__builtin_popcountl(ulong(x) & mask)); }, v);
}
template <typename V>
METAL_FUNC V clz(V v) {
  using T = typename vector_traits<V>::element;
  constexpr int bits = sizeof(T) * 8;
  constexpr ulong mask = bits == 64 ? ~0ul : (1ul << (bits & 63)) - 1;
  return each(
      [=](T x) __attribute__((always_inline)) {
        return x ? T(__builtin_clzl(ulong(x) & mask) - (64 - bits)) : T(bits);
      },
      v);
}
template <typename V>
METAL_FUNC V ctz(V v) {
  using T = typename vector_traits<V>::element;
  return each(
      [](T x) __attribute__((always_inline)) { return x ? T(__builtin_ctzl(ulong(x))) : T(sizeof(T) * 8); }, v);
}
template <typename V>
METAL_FUNC V mulhi(V a, V b) {
  using T = typename vector_traits<V>::element;
  using Wide = conditional_t<is_signed_v<T>, __int128, unsigned __int128>;
  return each(
      [](T x, T y) __attribute__((always_inline)) { return T((Wide(x) * Wide(y)) >> (sizeof(T) * 8)); }, a, b);
}

} // namespace metal
