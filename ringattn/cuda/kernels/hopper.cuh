// The matrix units of compute capability 9.0 (PTX ISA, wgmma): four warps, a warpgroup, multiply 64 rows at once, of
// which each warp has 16, with the fragments of matrix.cuh. Operands are read from shared memory: tiles of rows of 128
// bytes, panels of 64 columns, whose 16-byte parts are swizzled (`place` of tiles.cuh). Every panel begins at a multiple
// of 1024 bytes.

constexpr int WARPGROUP = 128; // threads
constexpr int PANEL = 64;      // columns

// The numbers of a swizzled tile.
RA_FUNC constexpr int tile_size(int rows, int columns) {
  return rows * ((columns + PANEL - 1) / PANEL * PANEL);
}

// Where a column of the first row is, but for what swizzling does within 128 bytes.
template <int ROWS>
RA_FUNC constexpr int place_of_panel(int column) {
  return column / PANEL * ROWS * PANEL + column % PANEL;
}

// The low word of an operand's description: where its tile begins and, where the tile's rows are what is summed over, how
// many bytes lie between its panels. The reduction puts it into a uniform register, where products take it from.
RA_FUNC unsigned description_of(const RA_T* tile, int panel_bytes = 16) {
  unsigned low = shared_address(tile) >> 4 | (panel_bytes >> 4) << 16;
  asm volatile("redux.sync.or.b32 %0, %0, 0xffffffff;" : "+r"(low));
  return low;
}

// Describe an operand that begins `numbers` after its tile. Groups of 8 rows are 1024 bytes apart.
RA_FUNC unsigned long long describe(unsigned low, int numbers) {
  constexpr unsigned swizzle_128 = 1u << 30, group = 1024 >> 4;
  return static_cast<unsigned long long>(swizzle_128 | group) << 32 | (low + numbers * static_cast<int>(sizeof(RA_T)) / 16);
}

// Order what this thread did with registers and shared memory before the products that follow.
RA_FUNC void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

RA_FUNC void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most `LEFT` of the committed groups of products are not done.
template <int LEFT>
RA_FUNC void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Make ordinary writes to shared memory, also those of `copy_async` that are done, visible to products.
RA_FUNC void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keep the compiler from moving uses of sums across this place, while products write them.
template <int N>
RA_FUNC void pin(float (&c)[N][4]) {
  RA_UNROLL
  for (int i = 0; i < 4 * N; i++) {
    asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
  }
}

// Operands of products with 16 to 128 columns
#define RA_SUMS(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define RA_SUMS_2(c) RA_SUMS(c, 0), RA_SUMS(c, 1)
#define RA_SUMS_4(c) RA_SUMS_2(c), RA_SUMS(c, 2), RA_SUMS(c, 3)
#define RA_SUMS_6(c) RA_SUMS_4(c), RA_SUMS(c, 4), RA_SUMS(c, 5)
#define RA_SUMS_8(c) RA_SUMS_6(c), RA_SUMS(c, 6), RA_SUMS(c, 7)
#define RA_SUMS_10(c) RA_SUMS_8(c), RA_SUMS(c, 8), RA_SUMS(c, 9)
#define RA_SUMS_12(c) RA_SUMS_10(c), RA_SUMS(c, 10), RA_SUMS(c, 11)
#define RA_SUMS_14(c) RA_SUMS_12(c), RA_SUMS(c, 12), RA_SUMS(c, 13)
#define RA_SUMS_16(c) RA_SUMS_14(c), RA_SUMS(c, 14), RA_SUMS(c, 15)
#define RA_NAMES_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RA_NAMES_4 RA_NAMES_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RA_NAMES_6 RA_NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define RA_NAMES_8 RA_NAMES_6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define RA_NAMES_10 RA_NAMES_8 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RA_NAMES_12 RA_NAMES_10 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define RA_NAMES_14 RA_NAMES_12 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define RA_NAMES_16 RA_NAMES_14 ", %56, %57, %58, %59, %60, %61, %62, %63"

// c = a b, or c += a b if `add`, for 8 * TILES columns of b; the names are those of the operands after the sums.
// - `multiply_shared`: a and b by their descriptions. By columns: the rows of its tile are what is summed over.
// - `multiply_registers`: a from registers, as in matrix.cuh.
#define RA_PRODUCTS(TILES, COLUMNS, SUMS, NAMES, A0, A1, A2, A3, A4, A5) \
  template <bool A_BY_COLUMNS, bool B_BY_COLUMNS> \
  RA_FUNC void multiply_shared(float(&c)[TILES][4], unsigned long long a, unsigned long long b, bool add) { \
    asm volatile("{.reg .pred add; setp.ne.b32 add, " A2 ", 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS \
                 "k16.f32." RA_TYPES " {" NAMES "}, " A0 ", " A1 ", add, 1, 1, " A3 ", " A4 ";}" \
                 : SUMS \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(A_BY_COLUMNS), "n"(B_BY_COLUMNS)); \
  } \
  template <bool B_BY_COLUMNS> \
  RA_FUNC void multiply_registers(float(&c)[TILES][4], const unsigned(&a)[4], unsigned long long b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." RA_TYPES " {" NAMES "}, {" A0 \
                 ", " A1 ", " A2 ", " A3 "}, " A4 ", 1, 1, 1, " A5 ";" \
                 : SUMS \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_BY_COLUMNS)); \
  }
