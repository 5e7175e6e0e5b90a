// What the threads of a simdgroup and of a threadgroup do together. Each is one call to the core, which holds the
// thread back until all of them are there; the attributes keep the optimiser from moving, doubling or merging the call.

#pragma once

#define HOSTMETAL_MEET extern "C" __attribute__((convergent, nomerge))

HOSTMETAL_MEET void hostmetal_threadgroup_barrier(int flags);
HOSTMETAL_MEET void hostmetal_simdgroup_barrier(int flags);
HOSTMETAL_MEET ulong hostmetal_shuffle(ulong bits, int how, int by, ulong filling);
HOSTMETAL_MEET ulong hostmetal_ballot(bool yes);
HOSTMETAL_MEET float hostmetal_reduce_float(float x, int how);
HOSTMETAL_MEET long hostmetal_reduce_long(long x, int how);
extern "C" uint hostmetal_lane();

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

METAL_FUNC void threadgroup_barrier(mem_flags flags) {
  hostmetal_threadgroup_barrier(int(flags));
}
METAL_FUNC void simdgroup_barrier(mem_flags flags) {
  hostmetal_simdgroup_barrier(int(flags));
}

template <typename T>
METAL_FUNC ulong to_bits(T x) {
  if constexpr (sizeof(T) == 8) {
    return bits_as<ulong>(x);
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<uint>(x);
  } else if constexpr (sizeof(T) == 2) {
    return bits_as<ushort>(x);
  } else {
    return bits_as<uchar>(x);
  }
}
template <typename T>
METAL_FUNC T from_bits(ulong bits) {
  if constexpr (sizeof(T) == 8) {
    return bits_as<T>(bits);
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<T>(uint(bits));
  } else if constexpr (sizeof(T) == 2) {
    return bits_as<T>(ushort(bits));
  } else {
    return bits_as<T>(uchar(bits));
  }
}

enum shuffle_how { TO, XOR, UP, DOWN, FIRST, FILL_UP, FILL_DOWN, ROTATE_UP, ROTATE_DOWN };

template <typename V>
METAL_FUNC V shuffle(V v, int how, int by, V filling = V{}) {
  if constexpr (is_vector_v<V>) {
    V out = {};
    using T = typename vector_traits<V>::element;
    for (int i = 0; i < vector_traits<V>::size; i++) {
      out[i] = from_bits<T>(hostmetal_shuffle(to_bits<T>(v[i]), how, by, to_bits<T>(filling[i])));
    }
    return out;
  } else {
    return from_bits<V>(hostmetal_shuffle(to_bits(v), how, by, to_bits(filling)));
  }
}

template <typename V>
METAL_FUNC V simd_shuffle(V v, ushort lane) {
  return shuffle(v, TO, lane);
}
template <typename V>
METAL_FUNC V simd_broadcast(V v, ushort lane) {
  return shuffle(v, TO, lane);
}
template <typename V>
METAL_FUNC V simd_broadcast_first(V v) {
  return shuffle(v, FIRST, 0);
}
template <typename V>
METAL_FUNC V simd_shuffle_xor(V v, ushort mask) {
  return shuffle(v, XOR, mask);
}
template <typename V>
METAL_FUNC V simd_shuffle_up(V v, ushort delta) {
  return shuffle(v, UP, delta);
}
template <typename V>
METAL_FUNC V simd_shuffle_down(V v, ushort delta) {
  return shuffle(v, DOWN, delta);
}
template <typename V>
METAL_FUNC V simd_shuffle_and_fill_up(V v, V filling, ushort delta) {
  return shuffle(v, FILL_UP, delta, filling);
}
template <typename V>
METAL_FUNC V simd_shuffle_and_fill_down(V v, V filling, ushort delta) {
  return shuffle(v, FILL_DOWN, delta, filling);
}
template <typename V>
METAL_FUNC V simd_shuffle_rotate_up(V v, ushort delta) {
  return shuffle(v, ROTATE_UP, delta);
}
template <typename V>
METAL_FUNC V simd_shuffle_rotate_down(V v, ushort delta) {
  return shuffle(v, ROTATE_DOWN, delta);
}

enum reduce_how { SUM, PRODUCT, MIN, MAX, AND, OR, BITS_XOR, SUM_BELOW, SUM_TO, PRODUCT_BELOW, PRODUCT_TO };

template <typename V>
METAL_FUNC V reduce(V v, int how) {
  if constexpr (is_vector_v<V>) {
    V out = {};
    for (int i = 0; i < vector_traits<V>::size; i++) {
      out[i] = reduce(typename vector_traits<V>::element(v[i]), how);
    }
    return out;
  } else if constexpr (is_floating_point_v<V>) {
    return V(hostmetal_reduce_float(float(v), how));
  } else {
    static_assert(sizeof(V) < 8 || is_signed_v<V>, "no reduction of ulong here");
    return V(hostmetal_reduce_long(long(v), how));
  }
}

#define HOSTMETAL_REDUCE(NAME, HOW) \
  template <typename V>             \
  METAL_FUNC V NAME(V v) {          \
    return reduce(v, HOW);          \
  }
HOSTMETAL_REDUCE(simd_sum, SUM)
HOSTMETAL_REDUCE(simd_product, PRODUCT)
HOSTMETAL_REDUCE(simd_min, MIN)
HOSTMETAL_REDUCE(simd_max, MAX)
HOSTMETAL_REDUCE(simd_and, AND)
HOSTMETAL_REDUCE(simd_or, OR)
HOSTMETAL_REDUCE(simd_xor, BITS_XOR)
HOSTMETAL_REDUCE(simd_prefix_exclusive_sum, SUM_BELOW)
HOSTMETAL_REDUCE(simd_prefix_inclusive_sum, SUM_TO)
HOSTMETAL_REDUCE(simd_prefix_exclusive_product, PRODUCT_BELOW)
HOSTMETAL_REDUCE(simd_prefix_inclusive_product, PRODUCT_TO)
#undef HOSTMETAL_REDUCE

struct simd_vote {
  typedef ulong vote_t;
  ulong votes;
  explicit operator vote_t() const { return votes; }
};
METAL_FUNC simd_vote simd_ballot(bool yes) {
  return simd_vote{hostmetal_ballot(yes)};
}
METAL_FUNC bool simd_any(bool yes) {
  return hostmetal_ballot(yes) != 0;
}
METAL_FUNC bool simd_all(bool yes) {
  return hostmetal_ballot(!yes) == 0;
}

// A value that is the same in all threads, which the compiler may keep once.
template <typename T>
using uniform = T;
template <typename T>
METAL_FUNC T make_uniform(T x) {
  return x;
}

} // namespace metal

METAL_FUNC ushort __metal_get_thread_index_in_simdgroup(ushort) {
  return ushort(hostmetal_lane());
}
