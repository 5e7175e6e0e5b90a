// Structures that the Python side passes and receives. `launch.py` mirrors them.

#pragma once

#include <stddef.h>
#include <stdint.h>

struct ThreadPosition { // the position of a thread, named like Metal's attributes
  uint32_t in_grid[3], in_threadgroup[3], threadgroup[3];
  uint32_t threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threads_per_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t index, lane, simdgroup, simdgroups, dispatch_simdgroups;
};

typedef void (*Kernel)(void* const* arguments, const ThreadPosition* position);

enum BufferKind { CONSTANT, INPUT, OUTPUT, INITIALISED_OUTPUT, THREADGROUP, MODULE };

struct Cell { // the last accesses to a few bytes; a stamp identifies an interval between barriers
  uint32_t wrote, read;
  uint32_t readers; // bit s: simdgroup s read since the last barrier
  uint32_t group, read_group; // the threadgroups of the last write and read, counted from 1; ~0: several read
  uint16_t writer, reader; // threads; a reader 0x8000 | s means several threads of simdgroup s
};

struct Buffer {
  const char* name;
  char* base;
  uint64_t size;
  uint64_t read, written;
  Cell* cells;
  int32_t kind;
  uint32_t element; // bytes
};

enum ReportKind {
  OUT_OF_BOUNDS,
  RACE,
  UNINITIALISED,
  WRITE_TO_INPUT,
  UNWRITTEN_OUTPUT,
  WRITE_CONFLICT,
  DIVERGENCE,
  BAD_SHUFFLE,
  THREADGROUP_OVERFLOW,
};

struct Report {
  int32_t kind;
  uint32_t thread, group[3];
  char buffer[60];
  int64_t offset;
  char text[360];
};

struct Counters {
  uint64_t matmuls, tensor_ops, exp2, exp, log, tanh;
  uint64_t barriers, simdgroup_barriers, shuffles;
  uint64_t threadgroup_read, threadgroup_written, threadgroup_bytes;
  uint64_t bank_conflicts, groups;
};

constexpr int MAX_REPORTS = 8;

struct Launch {
  Kernel kernel;
  void* const* arguments;
  Buffer* buffers;
  uint32_t buffer_count;
  uint32_t grid[3], threadgroup[3];
  const uint32_t* groups; // (x, y, z) of each threadgroup to run, or null for all
  uint64_t group_count;
  uint64_t seed;
  int32_t order; // 0 forward, 1 backward, 2 shuffled
  int32_t checks;
  int32_t workers;
  int32_t report_count;
  Counters counters;
  Report reports[MAX_REPORTS];
};