RA_PRODUCTS(2, "16", RA_SUMS_2(c), RA_NAMES_2, "%8", "%9", "%10", "%11", "%12", "%13")
RA_PRODUCTS(4, "32", RA_SUMS_4(c), RA_NAMES_4, "%16", "%17", "%18", "%19", "%20", "%21")
RA_PRODUCTS(6, "48", RA_SUMS_6(c), RA_NAMES_6, "%24", "%25", "%26", "%27", "%28", "%29")
RA_PRODUCTS(8, "64", RA_SUMS_8(c), RA_NAMES_8, "%32", "%33", "%34", "%35", "%36", "%37")
RA_PRODUCTS(10, "80", RA_SUMS_10(c), RA_NAMES_10, "%40", "%41", "%42", "%43", "%44", "%45")
RA_PRODUCTS(12, "96", RA_SUMS_12(c), RA_NAMES_12, "%48", "%49", "%50", "%51", "%52", "%53")
RA_PRODUCTS(14, "112", RA_SUMS_14(c), RA_NAMES_14, "%56", "%57", "%58", "%59", "%60", "%61")
RA_PRODUCTS(16, "128", RA_SUMS_16(c), RA_NAMES_16, "%64", "%65", "%66", "%67", "%68", "%69")

// Do something with the pieces of c that one product can have: 128 columns, and what is left.
template <int START = 0, int N, typename F>
RA_FUNC void in_pieces(float (&c)[N][4], F use) {
  constexpr int LEFT = 8 * N - START, PIECE = LEFT < 128 ? LEFT : 128;
  use(reinterpret_cast<float(&)[PIECE / 8][4]>(c[START / 8]), START);
  if constexpr (LEFT > PIECE) {
    in_pieces<START + PIECE>(c, use);
  }
}

// Begin s = a b^T over WIDTH columns, for 64 rows of a tile of A_ROWS and 8 * N rows of a tile of B_ROWS, which begins
// `b_start` numbers later than `b` says.
template <int A_ROWS, int B_ROWS, int WIDTH, int N>
RA_FUNC void multiply_rows_of(float (&s)[N][4], unsigned a, unsigned b, int b_start = 0) {
  RA_UNROLL
  for (int d = 0; d < WIDTH; d += 16) {
    in_pieces(s, [&](auto& piece, int start) {
      multiply_shared<false, false>(piece, describe(a, place_of_panel<A_ROWS>(d)),
                                    describe(b, b_start + place_of_panel<B_ROWS>(d) + start * PANEL), d > 0);
    });
  }
}

// Begin acc += p b: `p` from registers, `b` a tile of ROWS rows and 8 * W columns, which begins `b_start` numbers later
// than `b` says.
template <int ROWS, int W>
RA_FUNC void multiply_weights_of(float (&acc)[W][4], const unsigned (&p)[ROWS / 16][4], unsigned b, int b_start = 0) {
  RA_UNROLL
  for (int row = 0; row < ROWS; row += 16) {
    in_pieces(acc, [&](auto& piece, int start) {
      multiply_registers<true>(piece, p[row / 16], describe(b, b_start + place_of_panel<ROWS>(start) + row * PANEL));
    });
  }
}

// Weights as `multiply_weights_of` takes them.
template <int N>
RA_FUNC void pack(unsigned (&p)[N / 2][4], const float (&s)[N][4]) {
  RA_UNROLL
  for (int i = 0; i < 2 * N; i++) {
    p[i / 4][i % 4] = packed(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
  }
}

// Barriers in shared memory (PTX ISA, mbarrier): a phase ends when all that are expected have arrived.

RA_FUNC void make_barrier(unsigned long long* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

RA_FUNC void arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive when the copies that this thread began are done.
RA_FUNC void arrive_after_copies(unsigned long long* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Wait for the end of a phase of this parity; the one before the first is odd and has ended.
RA_FUNC void wait_for(unsigned long long* barrier, int parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A stage of a ring of tiles, and the parity of the phase of its barriers
struct Slot {
  int stage, parity;

  template <int STAGES>
  RA_FUNC void step() {
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// The numbered barriers of a block, for `threads` of it (0 is that of __syncthreads).
RA_FUNC void meet(int barrier, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

RA_FUNC void pass(int barrier, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

RA_FUNC bool meet_or(int barrier, int threads, bool flag) {
  int result;
  asm volatile("{.reg .pred flag; setp.ne.b32 flag, %3, 0; barrier.cta.red.or.pred.aligned flag, %1, %2, flag; "
               "selp.b32 %0, 1, 0, flag;}"
               : "=r"(result)
               : "r"(barrier), "r"(threads), "r"(static_cast<int>(flag))
               : "memory");
  return result;
}

// Registers of each thread of this warpgroup, a multiple of 8; the kernel is bound to a number of threads for this.
template <int COUNT>
RA_FUNC void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
RA_FUNC void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
