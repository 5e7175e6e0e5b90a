// Checks of memory accesses. The thread sanitizer's instrumentation calls these functions for every access.

#include "worker.h"

#define SITE __builtin_return_address(0)

namespace {

const char* element_text(const Region* r, uint64_t offset) {
  static thread_local char text[96];
  snprintf(text, sizeof text, "%s[%llu]", r->name, (unsigned long long)(offset / r->element));
  return text;
}

[[noreturn]] __attribute__((noinline)) void out_of_bounds(
    Worker* w, const char* p, uint64_t size, bool write, const void* site) {
  const Region* nearest = nullptr;
  uint64_t best = ~0ull;
  for (uint32_t i = 0; i < w->region_count; i++) {
    const Region* r = &w->regions[i];
    if (r->kind == MODULE) {
      continue;
    }
    const uint64_t away = p < r->base ? r->base - p : p - r->base < int64_t(r->size) ? 0 : p - r->base - r->size + 1;
    if (away < best) {
      best = away;
      nearest = r;
    }
  }
  const uint32_t t = w->current->position.index;
  const char* verb = write ? "writes" : "reads";
  if (!nearest || best > (1ull << 40)) {
    report(w, OUT_OF_BOUNDS, site, "?", 0, "thread %u %s %llu bytes at %p, far from every buffer", t, verb,
           (unsigned long long)size, p);
  } else {
    const int64_t offset = p - nearest->base;
    report(w, OUT_OF_BOUNDS, site, nearest->name, offset,
           "thread %u %s %llu bytes at %s[%lld], which has %llu elements of %u bytes", t, verb,
           (unsigned long long)size, nearest->name, (long long)(offset / int64_t(nearest->element)),
           (unsigned long long)(nearest->size / nearest->element), nearest->element);
  }
  abandon(w);
}

// The region of an access that is not in the cache of sites; null for the thread's own stack.
__attribute__((noinline)) Region* find(Worker* w, const char* p, uint64_t size, bool write, const void* site) {
  const char* stack = w->stacks.base + w->current->position.index * STACK_BYTES;
  if (uint64_t(p - stack) < STACK_BYTES) {
    return nullptr;
  }
  for (uint32_t i = 0; i < w->region_count; i++) {
    Region* r = &w->regions[i];
    const uint64_t offset = p - r->base;
    if (offset < r->size && size <= r->size - offset) {
      w->sites[(uintptr_t(site) >> 2) % SITES] = r;
      return r;
    }
  }
  out_of_bounds(w, p, size, write, site);
}

inline bool same_simdgroup(uint32_t thread, uint32_t simdgroup) {
  return thread / 32 == simdgroup;
}

// Whether no barrier orders the access of `thread` at `stamp` before the present access of the running thread.
inline bool concurrent(const Worker* w, uint32_t thread, uint32_t stamp, uint32_t simdgroup, uint32_t now, int space) {
  if (stamp - w->barrier[space] > w->stamp - w->barrier[space]) {
    return false; // before the last barrier, or by another worker
  }
  return same_simdgroup(thread, simdgroup) ? stamp == now : true;
}

__attribute__((noinline)) void race(
    Worker* w, const Region* r, uint64_t offset, const void* site, const char* mine, const char* other,
    uint32_t thread) {
  char who[48];
  if (thread & 0x8000) {
    snprintf(who, sizeof who, "other threads of simdgroup %u", thread & 0x7fff);
  } else {
    snprintf(who, sizeof who, "thread %u", thread);
  }
  report(w, RACE, site, r->name, offset, "thread %u %s %s, which %s %s, with no barrier between",
         w->current->position.index, mine, element_text(r, offset), who, other);
}

constexpr uint32_t SEVERAL_GROUPS = ~0u;

// Another worker may access the same cell of an output. Each threadgroup writes its mark before it reads the other's
// mark, so that at least one of the two sees the other.
inline uint32_t mark(uint32_t* field, uint32_t group, int space) {
  if (space) {
    return __atomic_exchange_n(field, group, __ATOMIC_SEQ_CST);
  }
  const uint32_t before = *field;
  *field = group;
  return before;
}

inline void note_read(Worker* w, Region* r, Cell* cell, uint64_t offset, const void* site) {
  const uint32_t me = w->current->position.index, simdgroup = me / 32;
  const int space = r->kind != THREADGROUP;
  const uint32_t now = w->current->simdgroup->stamp[space];
  const uint32_t read_by = mark(&cell->read_group, w->group, space);
  if (space && read_by != 0 && read_by != w->group) {
    mark(&cell->read_group, SEVERAL_GROUPS, space);
  }
  const uint32_t written_by = __atomic_load_n(&cell->group, __ATOMIC_SEQ_CST);
  if (__builtin_expect(written_by != w->group, 0)) {
    if (r->kind == THREADGROUP || (r->kind == OUTPUT && written_by == 0)) {
      report(w, UNINITIALISED, site, r->name, offset, "thread %u reads %s, which was never written", me,
             element_text(r, offset));
    } else if (written_by != 0) {
      report(w, RACE, site, r->name, offset, "thread %u reads %s, which another threadgroup wrote", me,
             element_text(r, offset));
    }
  } else if (cell->writer != me && concurrent(w, cell->writer, cell->wrote, simdgroup, now, space)) {
    race(w, r, offset, site, "reads", "wrote", cell->writer);
  }
  if (cell->read - w->barrier[space] > w->stamp - w->barrier[space]) {
    cell->readers = 0;
    cell->reader = me;
  } else {
    const uint32_t last = cell->reader & 0x8000 ? cell->reader & 0x7fff : cell->reader / 32;
    const bool several = last == simdgroup && cell->read == now && cell->reader != me;
    cell->reader = several ? 0x8000 | simdgroup : me;
  }
  cell->readers |= 1u << simdgroup;
  cell->read = now;
}

inline void note_write(Worker* w, Region* r, Cell* cell, uint64_t offset, const void* site) {
  const uint32_t me = w->current->position.index, simdgroup = me / 32;
  const int space = r->kind != THREADGROUP;
  const uint32_t now = w->current->simdgroup->stamp[space];
  const uint32_t written_by = mark(&cell->group, w->group, space);
  const uint32_t read_by = __atomic_load_n(&cell->read_group, __ATOMIC_SEQ_CST);
  if (written_by == w->group) {
    if (cell->writer != me && concurrent(w, cell->writer, cell->wrote, simdgroup, now, space)) {
      race(w, r, offset, site, "writes", "wrote", cell->writer);
    }
  } else if (space && written_by != 0) {
    report(w, WRITE_CONFLICT, site, r->name, offset, "thread %u writes %s, which another threadgroup wrote", me,
           element_text(r, offset));
  } else if (space && read_by != 0 && read_by != w->group) {
    report(w, RACE, site, r->name, offset, "thread %u writes %s, which another threadgroup read", me,
           element_text(r, offset));
  }
  if (cell->read - w->barrier[space] <= w->stamp - w->barrier[space]) {
    const uint32_t others = cell->readers & ~(1u << simdgroup);
    if (others) {
      const uint32_t last = cell->reader & 0x8000 ? cell->reader & 0x7fff : cell->reader / 32;
      race(w, r, offset, site, "writes", "read",
           last != simdgroup ? cell->reader : 0x8000u | uint32_t(__builtin_ctz(others)));
    } else if (cell->read == now && cell->reader != me) {
      race(w, r, offset, site, "writes", "read", cell->reader);
    }
  }
  cell->writer = me;
  cell->wrote = now;
}

inline void access(const void* at, uint64_t size, bool write, const void* site) {
  Worker* w = worker;
  const char* p = static_cast<const char*>(at);
  Region* r = w->sites[(uintptr_t(site) >> 2) % SITES];
  uint64_t offset = p - r->base;
  if (__builtin_expect(offset >= r->size || size > r->size - offset, 0)) {
    r = find(w, p, size, write, site);
    if (!r) {
      return;
    }
    offset = p - r->base;
  }
  (write ? r->written : r->read) += size;
  if (r->cells) {
    Cell* last = r->cells + ((offset + size - 1) >> r->shift);
    uint64_t place = offset;
    for (Cell* cell = r->cells + (offset >> r->shift); cell <= last; cell++, place += 1ull << r->shift) {
      write ? note_write(w, r, cell, place, site) : note_read(w, r, cell, place, site);
    }
  } else if (write && (r->kind <= INPUT || r->kind == MODULE)) {
    report(w, WRITE_TO_INPUT, site, r->name, offset, "thread %u writes %s, which is an input",
           w->current->position.index, element_text(r, offset));
    abandon(w);
  }
}

} // namespace

