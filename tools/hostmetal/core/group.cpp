// Scheduler: runs one threadgroup after the other.

#include <pthread.h>
#include <stdlib.h>

#include "worker.h"

__thread Worker* worker __attribute__((tls_model("initial-exec"), visibility("hidden"))) = nullptr;

extern "C" [[noreturn]] void hostmetal_end();

namespace {

uint64_t next_random(uint64_t* state) { // splitmix64
  uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <typename T>
void arrange(T* order, uint64_t n, int how, uint64_t* random) {
  for (uint64_t i = 0; i < n; i++) {
    order[i] = T(how == 1 ? n - 1 - i : i);
  }
  for (uint64_t i = n; how == 2 && i > 1; i--) {
    const uint64_t j = next_random(random) % i;
    const T kept = order[i - 1];
    order[i - 1] = order[j];
    order[j] = kept;
  }
}

void start() {
  const Fibre* me = worker->current;
  const Launch* launch = worker->launch;
  launch->kernel(launch->arguments, &me->position);
  hostmetal_end();
}

void place_threads(Worker* w, const uint32_t group[3]) {
  const Launch* l = w->launch;
  uint32_t size[3], full = 1;
  ThreadPosition p = {};
  for (int i = 0; i < 3; i++) {
    const uint32_t first = group[i] * l->threadgroup[i];
    size[i] = l->threadgroup[i] < l->grid[i] - first ? l->threadgroup[i] : l->grid[i] - first;
    full *= l->threadgroup[i];
    p.threadgroup[i] = w->group_position[i] = group[i];
    p.threads_per_threadgroup[i] = size[i];
    p.dispatch_threads_per_threadgroup[i] = l->threadgroup[i];
    p.threads_per_grid[i] = l->grid[i];
    p.threadgroups_per_grid[i] = (l->grid[i] + l->threadgroup[i] - 1) / l->threadgroup[i];
  }
  w->threads = size[0] * size[1] * size[2];
  w->simdgroup_count = p.simdgroups = (w->threads + 31) / 32;
  p.dispatch_simdgroups = (full + 31) / 32;
  for (uint32_t t = 0; t < w->threads; t++) {
    const uint32_t place[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
    for (int i = 0; i < 3; i++) {
      p.in_threadgroup[i] = place[i];
      p.in_grid[i] = group[i] * l->threadgroup[i] + place[i];
    }
    p.index = t;
    p.lane = t % 32;
    p.simdgroup = t / 32;
    Simdgroup* s = &w->simdgroups[t / 32];
    w->fibres[t] = Fibre{w->stacks.fresh(t, start), s, nullptr, 0, READY, NOWHERE, p};
    s->lanes[t % 32] = &w->fibres[t];
    s->index = t / 32;
    s->count = t % 32 + 1;
  }
}

// Record a barrier: for its kinds of memory, all earlier accesses are ordered before all later ones.
void order_memory(Worker* w, int flags) {
  w->stamp++;
  for (int space = 0; space < 2; space++) {
    if (flags & (space == 0 ? 2 : 1)) {
      w->barrier[space] = w->stamp;
      for (uint32_t i = 0; i < w->simdgroup_count; i++) {
        w->simdgroups[i].stamp[space] = w->stamp;
      }
    }
  }
}

void begin_pass(Worker* w) {
  for (uint32_t i = 0; i < w->simdgroup_count; i++) {
    Simdgroup* s = &w->simdgroups[i];
    s->cursor = s->arrived = s->parked = 0;
    s->mixed = false;
    arrange(s->order, s->count, w->launch->order, &w->random);
    for (uint32_t j = 0; j < s->count; j++) {
      s->lanes[j]->state = READY;
      s->lanes[j]->meeting = NOWHERE;
    }
  }
}

// Whether the threads may continue. Sets `ended` if all have ended.
bool all_at_one_place(Worker* w, bool* ended) {
  const Fibre* a = &w->fibres[0];
  for (uint32_t t = 1; t < w->threads; t++) {
    const Fibre* b = &w->fibres[t];
    if (a->state == b->state && (a->state == ENDED || a->place == b->place)) {
      continue;
    }
    const Fibre* waits = a->state == AT_BARRIER ? a : b;
    const char* what = a->state == b->state ? "waits at another one" : "has ended";
    report(w, DIVERGENCE, waits->site, "", 0, "thread %u waits at threadgroup_barrier and thread %u %s",
           waits->position.index, waits == a ? b->position.index : a->position.index, what);
    return false;
  }
  *ended = a->state == ENDED;
  return true;
}

void run_group(Worker* w, uint64_t number, const uint32_t position[3]) {
  w->group = uint32_t(number + 1);
  w->random = w->launch->seed * 0x2545f4914f6cdd1dull + number;
  w->counters.groups++;
  place_threads(w, position);
  for (uint32_t i = 0; i < MAX_ARRAYS; i++) {
    if (w->arrays[i]) {
      memset(w->arrays[i]->base, 0xff, w->arrays[i]->size);
    }
  }
  order_memory(w, 3);
  for (bool ended = false; !ended;) {
    uint8_t order[MAX_THREADS / 32];
    begin_pass(w);
    arrange(order, w->simdgroup_count, w->launch->order, &w->random);
    for (uint32_t i = 0; i < w->simdgroup_count && !w->fatal; i++) {
      Simdgroup* s = &w->simdgroups[order[i]];
      w->current = s->lanes[s->order[0]];
      hostmetal_switch(&w->scheduler, w->current->sp);
    }
    if (w->fatal || !all_at_one_place(w, &ended)) {
      w->fatal = true;
      return;
    }
    if (!ended) {
      w->counters.barriers++;
      order_memory(w, w->barrier_flags);
    }
  }
}

struct Share { // one worker's share of a launch
  Launch* launch;
  Worker* worker;
  const uint64_t* order;
  uint64_t* next;
};

void* run_share(void* argument) {
  const Share* share = static_cast<Share*>(argument);
  Worker* w = share->worker;
  const Launch* l = share->launch;
  worker = w;
  while (!w->fatal) {
    const uint64_t i = __atomic_fetch_add(share->next, 1, __ATOMIC_RELAXED);
    if (i >= l->group_count) {
      break;
    }
    const uint64_t number = share->order[i];
    const uint64_t across = (l->grid[0] + l->threadgroup[0] - 1) / l->threadgroup[0];
    const uint64_t down = (l->grid[1] + l->threadgroup[1] - 1) / l->threadgroup[1];
    const uint32_t all[3] = {
        uint32_t(number % across), uint32_t(number / across % down), uint32_t(number / across / down)};
    run_group(w, number, l->groups ? l->groups + 3 * number : all);
  }
  worker = nullptr;
  return nullptr;
}

uint32_t shift_of(uint32_t element) {
  return element == 1 ? 0 : element == 2 ? 1 : 2;
}

Worker* make_worker(Launch* l, uint32_t index) {
  void* memory = mmap(nullptr, sizeof(Worker), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Worker* w = static_cast<Worker*>(memory);
  w->launch = l;
  w->stamp = index << 28; // a range of stamps for each worker
  w->arena = static_cast<char*>(
      mmap(nullptr, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  w->arena_used = RED_ZONE;
  w->stacks.reserve(l->threadgroup[0] * l->threadgroup[1] * l->threadgroup[2]);
  for (uint32_t i = 0; i < SITES; i++) {
    w->sites[i] = &w->nowhere;
  }
  for (uint32_t i = 0; i < l->buffer_count; i++) {
    const Buffer& b = l->buffers[i];
    w->regions[w->region_count++] =
        Region{b.base, b.size, 0, 0, b.cells, b.name, b.kind, b.element, shift_of(b.element)};
  }
  return w;
}

void add_up(Launch* l, Worker* w) {
  for (uint32_t i = 0; i < w->region_count; i++) {
    const Region& r = w->regions[i];
    if (r.kind == THREADGROUP) {
      w->counters.threadgroup_read += r.read;
      w->counters.threadgroup_written += r.written;
    } else {
      l->buffers[i].read += r.read;
      l->buffers[i].written += r.written;
    }
  }
  const uint64_t* from = reinterpret_cast<const uint64_t*>(&w->counters);
  uint64_t* to = reinterpret_cast<uint64_t*>(&l->counters);
  const uint64_t most = l->counters.threadgroup_bytes;
  for (size_t i = 0; i < sizeof(Counters) / 8; i++) {
    to[i] += from[i];
  }
  l->counters.threadgroup_bytes = most > w->counters.threadgroup_bytes ? most : w->counters.threadgroup_bytes;
  for (uint32_t i = 0; i < w->report_count && l->report_count < MAX_REPORTS; i++) {
    l->reports[l->report_count++] = w->reports[i];
  }
}

void find_unwritten(Launch* l) {
  for (uint32_t i = 0; i < l->buffer_count && l->report_count < MAX_REPORTS; i++) {
    const Buffer& b = l->buffers[i];
    const uint64_t cells = b.cells && b.kind == OUTPUT ? b.size >> shift_of(b.element) : 0;
    uint64_t missing = 0, first = 0;
    for (uint64_t j = cells; j-- > 0;) {
      if (b.cells[j].group == 0) {
        missing++;
        first = j;
      }
    }
    if (missing) {
      Report& r = l->reports[l->report_count++];
      const uint64_t offset = first << shift_of(b.element);
      r.kind = UNWRITTEN_OUTPUT;
      r.offset = int64_t(offset);
      snprintf(r.buffer, sizeof r.buffer, "%s", b.name);
      snprintf(r.text, sizeof r.text, "%s[%llu] was never written, nor were %llu of its %llu elements in all", b.name,
               (unsigned long long)(offset / b.element),
               (unsigned long long)((missing << shift_of(b.element)) / b.element),
               (unsigned long long)(b.size / b.element));
    }
  }
}

} // namespace

// The shadow of an output. It takes memory only where the output is accessed.
static size_t shadow_bytes(const Buffer& b) {
  return ((b.size >> shift_of(b.element)) + 1) * sizeof(Cell);
}

extern "C" __attribute__((visibility("default"))) int hostmetal_launch(Launch* l) {
  constexpr int MAX_WORKERS = 8;
  const uint32_t count = l->workers < 1 ? 1 : l->workers > MAX_WORKERS ? MAX_WORKERS : l->workers;
  for (uint32_t i = 0; i < l->buffer_count; i++) {
    Buffer& b = l->buffers[i];
    if (l->checks && (b.kind == OUTPUT || b.kind == INITIALISED_OUTPUT)) {
      b.cells = static_cast<Cell*>(mmap(
          nullptr, shadow_bytes(b), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (b.cells == MAP_FAILED) {
        b.cells = nullptr;
      }
    }
  }
  uint64_t* order = static_cast<uint64_t*>(malloc((l->group_count + 1) * sizeof(uint64_t)));
  uint64_t random = l->seed, next = 0;
  arrange(order, l->group_count, l->order, &random);
  Share shares[MAX_WORKERS];
  pthread_t threads[MAX_WORKERS];
  for (uint32_t i = 0; i < count; i++) {
    shares[i] = Share{l, make_worker(l, i), order, &next};
  }
  for (uint32_t i = 1; i < count; i++) {
    pthread_create(&threads[i], nullptr, run_share, &shares[i]);
  }
  run_share(&shares[0]);
  for (uint32_t i = 0; i < count; i++) {
    if (i) {
      pthread_join(threads[i], nullptr);
    }
    Worker* w = shares[i].worker;
    add_up(l, w);
    munmap(w->arena, ARENA_BYTES);
    w->stacks.release();
    munmap(w, sizeof(Worker));
  }
  if (l->checks && !l->groups && l->report_count == 0) {
    find_unwritten(l);
  }
  for (uint32_t i = 0; i < l->buffer_count; i++) {
    if (l->buffers[i].cells) {
      munmap(l->buffers[i].cells, shadow_bytes(l->buffers[i]));
      l->buffers[i].cells = nullptr;
    }
  }
  free(order);
  return l->report_count;
}
