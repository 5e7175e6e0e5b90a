// Interface between the core, which runs threads, and the entry of a kernel.

#pragma once

struct ThreadPosition { // the same as in the core's launch.h
  uint in_grid[3], in_threadgroup[3], threadgroup_position[3];
  uint threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threads_per_grid[3], threadgroups_per_grid[3];
  uint index, lane, simdgroup, simdgroups, dispatch_simdgroups;
};

#define HOSTMETAL_ENTRY extern "C" __attribute__((no_sanitize("thread"), visibility("default")))
#define HOSTMETAL_POINTER(TYPE, ADDRESS) reinterpret_cast<TYPE*>(ADDRESS)
#define HOSTMETAL_UINT3(XYZ) (uint3{XYZ[0], XYZ[1], XYZ[2]})

extern "C" ulong hostmetal_threadgroup(uint id, size_t bytes, uint element, const char* name);
