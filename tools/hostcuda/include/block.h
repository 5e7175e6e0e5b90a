// The threads of one thread block, as coroutines of one thread: they change at barriers and exchanges alone.
#pragma once
#include "types.h"
#include <ucontext.h>

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int STACK = 1 << 18;        // bytes of a thread's
constexpr long MOST_TURNS = 2'000'000; // that a thread waits before it counts as stuck

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static int current, alive;
static const char* failure; // what went wrong, or null
static void (*kernel)();

static unsigned char* shared; // the block's shared memory
static size_t shared_bytes;

static void pass() { // let the others run
  const int me = current;
  swapcontext(&threads[me].context, &scheduler);
  current = me;
  threadIdx = {unsigned(me), 0, 0};
}

static void fail(const char* what) { // end the block; no thread goes on
  failure = what;
  setcontext(&scheduler);
}

template <typename Ready>
static void wait_until(Ready ready, const char* what) {
  for (long turn = 0; !ready(); turn++) {
    if (turn == MOST_TURNS) {
      fail(what);
    }
    pass();
  }
}

static void* at(unsigned address) { // of shared memory
  if (address >= shared_bytes) {
    fail("an address outside of the shared memory");
  }
  return shared + address;
}
} // namespace host

inline unsigned __cvta_generic_to_shared(const void* pointer) {
  return unsigned(static_cast<const unsigned char*>(pointer) - host::shared);
}

#include "races.h"

namespace host {

// A meeting of `size` threads: all arrive before one leaves
struct Meeting {
  int arrived = 0;
  unsigned round = 0;
  void join(int size, bool wait = true) {
    const unsigned mine = round;
    if (++arrived == size) {
      arrived = 0;
      round++;
    } else if (wait) {
      wait_until([&] { return round != mine; }, "a barrier at which threads wait for ever");
    }
  }
};
static Meeting whole, named[16];
static std::vector<Meeting> of_warp, of_group; // groups of four warps
static int any;

static int lane() { return current % 32; }
static int warp() { return current / 32; }
static void meet_warp() { of_warp[warp()].join(32); }
static void meet_group() { of_group[current / 128].join(128); }
} // namespace host

inline void __syncthreads() {
  host::whole.join(host::threads.size());
  host::races::pass_barrier();
}
inline int __syncthreads_or(int here) {
  host::any |= here != 0;
  host::whole.join(host::threads.size());
  const int result = host::any;
  host::whole.join(host::threads.size());
  host::any = 0;
  host::whole.join(host::threads.size());
  host::races::pass_barrier();
  return result;
}
inline void __syncwarp(unsigned = ~0u) { host::meet_warp(); }

namespace host {
static uint64_t exchanged[64][32];

template <typename T>
static T exchange(T x, int from) {
  std::memcpy(&exchanged[warp()][lane()], &x, sizeof x);
  meet_warp();
  T result;
  std::memcpy(&result, &exchanged[warp()][from & 31], sizeof x);
  meet_warp();
  return result;
}

template <typename T, typename Join>
static T reduce(T x, Join join) {
  for (int step = 16; step > 0; step /= 2) {
    x = join(x, exchange(x, lane() ^ step));
  }
  return x;
}
static unsigned reduce_or(unsigned x) {
  return reduce(x, [](unsigned a, unsigned b) { return a | b; });
}
} // namespace host

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return host::exchange(x, host::lane() ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return host::exchange(x, lane);
}
inline unsigned __ballot_sync(unsigned, int here) {
  host::exchanged[host::warp()][host::lane()] = here != 0;
  host::meet_warp();
  unsigned result = 0;
  for (int i = 0; i < 32; i++) {
    result |= unsigned(host::exchanged[host::warp()][i]) << i;
  }
  host::meet_warp();
  return result;
}
template <typename T>
T __reduce_min_sync(unsigned, T x) {
  return host::reduce(x, [](T a, T b) { return std::min(a, b); });
}
inline int __any_sync(unsigned lanes, int here) { return __ballot_sync(lanes, here) != 0; }
inline int __all_sync(unsigned lanes, int here) { return __ballot_sync(lanes, !here) == 0; }

namespace host {

// barrier.cta.sync, .arrive and .red.or
static void named_barrier(int id, int size) {
  named[id].join(size);
  races::pass_barrier();
}
static void named_arrival(int id, int size) {
  named[id].join(size, false);
  races::pass_barrier();
}
static bool any_at[16];
static bool named_or(int id, int size, bool here) {
  any_at[id] |= here;
  named[id].join(size);
  const bool result = any_at[id];
  named[id].join(size);
  any_at[id] = false;
  named_barrier(id, size);
  return result;
}

// mbarrier: arrivals that its phase still awaits
struct Barrier {
  uint16_t expected, awaited;
  uint32_t phase;
};
static void barrier_init(unsigned address, unsigned count) {
  *static_cast<Barrier*>(at(address)) = {uint16_t(count), uint16_t(count), 0};
}
static void barrier_arrive(unsigned address, unsigned count = 1) {
  Barrier& barrier = *static_cast<Barrier*>(at(address));
  barrier.awaited -= count;
  if (barrier.awaited == 0) {
    barrier.awaited = barrier.expected;
    barrier.phase++;
  }
  races::pass_barrier();
}
static long turns_at_barrier; // in which no thread got on
static bool barrier_ready(unsigned address, unsigned parity) {
  const bool ready = (static_cast<Barrier*>(at(address))->phase & 1) != parity;
  turns_at_barrier = ready ? 0 : turns_at_barrier + 1;
  if (turns_at_barrier > MOST_TURNS) {
    fail("an mbarrier at which threads wait for ever");
  }
  if (!ready) {
    pass();
  }
  races::pass_barrier();
  return ready;
}
} // namespace host
