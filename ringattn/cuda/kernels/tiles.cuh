// Tiles of tokens in shared memory. Their rows are 16 bytes longer than they need to be, so that 8 rows at one column
// lie in different banks.

#define RA_FUNC __device__ __forceinline__
#define RA_UNROLL _Pragma("unroll")

constexpr int BQ = RA_WARPS * RA_FRAGMENTS * 16, BK = RA_BK, BD = RA_BD, BV = RA_BV; // rows, keys, padded head dims
constexpr int ROWS = 2 * RA_FRAGMENTS;                                               // that a lane has a share of
constexpr int THREADS = 32 * RA_WARPS;
constexpr int PART = 16 / sizeof(RA_T); // numbers of 16 bytes
constexpr int LDK = BD + PART, LDV = BV + PART;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LEAST_INT = -2147483647 - 1, MOST_INT = 2147483647;
#define RA_INFINITY __int_as_float(0x7f800000)

RA_FUNC unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Copy 16 bytes, or write zeros, while the thread goes on.
RA_FUNC void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

RA_FUNC void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Whether every row of an array begins at a multiple of 16 bytes, and its numbers follow each other.
template <typename Strides>
RA_FUNC bool in_parts(const void* start, const Strides& strides, int dims) {
  return reinterpret_cast<unsigned long long>(start) % 16 == 0 && strides[3] == 1 && dims % PART == 0 &&
      (strides[0] | strides[1] | strides[2]) % PART == 0;
}

// Load `COUNT` rows of `dims` numbers, zeros after the first `here` rows and after a row's end.
template <int COUNT, int WIDTH, int LD>
RA_FUNC void load(RA_T* to, const RA_T* from, long long row, long long stride, int dims, int here, bool parts) {
  if (parts) {
    RA_UNROLL
    for (int first = 0; first < COUNT * (WIDTH / PART); first += THREADS) {
      const int i = first + threadIdx.x, r = i / (WIDTH / PART), d = i % (WIDTH / PART) * PART;
      if (COUNT * (WIDTH / PART) % THREADS == 0 || r < COUNT) {
        const bool there = r < here && d < dims;
        copy_async(to + r * LD + d, there ? from + r * row + d : from, there);
      }
    }
  } else {
    for (int i = threadIdx.x; i < COUNT * WIDTH; i += THREADS) {
      const int r = i / WIDTH, d = i % WIDTH;
      to[r * LD + d] = r < here && d < dims ? from[r * row + d * stride] : RA_T(0.0f);
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
