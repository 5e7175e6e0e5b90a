// Fibres: each has a stack. A switch between two of them saves the registers that a call must preserve.

#pragma once

#include <stdint.h>
#include <sys/mman.h>

extern "C" void hostmetal_switch(void** save, void* resume);

#if defined(__x86_64__)
constexpr int SAVED_WORDS = 8; // six registers, the return address, and one word for alignment
constexpr int RETURN_WORD = 6;
#elif defined(__aarch64__)
constexpr int SAVED_WORDS = 20;
constexpr int RETURN_WORD = 11;
#else
#error "no switch of fibres for this processor"
#endif

constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t GUARD_BYTES = 4 << 10; // below each stack, so that an overflow stops at once

struct Stacks {
  char* base = nullptr;
  uint32_t count = 0;

  void reserve(uint32_t n) {
    if (n <= count) {
      return;
    }
    release();
    base = static_cast<char*>(
        mmap(nullptr, n * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (uint32_t i = 0; i < n; i++) {
      mprotect(base + i * STACK_BYTES, GUARD_BYTES, PROT_NONE);
    }
    count = n;
  }

  void release() {
    if (base) {
      munmap(base, count * STACK_BYTES);
    }
    base = nullptr;
    count = 0;
  }

  // Prepare a new fibre to resume at `start`, on stack i. The tops of the stacks are staggered, so that lanes do not
  // compete for the same cache lines.
  void* fresh(uint32_t i, void (*start)()) const {
    uint64_t* top = reinterpret_cast<uint64_t*>(base + (i + 1) * STACK_BYTES - 64 - (i % 32) * 192);
    uint64_t* sp = top - SAVED_WORDS;
    for (int word = 0; word < SAVED_WORDS; word++) {
      sp[word] = 0;
    }
    sp[RETURN_WORD] = reinterpret_cast<uint64_t>(start);
    return sp;
  }
};
