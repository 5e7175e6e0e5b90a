// Synchronisation of the threads of a simdgroup or of a threadgroup.
//
// The lanes of a simdgroup run one after the other, each up to the next collective operation. The last lane to arrive
// executes the operation for all. Then a new pass begins with the first lane.

#include <math.h>

#include "worker.h"

#define SITE __builtin_return_address(0)

namespace {

const char* const MEETINGS[] = {
    "nowhere", "a shuffle", "a ballot", "a reduction", "a matrix product", "a tensor product",
    "a load or store of a matrix", "simdgroup_barrier"};

const char* whereabouts(const Fibre* f) {
  return f->state == ENDED ? "has ended" : f->state == AT_BARRIER ? "is at threadgroup_barrier" : MEETINGS[f->meeting];
}

void multiply(Simdgroup* s) {
  for (int i = 0; i < 8; i++) {
    float8 sum;
    memcpy(&sum, s->c[i], sizeof sum);
    for (int k = 0; k < 8; k++) {
      float8 row;
      memcpy(&row, s->b[k], sizeof row);
      sum += s->a[i][k] * row;
    }
    memcpy(s->d[i], &sum, sizeof sum);
  }
}

// Element i of a lane's part of a 16 x 16 fragment, or of two adjacent fragments.
struct Place {
  int row, column;
};

Place fragment_place(int lane, int i) {
  const int row = ((lane >> 2) & 4) | ((lane >> 1) & 3), column = (((lane >> 2) & 2) | (lane & 1)) * 4;
  return Place{row + (i % 8) / 4 * 8, column + i % 4};
}

void multiply_tensors(Simdgroup* s) {
  float a[16][16], b[16][32], c[16][32];
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 16; i++) {
      const Place p = fragment_place(lane, i);
      const int second = i / 8 * 16;
      if (i < 8) {
        (s->transposed & 1 ? a[p.column][p.row] : a[p.row][p.column]) = s->left[lane][i];
      }
      (s->transposed & 2 ? b[p.column][p.row + second] : b[p.row][p.column + second]) = s->right[lane][i];
      c[p.row][p.column + second] = s->sum[lane][i];
    }
  }
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < 16; k++) {
      for (int column = 0; column < 32; column++) {
        c[row][column] += a[row][k] * b[k][column];
      }
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 16; i++) {
      const Place p = fragment_place(lane, i);
      s->product[lane][i] = c[p.row][p.column + i / 8 * 16];
    }
  }
}

void finish_meeting(Worker* w, Simdgroup* s) {
  switch (s->lanes[0]->meeting) {
    case MULTIPLY:
      w->counters.matmuls++;
      multiply(s);
      break;
    case TENSOR:
      w->counters.tensor_ops++;
      multiply_tensors(s);
      break;
    case SHUFFLE:
    case BALLOT:
    case REDUCE:
      w->counters.shuffles++;
      break;
    case SIMDGROUP_BARRIER:
      w->counters.simdgroup_barriers++;
      if (s->flags & 3) {
        w->stamp++;
        if (s->flags & 2) {
          s->stamp[0] = w->stamp;
        }
        if (s->flags & 1) {
          s->stamp[1] = w->stamp;
        }
      }
      break;
  }
  s->arrived = 0;
  s->cursor = 0;
  s->parity ^= 1;
}

__attribute__((noinline)) void diverged(Worker* w, Simdgroup* s) {
  const Fibre* a = s->lanes[0];
  const Fibre* b = a;
  for (uint32_t i = 1; i < s->count; i++) {
    const Fibre* f = s->lanes[i];
    if (f->state != a->state || f->meeting != a->meeting || f->place != a->place) {
      b = f;
      break;
    }
  }
  report(w, DIVERGENCE, a->site, "", 0, "simdgroup %u takes different ways: thread %u: %s; thread %u: %s%s", s->index,
         a->position.index, whereabouts(a), b->position.index, whereabouts(b),
         a->state == b->state && a->meeting == b->meeting ? " elsewhere in the kernel" : "");
  w->fatal = true;
}

