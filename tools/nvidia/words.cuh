// Metal's names for CUDA: the parts of the Metal standard library that ringattn's kernels use, with a warp as simdgroup.
//
// Include it after MLX's own headers, whose vector types are unchanged: the names below are macros for types that have
// constructors, operators and elements like Metal's. Shuffles multiply the matrices of a simdgroup, in float32.

#undef INFINITY
#undef NAN
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

typedef unsigned short ushort;
typedef unsigned int uint;
using bfloat = __nv_bfloat16;

#define WORDS_FUNC static __device__ __forceinline__

namespace metal {

// Two or four numbers -------------------------------------------------------------------------------------------------

template <typename T>
struct pair_of {
  T x, y;

  pair_of() = default;
  template <typename A>
  __device__ explicit pair_of(A both) : x(T(both)), y(T(both)) {}
  template <typename A, typename B>
  __device__ pair_of(A first, B second) : x(T(first)), y(T(second)) {}

  // No address arithmetic: elements stay in registers where the index is a constant.
  __device__ __forceinline__ T& operator[](int i) {
    return i == 0 ? x : y;
  }
  __device__ __forceinline__ T operator[](int i) const {
    return i == 0 ? x : y;
  }
};

#define WORDS_OPERATOR(OP)                                                                                             \
  template <typename T>                                                                                                \
  WORDS_FUNC pair_of<T> operator OP(pair_of<T> a, pair_of<T> b) {                                                      \
    return pair_of<T>(a.x OP b.x, a.y OP b.y);                                                                         \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  WORDS_FUNC pair_of<T> operator OP(pair_of<T> a, T b) {                                                               \
    return pair_of<T>(a.x OP b, a.y OP b);                                                                             \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  WORDS_FUNC pair_of<T> operator OP(T a, pair_of<T> b) {                                                               \
    return pair_of<T>(a OP b.x, a OP b.y);                                                                             \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  WORDS_FUNC pair_of<T>& operator OP##=(pair_of<T>& a, pair_of<T> b) {                                                 \
    return a = a OP b;                                                                                                 \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  WORDS_FUNC pair_of<T>& operator OP##=(pair_of<T>& a, T b) {                                                          \
    return a = a OP b;                                                                                                 \
  }

WORDS_OPERATOR(+)
WORDS_OPERATOR(-)
WORDS_OPERATOR(*)
WORDS_OPERATOR(/)
#undef WORDS_OPERATOR

template <typename T>
WORDS_FUNC pair_of<T> operator-(pair_of<T> a) {
  return pair_of<T>(-a.x, -a.y);
}

// Numbers -------------------------------------------------------------------------------------------------------------

template <typename T>
WORDS_FUNC T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
WORDS_FUNC T min(T a, T b) {
  return b < a ? b : a;
}

// Of a NaN and a number these return the number.
WORDS_FUNC float max(float a, float b) {
  return fmaxf(a, b);
}

WORDS_FUNC float min(float a, float b) {
  return fminf(a, b);
}

template <typename T>
WORDS_FUNC T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

template <typename T>
WORDS_FUNC T abs(T x) {
  return x < T(0) ? -x : x;
}

WORDS_FUNC float fma(float a, float b, float c) {
  return fmaf(a, b, c);
}

WORDS_FUNC bool isfinite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

WORDS_FUNC bool isnan(float x) {
  return x != x;
}

WORDS_FUNC bool isinf(float x) {
  return !isfinite(x) && !isnan(x);
}

namespace precise {
WORDS_FUNC float exp(float x) {
  return expf(x);
}
WORDS_FUNC float exp2(float x) {
  return exp2f(x);
}
WORDS_FUNC float log(float x) {
  return logf(x);
}
WORDS_FUNC float log2(float x) {
  return log2f(x);
}
WORDS_FUNC float tanh(float x) {
  return tanhf(x);
}
} // namespace precise

namespace fast {
using precise::exp;
using precise::exp2;
using precise::log;
using precise::log2;
using precise::tanh;
} // namespace fast

using precise::exp;
using precise::exp2;
using precise::log;
using precise::log2;
using precise::tanh;

// Lanes of a simdgroup: all lanes take part ----------------------------------------------------------------------------

static constexpr unsigned ALL_LANES = 0xffffffffu;

template <typename T>
WORDS_FUNC T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}

template <typename T>
WORDS_FUNC T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(ALL_LANES, x, mask);
}

template <typename T>
WORDS_FUNC T simd_shuffle_up(T x, ushort by) {
  return __shfl_up_sync(ALL_LANES, x, by);
}

template <typename T>
WORDS_FUNC T simd_shuffle_down(T x, ushort by) {
  return __shfl_down_sync(ALL_LANES, x, by);
}

template <typename T>
WORDS_FUNC T simd_broadcast(T x, ushort lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}

template <typename T>
WORDS_FUNC T simd_broadcast_first(T x) {
  return __shfl_sync(ALL_LANES, x, 0);
}

template <typename T>
WORDS_FUNC T simd_sum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x = x + simd_shuffle_xor(x, mask);
  }
  return x;
}

