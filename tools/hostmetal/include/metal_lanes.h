// Collective operations of the threads of a simdgroup or of a threadgroup. Each is one call to the core, which suspends
// the thread until all threads have arrived. The attributes keep the optimiser from moving, copying or merging the call.

#pragma once

#define HOSTMETAL_MEET extern "C" __attribute__((convergent, nomerge))

// The position of the call in the source. It distinguishes two calls that the optimiser has merged all the same.
#define HOSTMETAL_HERE int place = __builtin_LINE() * 1024 + __builtin_COLUMN()

HOSTMETAL_MEET void hostmetal_threadgroup_barrier(int flags, int place);
HOSTMETAL_MEET void hostmetal_simdgroup_barrier(int flags, int place);
HOSTMETAL_MEET ulong hostmetal_shuffle(ulong bits, int how, int by, ulong filling, int place);
HOSTMETAL_MEET ulong hostmetal_ballot(bool yes, int place);
HOSTMETAL_MEET float hostmetal_reduce_float(float x, int how, int place);
HOSTMETAL_MEET long hostmetal_reduce_long(long x, int how, int place);
extern "C" uint hostmetal_lane();

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

METAL_FUNC void threadgroup_barrier(mem_flags flags, HOSTMETAL_HERE) {
  hostmetal_threadgroup_barrier(int(flags), place);
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, HOSTMETAL_HERE) {
  hostmetal_simdgroup_barrier(int(flags), place);
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
METAL_FUNC V shuffle(V v, int how, int by, int place, V filling = V{}) {
  if constexpr (is_vector_v<V>) {
    V out = {};
    using T = typename vector_traits<V>::element;
    for (int i = 0; i < vector_traits<V>::size; i++) {
      out[i] = from_bits<T>(hostmetal_shuffle(to_bits<T>(v[i]), how, by, to_bits<T>(filling[i]), place));
    }
    return out;
  } else {
    return from_bits<V>(hostmetal_shuffle(to_bits(v), how, by, to_bits(filling), place));
  }
}

template <typename V>
METAL_FUNC V simd_shuffle(V v, ushort lane, HOSTMETAL_HERE) {
  return shuffle(v, TO, lane, place);
}
template <typename V>
METAL_FUNC V simd_broadcast(V v, ushort lane, HOSTMETAL_HERE) {
  return shuffle(v, TO, lane, place);
}
template <typename V>
METAL_FUNC V simd_broadcast_first(V v, HOSTMETAL_HERE) {
  return shuffle(v, FIRST, 0, place);
}
template <typename V>
METAL_FUNC V simd_shuffle_xor(V v, ushort mask, HOSTMETAL_HERE) {
  return shuffle(v, XOR, mask, place);
}
template <typename V>
METAL_FUNC V simd_shuffle_up(V v, ushort delta, HOSTMETAL_HERE) {
  return shuffle(v, UP, delta, place);
}
template <typename V>
METAL_FUNC V simd_shuffle_down(V v, ushort delta, HOSTMETAL_HERE) {
  return shuffle(v, DOWN, delta, place);
}
template <typename V>
METAL_FUNC V simd_shuffle_and_fill_up(V v, V filling, ushort delta, HOSTMETAL_HERE) {
  return shuffle(v, FILL_UP, delta, place, filling);
}
template <typename V>
METAL_FUNC V simd_shuffle_and_fill_down(V v, V filling, ushort delta, HOSTMETAL_HERE) {
  return shuffle(v, FILL_DOWN, delta, place, filling);
}
template <typename V>
METAL_FUNC V simd_shuffle_rotate_up(V v, ushort delta, HOSTMETAL_HERE) {
  return shuffle(v, ROTATE_UP, delta, place);
}
template <typename V>
METAL_FUNC V simd_shuffle_rotate_down(V v, ushort delta, HOSTMETAL_HERE) {
  return shuffle(v, ROTATE_DOWN, delta, place);
}

enum reduce_how { SUM, PRODUCT, MIN, MAX, AND, OR, BITS_XOR, SUM_BELOW, SUM_TO, PRODUCT_BELOW, PRODUCT_TO };

template <typename V>
METAL_FUNC V reduce(V v, int how, int place) {
  if constexpr (is_vector_v<V>) {
    V out = {};
    for (int i = 0; i < vector_traits<V>::size; i++) {
      out[i] = reduce(typename vector_traits<V>::element(v[i]), how, place);
    }
    return out;
  } else if constexpr (is_floating_point_v<V>) {
    return V(hostmetal_reduce_float(float(v), how, place));
  } else {
    static_assert(sizeof(V) < 8 || is_signed_v<V>, "no reduction of ulong here");
    return V(hostmetal_reduce_long(long(v), how, place));
  }
}

#define HOSTMETAL_REDUCE(NAME, HOW)        \
  template <typename V>                    \
  METAL_FUNC V NAME(V v, HOSTMETAL_HERE) { \
    return reduce(v, HOW, place);          \
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
METAL_FUNC simd_vote simd_ballot(bool yes, HOSTMETAL_HERE) {
  return simd_vote{hostmetal_ballot(yes, place)};
}
METAL_FUNC bool simd_any(bool yes, HOSTMETAL_HERE) {
  return hostmetal_ballot(yes, place) != 0;
}
METAL_FUNC bool simd_all(bool yes, HOSTMETAL_HERE) {
  return hostmetal_ballot(!yes, place) == 0;
}

// A value that is equal in all threads. The compiler may store it once.
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