// Switch to the next lane of the pass, or to the scheduler when the simdgroup cannot continue.
inline void pass_on(Worker* w, Fibre* me) {
  Simdgroup* s = me->simdgroup;
  void* next;
  if (++s->cursor == s->count) {
    if (s->arrived == s->count && !s->mixed) {
      finish_meeting(w, s);
      Fibre* first = s->lanes[s->order[0]];
      w->current = first;
      next = first->sp;
      if (first == me) {
        return;
      }
    } else {
      if (s->parked != s->count) {
        diverged(w, s);
      }
      next = w->scheduler;
    }
  } else {
    Fibre* f = s->lanes[s->order[s->cursor]];
    w->current = f;
    next = f->sp;
  }
  hostmetal_switch(&me->sp, next);
}

inline void meet(Worker* w, Fibre* me, int meeting, const void* site, int place) {
  Simdgroup* s = me->simdgroup;
  const Fibre* first = s->lanes[s->order[0]];
  me->meeting = meeting;
  me->site = site;
  me->place = place;
  s->mixed = s->arrived != 0 && (s->mixed || first->meeting != meeting || first->place != place);
  s->arrived++;
  pass_on(w, me);
}

template <typename T>
T combine(int how, T x, T y) {
  switch (how) {
    case 1:
    case 9:
    case 10:
      return x * y;
    case 2:
      return y < x || x != x ? y : x;
    case 3:
      return x < y || x != x ? y : x;
    case 4:
      return T(long(x) & long(y));
    case 5:
      return T(long(x) | long(y));
    case 6:
      return T(long(x) ^ long(y));
    default:
      return x + y;
  }
}

// Over all lanes, over lower lanes (7, 9), or over lanes up to this one (8, 10).
template <typename T>
T reduce(const Simdgroup* s, uint32_t parity, uint32_t lane, int how) {
  const uint32_t last = how == 7 || how == 9 ? lane : how == 8 || how == 10 ? lane + 1 : s->count;
  if (last == 0) {
    return how == 9 ? T(1) : T(0);
  }
  T result, next;
  memcpy(&result, &s->bits[parity][0], sizeof(T));
  for (uint32_t i = 1; i < last; i++) {
    memcpy(&next, &s->bits[parity][i], sizeof(T));
    result = combine(how, result, next);
  }
  return result;
}

// The lane that a shuffle reads. -1: the lane's own value, -2: the fill value, -3: no such lane.
int source(const Simdgroup* s, int how, int by, int lane) {
  const int count = s->count;
  int from = lane;
  switch (how) {
    case 0: // TO
      from = by;
      break;
    case 1: // XOR
      from = lane ^ by;
      break;
    case 2: // UP
    case 5: // FILL_UP
      from = lane - by;
      return from < 0 ? (how == 2 ? -1 : -2) : from;
    case 3: // DOWN
    case 6: // FILL_DOWN
      from = lane + by;
      return from >= 32 ? (how == 3 ? -1 : -2) : from < count ? from : -3;
    case 4: // FIRST
      return 0;
    case 7: // ROTATE_UP
      from = (lane - by) & 31;
      break;
    case 8: // ROTATE_DOWN
      from = (lane + by) & 31;
      break;
  }
  return from >= 0 && from < count ? from : -3;
}

} // namespace

