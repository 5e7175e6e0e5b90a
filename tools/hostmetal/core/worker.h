// The state of one operating system thread that runs threadgroups one after the other.

#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "fibre.h"
#include "launch.h"

constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t MAX_ARRAYS = 64;
constexpr uint32_t MAX_REGIONS = 256;
constexpr uint32_t THREADGROUP_LIMIT = 32768; // bytes
constexpr size_t ARENA_BYTES = 8 << 20;
constexpr size_t RED_ZONE = 4 << 10;
constexpr uint32_t SITES = 1024;

typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float8 __attribute__((ext_vector_type(8)));
typedef float float16 __attribute__((ext_vector_type(16)));

struct Simdgroup;

enum FibreState { READY, AT_BARRIER, ENDED };
enum Meeting { NOWHERE, SHUFFLE, BALLOT, REDUCE, MULTIPLY, TENSOR, TOGETHER, SIMDGROUP_BARRIER };

struct Fibre {
  void* sp;
  Simdgroup* simdgroup;
  const void* site; // address of the call in which it waits
  int place; // position of that call in the source
  int state, meeting;
  ThreadPosition position;
};

struct Simdgroup {
  Fibre* lanes[32];
  uint32_t count; // lanes that exist
  uint32_t index;
  uint32_t cursor; // index into `order` of the running lane
  uint32_t arrived, parked; // in this pass: waiting at the operation; at a barrier or ended
  uint32_t parity;
  bool mixed; // lanes wait at different operations
  uint8_t order[32];
  uint32_t stamp[2]; // stamps since the last barrier of any kind: threadgroup memory, device memory
  int flags; // flags of the present barrier
  uint64_t bits[2][32];
  int by[2][32];
  double results[32];
  long long_results[32];
  alignas(32) float a[8][8], b[8][8], c[8][8], d[8][8];
  float8 left[32]; // each lane's operands of a tensor product
  float16 right[32], sum[32], product[32];
  int transposed; // bit 0: left, bit 1: right
};

struct Region {
  char* base;
  uint64_t size;
  uint64_t read, written;
  Cell* cells;
  const char* name;
  int kind;
  uint32_t element, shift;
};

struct Worker {
  Launch* launch;
  Fibre* current;
  void* scheduler; // its stack pointer
  bool fatal;
  uint32_t group, group_position[3]; // group: counted from 1
  uint32_t threads, simdgroup_count;
  uint32_t stamp, barrier[2]; // the newest stamp, and that of the last barrier by kind of memory
  int barrier_flags;
  uint64_t random;
  Region* sites[SITES]; // the last region of each memory access in the code
  uint32_t region_count;
  Region regions[MAX_REGIONS];
  Region nowhere;
  Region* arrays[MAX_ARRAYS];
  char* arena;
  size_t arena_used, array_bytes;
  Counters counters;
  const void* reported[MAX_REPORTS * 4];
  uint32_t reported_count;
  uint32_t report_count;
  Report reports[MAX_REPORTS];
  Stacks stacks;
  Fibre fibres[MAX_THREADS];
  Simdgroup simdgroups[MAX_THREADS / 32];
};

extern __thread Worker* worker __attribute__((tls_model("initial-exec"), visibility("hidden")));

// Leave the fibre and end the launch.
[[noreturn]] inline void abandon(Worker* w) {
  w->fatal = true;
  void* unused;
  hostmetal_switch(&unused, w->scheduler);
  __builtin_unreachable();
}

__attribute__((format(printf, 6, 7))) inline void report(
    Worker* w, int kind, const void* site, const char* buffer, int64_t offset, const char* format, ...) {
  const void* key = static_cast<const char*>(site) + (uint64_t(kind) << 56);
  for (uint32_t i = 0; i < w->reported_count; i++) {
    if (w->reported[i] == key) {
      return; // one report per kind and place in the code
    }
  }
  if (w->report_count == MAX_REPORTS) {
    return;
  }
  w->reported[w->reported_count++] = key;
  Report& r = w->reports[w->report_count++];
  r.kind = kind;
  r.offset = offset;
  r.thread = w->current->position.index;
  memcpy(r.group, w->group_position, sizeof r.group);
  snprintf(r.buffer, sizeof r.buffer, "%s", buffer);
  va_list arguments;
  va_start(arguments, format);
  int used = vsnprintf(r.text, sizeof r.text, format, arguments);
  va_end(arguments);
  if (used < int(sizeof r.text)) {
    const uint32_t* g = w->group_position;
    used += snprintf(r.text + used, sizeof r.text - used, ", threadgroup (%u, %u, %u)", g[0], g[1], g[2]);
  }
}
