// The matrix units: fragments as the PTX ISA draws them for mma.m16n8k16, ldmatrix, stmatrix and wgmma.
#pragma once
#include "block.h"

namespace host {

template <typename T>
static float half_of(unsigned word, int which) {
  return float(bits_as<T>(uint16_t(word >> 16 * which)));
}

static const void* rows[64][32]; // addresses that lanes give
static unsigned fragments[64][32][6];

// Matrix i of ldmatrix and stmatrix, of 8 rows: the two numbers of a lane
static uint16_t* element(int matrix, int row, int column) {
  auto* start = static_cast<uint16_t*>(const_cast<void*>(rows[warp()][8 * matrix + row]));
  return start + column;
}

template <bool TRANSPOSED, typename... Words>
static void ldmatrix(unsigned address, Words&... words) {
  if (address % 16 != 0) {
    fail("ldmatrix: an address that is no multiple of 16");
  }
  rows[warp()][lane()] = at(address);
  meet_warp();
  int matrix = 0;
  auto take = [&](unsigned& word) {
    const int i = lane() / 4, j = lane() % 4 * 2, m = matrix++;
    const uint16_t* first = TRANSPOSED ? element(m, j, i) : element(m, i, j);
    const uint16_t* second = TRANSPOSED ? element(m, j + 1, i) : element(m, i, j + 1);
    races::touch(first, 2, false);
    races::touch(second, 2, false);
    word = *first | unsigned(*second) << 16;
  };
  (take(words), ...);
  meet_warp();
}

template <bool TRANSPOSED, typename... Words>
static void stmatrix(unsigned address, Words... words) {
  if (address % 16 != 0) {
    fail("stmatrix: an address that is no multiple of 16");
  }
  rows[warp()][lane()] = at(address);
  meet_warp();
  int matrix = 0;
  auto put = [&](unsigned word) {
    const int i = lane() / 4, j = lane() % 4 * 2, m = matrix++;
    for (int n = 0; n < 2; n++) {
      uint16_t* to = TRANSPOSED ? element(m, j + n, i) : element(m, i, j + n);
      races::touch(to, 2, true);
      *to = word >> 16 * n;
    }
  };
  (put(words), ...);
  meet_warp();
}

// The number of a lane's fragment of A at (row, k), 16 x 16: which lane has it, in which word
template <typename T>
static float from_a(const unsigned (&a)[32][6], int row, int k) {
  return half_of<T>(a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
}

template <typename T>
static void mma(float& c0, float& c1, float& c2, float& c3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                unsigned b0, unsigned b1) {
  auto& own = fragments[warp()];
  const unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(own[lane()], words, sizeof words);
  meet_warp();
  float* sums[4] = {&c0, &c1, &c2, &c3};
  for (int e = 0; e < 4; e++) {
    const int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
    for (int k = 0; k < 16; k++) {
      *sums[e] += from_a<T>(own, row, k) * half_of<T>(own[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
  }
  meet_warp();
}

// A matrix in shared memory as wgmma's descriptor tells it: start, leading and stride offsets in units of 16 bytes, and
// the swizzle (PTX ISA, "Matrix Descriptor Format"). Lines of W bytes, 8 of which are a unit, follow the axis that is
// contiguous: k, or rows of A and columns of B (`outer`).
struct Descriptor {
  uint64_t word;

  unsigned offset_at(int bit) const { return (word >> bit & 0x3fff) * 16; }

  unsigned address(int outer, int k, bool k_major) const {
    const int swizzle = word >> 62;                                // 0: none, 1: 128 bytes, 2: 64, 3: 32
    const int width = swizzle == 0 ? 8 : 128 >> swizzle;           // numbers of a line
    const int line = k_major ? outer : k, place = k_major ? k : outer;
    unsigned lines = offset_at(32), places = offset_at(16);        // bytes from 8 lines, from a line's end, to the next
    if (swizzle == 0 && !k_major) {
      std::swap(lines, places);
    }
    const unsigned plain = offset_at(0) + line / 8 * lines + place / width * places + line % 8 * width * 2 + place % width * 2;
    const int bits = swizzle == 0 ? 0 : 4 - swizzle;
    return plain ^ (plain >> 7 & ((1u << bits) - 1)) << 4;
  }

  template <typename T>
  float get(int outer, int k, bool k_major) const {
    const void* number = at(address(outer, k, k_major));
    races::touch(number, 2, false);
    return float(*static_cast<const T*>(number));
  }
};

// A product that was issued: D += A B, or D = A B, for the 16 rows of this warp and N columns
struct Product {
  std::vector<float*> sums;
  float a[2][16]; // this lane's two rows of A, where registers hold it
  bool a_in_registers, adds, a_k_major, b_k_major;
  Descriptor a_matrix, b_matrix;
  void (*compute)(const Product&);
};
static std::vector<std::vector<std::vector<Product>>> issued; // of each thread: groups, the last one open
static bool late; // whether products are computed, and copies arrive, when they are waited for, not at once

template <typename T>
static void compute(const Product& product) {
  for (size_t e = 0; e < product.sums.size(); e++) {
    const int half_row = e % 4 / 2, column = e / 4 * 8 + lane() % 4 * 2 + e % 2;
    const int row = warp() % 4 * 16 + lane() / 4 + half_row * 8;
    float sum = product.adds ? *product.sums[e] : 0.0f;
    for (int k = 0; k < 16; k++) {
      const float a = product.a_in_registers ? product.a[half_row][k]
                                             : product.a_matrix.get<T>(row, k, product.a_k_major);
      sum += a * product.b_matrix.get<T>(column, k, product.b_k_major);
    }
    *product.sums[e] = sum;
  }
}

static void issue(const Product& product) {
  if (late) {
    issued[current].back().push_back(product);
  } else {
    product.compute(product);
  }
  meet_group(); // where one warp is missing the hardware waits as well
}

// transposed_a, transposed_b: whether the other axis than k is contiguous
template <typename T>
static void wgmma(std::vector<float*> sums, uint64_t a, uint64_t b, bool adds, bool transposed_a, bool transposed_b) {
  issue({sums, {}, false, adds, !transposed_a, !transposed_b, {a}, {b}, compute<T>});
}

template <typename T>
static void wgmma(std::vector<float*> sums, const unsigned (&a)[4], uint64_t b, bool adds, bool transposed_b) {
  Product product{sums, {}, true, adds, true, !transposed_b, {0}, {b}, compute<T>};
  auto& own = fragments[warp()];
  std::memcpy(own[lane()], a, sizeof a);
  meet_warp();
  for (int row = 0; row < 2; row++) {
    for (int k = 0; k < 16; k++) {
      product.a[row][k] = from_a<T>(own, lane() / 4 + 8 * row, k);
    }
  }
  meet_warp();
  issue(product);
}

static void wgmma_commit() { issued[current].push_back({}); }

static void wgmma_wait(size_t left) {
  auto& groups = issued[current]; // committed, and the open one
  while (groups.size() > left + 1) {
    for (const Product& product : groups.front()) {
      product.compute(product);
    }
    groups.erase(groups.begin());
  }
}
} // namespace host
