// Type traits and limits.

#pragma once

namespace metal {

template <typename T, T V>
struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;

template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_reference_t = __remove_reference_t(T);

// The type without its address space, which is also part of the type of a constant.
template <typename T>
struct remove_addrspace {
  using type = T;
};
template <typename T>
struct remove_addrspace<device T> {
  using type = T;
};
template <typename T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <typename T>
struct remove_addrspace<constant T> {
  using type = T;
};
template <typename T>
using remove_addrspace_t = remove_cv_t<typename remove_addrspace<remove_cv_t<T>>::type>;

template <typename T, typename U>
constexpr bool is_same_v = __is_same(T, U);
template <typename T, typename U>
struct is_same : bool_constant<__is_same(T, U)> {};
template <typename T>
constexpr bool is_integral_v = __is_integral(T);
template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
constexpr bool is_signed_v = __is_integral(T) && T(-1) < T(0);
template <typename T>
constexpr bool is_floating_point_v = __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat);
template <typename T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

template <typename To, typename From>
METAL_FUNC constexpr To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}

template <typename T, typename = void>
struct numeric_limits {
  static constexpr int digits = sizeof(T) * 8 - is_signed_v<T>;
  static constexpr bool is_signed = is_signed_v<T>;
  static constexpr T max() { return is_signed ? T((1ul << (sizeof(T) * 8 - 1)) - 1) : T(~T(0)); }
  static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};

template <typename T, typename Bits, Bits MAX, Bits MIN, Bits EPSILON, Bits INF, Bits NOT_A_NUMBER>
struct float_limits {
  static constexpr bool is_signed = true;
  static constexpr T max() { return bits_as<T>(MAX); }
  static constexpr T lowest() { return -max(); }
  static constexpr T min() { return bits_as<T>(MIN); }
  static constexpr T epsilon() { return bits_as<T>(EPSILON); }
  static constexpr T infinity() { return bits_as<T>(INF); }
  static constexpr T quiet_NaN() { return bits_as<T>(NOT_A_NUMBER); }
};
template <>
struct numeric_limits<float>
    : float_limits<float, uint, 0x7f7fffff, 0x00800000, 0x34000000, 0x7f800000, 0x7fc00000> {};
template <>
struct numeric_limits<half> : float_limits<half, ushort, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00> {};
template <>
struct numeric_limits<bfloat> : float_limits<bfloat, ushort, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0> {};

} // namespace metal

template <typename To, typename From>
METAL_FUNC constexpr To as_type(const From& from) {
  return metal::bits_as<To>(from);
}

// A cast in parentheses: the source is rewritten from `(device T*)p` to `hostmetal_cast<device T*>{} ->* p`, because
// clang's own cast lets a pointer change its address space.
template <typename P>
struct hostmetal_space {
  static constexpr int value = 0;
};
template <typename T>
struct hostmetal_space<device T*> {
  static constexpr int value = 1;
};
template <typename T>
struct hostmetal_space<threadgroup T*> {
  static constexpr int value = 2;
};
template <typename T>
struct hostmetal_space<constant T*> {
  static constexpr int value = 3;
};
template <typename P, typename Q>
METAL_FUNC P hostmetal_checked_cast(Q q) {
  static_assert(
      !__is_pointer(Q) || hostmetal_space<P>::value == hostmetal_space<Q>::value,
      "a cast must not change the address space");
  return (P)q;
}
template <typename P>
struct hostmetal_cast {
  struct dereferenced { // `*(device T*)p`: the star binds first
    template <typename Q>
    METAL_FUNC auto& operator->*(Q q) const {
      return *hostmetal_checked_cast<P>(q);
    }
  };
  template <typename Q>
  METAL_FUNC P operator->*(Q q) const {
    return hostmetal_checked_cast<P>(q);
  }
  METAL_FUNC dereferenced operator*() const { return {}; }
};

constexpr half operator""h(long double x) {
  return half(x);
}
constexpr bfloat operator""bf(long double x) {
  return bfloat(x);
}
