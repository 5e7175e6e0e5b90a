// The blocks of a grid, one after the other.
#pragma once
#include "copies.h"

namespace host {

static void entry() {
  kernel();
  threads[current].done = true;
  alive--;
}

static void start(int i) {
  Thread& thread = threads[i];
  thread.done = false;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = &scheduler;
  makecontext(&thread.context, entry, 0);
}

static void clear(int count, bool find_races) {
  std::memset(shared, 0xff, shared_bytes); // NaN in every dtype
  alive = count;
  whole = {};
  std::fill(named, named + 16, Meeting());
  of_warp.assign((count + 31) / 32, {});
  of_group.assign((count + 127) / 128, {});
  issued.assign(count, {{}});
  copies.assign(count, {{}});
  if (find_races) {
    std::fill(races::bytes, races::bytes + shared_bytes, races::Byte());
    std::fill(races::epochs, races::epochs + count, 0);
  }
}

static void run_block(int count, bool backwards) {
  for (int i = 0; i < count; i++) {
    start(i);
  }
  while (alive > 0 && failure == nullptr) {
    for (int turn = 0; turn < count && failure == nullptr; turn++) {
      const int i = backwards ? count - 1 - turn : turn;
      if (!threads[i].done) {
        current = i;
        threadIdx = {unsigned(i), 0, 0};
        swapcontext(&scheduler, &threads[i].context);
      }
    }
  }
}

static const char* launch(const unsigned (&blocks)[3], int count, size_t bytes, bool late_results, bool find_races) {
  threads.resize(count);
  for (Thread& thread : threads) {
    thread.stack.resize(STACK);
  }
  std::vector<unsigned char> memory(bytes + 2048);
  shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024);
  shared_bytes = bytes;
  gridDim = {blocks[0], blocks[1], blocks[2]};
  blockDim = {unsigned(count), 1, 1};
  late = late_results;
  failure = nullptr;
  races::found = 0;
  std::vector<races::Byte> bytes_seen(find_races ? bytes : 0);
  std::vector<int> epochs_seen(find_races ? count : 0);
  races::bytes = find_races ? bytes_seen.data() : nullptr;
  races::epochs = find_races ? epochs_seen.data() : nullptr;
  for (unsigned z = 0; z < blocks[2]; z++) {
    for (unsigned y = 0; y < blocks[1]; y++) {
      for (unsigned x = 0; x < blocks[0] && failure == nullptr; x++) {
        blockIdx = late ? dim3{blocks[0] - 1 - x, blocks[1] - 1 - y, blocks[2] - 1 - z} : dim3{x, y, z};
        clear(count, find_races);
        run_block(count, (x + y + z) % 2);
      }
    }
  }
  return failure == nullptr && races::found > 0 ? "threads race for a byte of shared memory" : failure;
}
} // namespace host