template <typename T>
WORDS_FUNC T simd_max(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x = max(x, simd_shuffle_xor(x, mask));
  }
  return x;
}

template <typename T>
WORDS_FUNC T simd_min(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x = min(x, simd_shuffle_xor(x, mask));
  }
  return x;
}

WORDS_FUNC bool simd_any(bool x) {
  return __any_sync(ALL_LANES, x);
}

WORDS_FUNC bool simd_all(bool x) {
  return __all_sync(ALL_LANES, x);
}

// Barriers ------------------------------------------------------------------------------------------------------------

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

WORDS_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

WORDS_FUNC void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

// Position of a thread ------------------------------------------------------------------------------------------------

WORDS_FUNC uint thread_index() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

WORDS_FUNC uint3 thread_position() {
  return uint3{
      blockIdx.x * blockDim.x + threadIdx.x,
      blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z};
}

WORDS_FUNC uint3 as_uint3(dim3 size) {
  return uint3{size.x, size.y, size.z};
}

// Matrices of 8 x 8 ---------------------------------------------------------------------------------------------------

// Lane l holds elements (row, column) and (row, column + 1) with
//   row = (l / 4 & 4) + l / 2 % 4,   column = (l / 4 & 2) * 2 + l % 2 * 2.
template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "a simdgroup matrix is 8 x 8");
  pair_of<T> elements;

  __device__ __forceinline__ pair_of<T>& thread_elements() {
    return elements;
  }
};

// The lane that holds element (row, column).
WORDS_FUNC int holder(int row, int column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2;
}

// D = A B + C
template <typename T>
WORDS_FUNC void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& D,
    const simdgroup_matrix<T, 8, 8>& A,
    const simdgroup_matrix<T, 8, 8>& B,
    const simdgroup_matrix<float, 8, 8>& C) {
  const int lane = thread_index() % 32, quad = lane / 4;
  const int row = (quad & 4) + lane / 2 % 4, column = (quad & 2) * 2 + lane % 2 * 2;
  float x = C.elements.x, y = C.elements.y;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float a = simd_shuffle(float(k % 2 == 0 ? A.elements.x : A.elements.y), holder(row, k));
    x = fmaf(a, simd_shuffle(float(B.elements.x), holder(k, column)), x);
    y = fmaf(a, simd_shuffle(float(B.elements.y), holder(k, column)), y);
  }
  D.elements = pair_of<float>(x, y);
}

} // namespace metal

#undef WORDS_FUNC

#define float2 metal::pair_of<float>
#define int2 metal::pair_of<int>
#define uint2 metal::pair_of<uint>
#define short2 metal::pair_of<short>
#define bool2 metal::pair_of<bool>

#define thread_index_in_threadgroup (metal::thread_index())
#define thread_index_in_simdgroup (metal::thread_index() % 32)
#define simdgroup_index_in_threadgroup (metal::thread_index() / 32)
#define threads_per_simdgroup 32u
#define thread_position_in_threadgroup threadIdx
#define thread_position_in_grid (metal::thread_position())
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup (metal::as_uint3(blockDim))
#define threadgroups_per_grid (metal::as_uint3(gridDim))
