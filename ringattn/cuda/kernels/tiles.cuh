// Tiles of tokens in shared memory. Their rows are 16 bytes longer than they need to be, so that 8 rows at one column
// lie in different banks.

#define RA_FUNC __device__ __forceinline__
#define RA_UNROLL _Pragma("unroll")

constexpr int BD = RA_BD, BV = RA_BV; // padded head dims
constexpr int THREADS = 32 * RA_WARPS;
constexpr int PART = 16 / sizeof(RA_T); // numbers of 16 bytes
constexpr int LDK = BD + PART, LDV = BV + PART;
constexpr int SWIZZLED = 0; // in the place of a row's length: see `place`
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LEAST_INT = -2147483647 - 1, MOST_INT = 2147483647;
#define RA_INFINITY __int_as_float(0x7f800000)
#define RA_NAN __int_as_float(0x7fffffff)

RA_FUNC unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// A number that the compiler knows nothing about. What rare code computes from it is computed there. Else the compiler
// would do that before a loop, and keep it in registers that the loop needs.
RA_FUNC int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A number that all lanes of a warp have, and the compiler may take for one.
RA_FUNC int uniform(int x) {
  return __reduce_min_sync(ALL_LANES, x);
}

// Where a number of a tile of COUNT rows is: in rows of LD numbers, or, if SWIZZLED, in panels of 64 columns of two bytes.
// There the 16-byte parts of a row are exchanged by the low bits of its number, so that 8 rows at one column lie in
// different banks.
template <int COUNT, int LD>
RA_FUNC int place(int row, int column) {
  if constexpr (LD == SWIZZLED) {
    return (column / 64 * COUNT + row) * 64 + (column / 8 % 8 ^ row % 8) * 8 + column % 8;
  }
  return row * LD + column;
}

// Copy 16 bytes, or write zeros, while the thread goes on.
RA_FUNC void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

RA_FUNC void copy_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Bring the 128 bytes around an address into the L2 cache, while the thread goes on.
RA_FUNC void prefetch(const void* x) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x));
}

RA_FUNC void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

RA_FUNC void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

RA_FUNC void wait_for_committed() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Whether every row of an array begins at a multiple of 16 bytes, and its numbers follow each other. The stride of an axis
// of length 1 means nothing: a new axis has the stride 1.
template <typename Shape, typename Strides>
RA_FUNC bool in_parts(const void* start, const Shape& shape, const Strides& strides, int dims) {
  bool found = reinterpret_cast<unsigned long long>(start) % 16 == 0 && strides[3] == 1 && dims % PART == 0;
  for (int axis = 0; axis < 3; axis++) {
    found = found && (shape[axis] == 1 || strides[axis] % PART == 0);
  }
  return found;
}

// Load `COUNT` rows of `dims` numbers by `BY` threads, zeros after the first `here` rows and after a row's end.
template <int COUNT, int WIDTH, int LD, int BY = THREADS>
RA_FUNC void load(RA_T* to, const RA_T* from, long long row, long long stride, int dims, int here, bool parts,
                  int thread = threadIdx.x) {
  constexpr int PARTS = WIDTH / PART, STEP = BY / PARTS; // of a row, and rows that are loaded at a time
  if (parts && BY % PARTS == 0) {
    const int first = thread / PARTS, d = thread % PARTS * PART, left = d < dims ? here - first : 0;
    const RA_T* x = from + first * row + d;
    RA_UNROLL
    for (int r = 0; r < COUNT; r += STEP, x += STEP * row) {
      if (COUNT % STEP == 0 || first + r < COUNT) {
        copy_async(to + place<COUNT, LD>(first + r, d), r < left ? x : from, r < left);
      }
    }
  } else if (parts) {
    for (int i = thread; i < COUNT * PARTS; i += BY) {
      const int r = i / PARTS, d = i % PARTS * PART;
      const bool there = r < here && d < dims;
      copy_async(to + place<COUNT, LD>(r, d), there ? from + r * row + d : from, there);
    }
  } else {
    for (int i = thread; i < COUNT * WIDTH; i += BY) {
      const int r = i / WIDTH, d = i % WIDTH;
      to[place<COUNT, LD>(r, d)] = r < here && d < dims ? from[r * row + d * stride] : RA_T(0.0f);
    }
  }
}

RA_FUNC float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

RA_FUNC float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// Load two neighbours of a row with DIMS numbers, of which the next `dims` belong to it; 0 for others.
template <int DIMS>
RA_FUNC Pair<float> load_two(const float* x, int dims) {
  if constexpr (DIMS % 2 == 0) {
    return dims > 0 ? *reinterpret_cast<const Pair<float>*>(x) : Pair<float>{0.0f, 0.0f};
  } else {
    return {dims > 0 ? x[0] : 0.0f, dims > 1 ? x[1] : 0.0f};
  }
}

// Store two neighbours of a row with DIMS numbers, of which the next `dims` belong to it.
template <int DIMS, typename T>
RA_FUNC void store_two(T* to, const float* two, int dims) {
  if constexpr (DIMS % 2 == 0) {
    if (dims > 0) {
      *reinterpret_cast<Pair<T>*>(to) = {T(two[0]), T(two[1])};
    }
  } else {
    for (int i = 0; i < min(dims, 2); i++) {
      to[i] = T(two[i]);
    }
  }
}