extern "C" {

void hostmetal_threadgroup_barrier(int flags, int place) {
  Worker* w = worker;
  Fibre* me = w->current;
  me->state = AT_BARRIER;
  me->site = SITE;
  me->place = place;
  w->barrier_flags = flags;
  me->simdgroup->parked++;
  pass_on(w, me);
}

void hostmetal_simdgroup_barrier(int flags, int place) {
  Worker* w = worker;
  w->current->simdgroup->flags = flags;
  meet(w, w->current, SIMDGROUP_BARRIER, SITE, place);
}

void hostmetal_together(int place) {
  Worker* w = worker;
  meet(w, w->current, TOGETHER, SITE, place);
}

uint64_t hostmetal_shuffle(uint64_t bits, int how, int by, uint64_t filling, int place) {
  Worker* w = worker;
  Fibre* me = w->current;
  Simdgroup* s = me->simdgroup;
  const uint32_t p = s->parity, lane = me->position.lane;
  s->bits[p][lane] = bits;
  s->by[p][lane] = by;
  meet(w, me, SHUFFLE, SITE, place);
  const int from = source(s, how, by, lane);
  if (from == -3 || (how != 0 && by != s->by[p][0])) {
    const char* problem = from == -3 ? "a lane that does not exist" : "by another distance than the first lane does";
    report(w, BAD_SHUFFLE, SITE, "", by, "thread %u shuffles from %s (lane %u, by %d)", me->position.index, problem,
           lane, by);
    return ~0ull;
  }
  return from == -1 ? bits : from == -2 ? filling : s->bits[p][from];
}

uint64_t hostmetal_ballot(bool yes, int place) {
  Worker* w = worker;
  Simdgroup* s = w->current->simdgroup;
  const uint32_t p = s->parity;
  s->bits[p][w->current->position.lane] = yes;
  meet(w, w->current, BALLOT, SITE, place);
  uint64_t votes = 0;
  for (uint32_t i = 0; i < s->count; i++) {
    votes |= s->bits[p][i] << i;
  }
  return votes;
}

float hostmetal_reduce_float(float x, int how, int place) {
  Worker* w = worker;
  Simdgroup* s = w->current->simdgroup;
  const uint32_t p = s->parity, lane = w->current->position.lane;
  memcpy(&s->bits[p][lane], &x, sizeof x);
  meet(w, w->current, REDUCE, SITE, place);
  return reduce<float>(s, p, lane, how);
}

long hostmetal_reduce_long(long x, int how, int place) {
  Worker* w = worker;
  Simdgroup* s = w->current->simdgroup;
  const uint32_t p = s->parity, lane = w->current->position.lane;
  memcpy(&s->bits[p][lane], &x, sizeof x);
  meet(w, w->current, REDUCE, SITE, place);
  return reduce<long>(s, p, lane, how);
}

float2 hostmetal_multiply(float2 a, float2 b, float2 c, int place) {
  Worker* w = worker;
  Fibre* me = w->current;
  Simdgroup* s = me->simdgroup;
  const uint32_t lane = me->position.lane, quad = lane / 4;
  const uint32_t row = (quad & 4) + (lane / 2) % 4, column = (quad & 2) * 2 + (lane % 2) * 2;
  memcpy(&s->a[row][column], &a, sizeof a);
  memcpy(&s->b[row][column], &b, sizeof b);
  memcpy(&s->c[row][column], &c, sizeof c);
  meet(w, me, MULTIPLY, SITE, place);
  float2 d;
  memcpy(&d, &s->d[row][column], sizeof d);
  return d;
}

float16 hostmetal_tensor(float8 a, float16 b, float16 c, int transposed, int place) {
  Worker* w = worker;
  Fibre* me = w->current;
  Simdgroup* s = me->simdgroup;
  const uint32_t lane = me->position.lane;
  s->left[lane] = a;
  s->right[lane] = b;
  s->sum[lane] = c;
  s->transposed = transposed;
  meet(w, me, TENSOR, SITE, place);
  return s->product[lane];
}

uint32_t hostmetal_lane() { return worker->current->position.lane; }

float hostmetal_exp(float x) {
  worker->counters.exp++;
  return expf(x);
}
float hostmetal_exp2(float x) {
  worker->counters.exp2++;
  return exp2f(x);
}
float hostmetal_log(float x) {
  worker->counters.log++;
  return logf(x);
}
float hostmetal_log2(float x) {
  worker->counters.log++;
  return log2f(x);
}
float hostmetal_tanh(float x) {
  worker->counters.tanh++;
  return tanhf(x);
}

// The end of a thread. Its fibre is not resumed.
[[noreturn]] void hostmetal_end() {
  Worker* w = worker;
  w->current->state = ENDED;
  w->current->simdgroup->parked++;
  pass_on(w, w->current);
  __builtin_unreachable();
}

} // extern "C"
