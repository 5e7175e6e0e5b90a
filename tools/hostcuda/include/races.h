// Races in shared memory: two threads of one block at one byte, of which one writes, with no barrier between them. The
// compiler calls these functions for each access when it is asked to look for races (-fsanitize=thread).
#pragma once

namespace host::races {

struct Byte {
  int write_epoch = -1, writer = -1, read_epoch = -1, reader = -1;
};
// Plain arrays: the functions of std::vector would be instrumented themselves
static Byte* bytes;   // null unless races are looked for
static int* epochs;   // barriers that each thread has passed
static long found;

#define RA_PLAIN __attribute__((no_sanitize("thread")))

RA_PLAIN static void pass_barrier() {
  if (epochs != nullptr) {
    epochs[current]++;
  }
}

RA_PLAIN static void touch(const void* start, long count, bool write) {
  const long first = static_cast<const unsigned char*>(start) - shared;
  if (bytes == nullptr || first < 0 || first >= long(shared_bytes)) {
    return;
  }
  const int epoch = epochs[current];
  for (long i = first; i < first + count; i++) {
    Byte& byte = bytes[i];
    const bool others_write = byte.write_epoch == epoch && byte.writer != current;
    const bool others_read = write && byte.read_epoch == epoch && byte.reader != current;
    found += others_write || others_read;
    if (write) {
      byte.write_epoch = epoch;
      byte.writer = current;
    } else {
      byte.reader = byte.read_epoch == epoch && byte.reader != current ? -1 : current; // -1: several
      byte.read_epoch = epoch;
    }
  }
}
} // namespace host::races

#define RA_HOOK(BYTES)                                                                                                \
  extern "C" RA_PLAIN void __tsan_read##BYTES(void* at) { host::races::touch(at, BYTES, false); }                     \
  extern "C" RA_PLAIN void __tsan_write##BYTES(void* at) { host::races::touch(at, BYTES, true); }                     \
  extern "C" RA_PLAIN void __tsan_unaligned_read##BYTES(void* at) { host::races::touch(at, BYTES, false); }           \
  extern "C" RA_PLAIN void __tsan_unaligned_write##BYTES(void* at) { host::races::touch(at, BYTES, true); }
RA_HOOK(1)
RA_HOOK(2)
RA_HOOK(4)
RA_HOOK(8)
RA_HOOK(16)
extern "C" {
RA_PLAIN void __tsan_init() {}
RA_PLAIN void __tsan_func_entry(void*) {}
RA_PLAIN void __tsan_func_exit() {}
RA_PLAIN void __tsan_read_range(void* at, long count) { host::races::touch(at, count, false); }
RA_PLAIN void __tsan_write_range(void* at, long count) { host::races::touch(at, count, true); }
RA_PLAIN void __tsan_vptr_update(void**, void*) {}
RA_PLAIN void __tsan_vptr_read(void**) {}
}