extern "C" {

#define ACCESS(N)                                                                                                   \
  void __tsan_read##N(void* p) { access(p, N, false, SITE); }                                                       \
  void __tsan_write##N(void* p) { access(p, N, true, SITE); }                                                       \
  void __tsan_unaligned_read##N(void* p) { access(p, N, false, SITE); }                                             \
  void __tsan_unaligned_write##N(void* p) { access(p, N, true, SITE); }                                             \
  void __tsan_read_write##N(void* p) { access(p, N, false, SITE), access(p, N, true, SITE); }                       \
  void __tsan_unaligned_read_write##N(void* p) { access(p, N, false, SITE), access(p, N, true, SITE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) { access(p, n, false, SITE); }
void __tsan_write_range(void* p, size_t n) { access(p, n, true, SITE); }

void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access(from, n, false, SITE);
  access(to, n, true, SITE);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access(from, n, false, SITE);
  access(to, n, true, SITE);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access(to, n, true, SITE);
  return memset(to, value, n);
}

// A `threadgroup` array of the kernel, shared by all threads. The first thread to reach it allocates it.
void* hostmetal_threadgroup(uint32_t id, size_t bytes, uint32_t element, const char* name) {
  Worker* w = worker;
  if (id < MAX_ARRAYS && w->arrays[id]) {
    return w->arrays[id]->base;
  }
  w->array_bytes += (bytes + 15) & ~size_t(15);
  if (w->array_bytes > w->counters.threadgroup_bytes) {
    w->counters.threadgroup_bytes = w->array_bytes;
  }
  if (w->array_bytes > THREADGROUP_LIMIT || id >= MAX_ARRAYS || w->region_count == MAX_REGIONS) {
    report(w, THREADGROUP_OVERFLOW, SITE, name, 0, "with %s threadgroup memory is %zu bytes, of which there are %u",
           name, w->array_bytes, THREADGROUP_LIMIT);
    abandon(w);
  }
  const uint32_t shift = element == 1 ? 0 : 1;
  Region* r = &w->regions[w->region_count++];
  *r = Region{w->arena + w->arena_used, bytes, 0, 0, nullptr, name, THREADGROUP, element, shift};
  w->arena_used += (bytes + 2 * RED_ZONE) & ~(RED_ZONE - 1);
  memset(r->base, 0xff, bytes);
  if (w->launch->checks) {
    const size_t size = ((bytes >> shift) + 1) * sizeof(Cell);
    r->cells = reinterpret_cast<Cell*>(w->arena + w->arena_used);
    memset(r->cells, 0, size);
    w->arena_used += (size + RED_ZONE) & ~(RED_ZONE - 1);
  }
  w->arrays[id] = r;
  return r->base;
}

} // extern "C"
