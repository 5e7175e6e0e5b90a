// Copies that threads do not wait for: cp.async.
#pragma once
#include "matrix.h"

namespace host {

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, present; // zeros follow those that are present
};
static std::vector<std::vector<std::vector<Copy>>> copies; // of each thread: groups, the last one open

static void carry_out(const Copy& copy) {
  races::touch(copy.to, copy.bytes, true);
  std::memset(copy.to, 0, copy.bytes);
  std::memcpy(copy.to, copy.from, copy.present);
}

static void copy_async(unsigned to, const void* from, unsigned bytes, unsigned present) {
  if (to % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("cp.async: an address that is no multiple of the bytes to copy");
  }
  const Copy copy{at(to), from, bytes, present};
  if (late) {
    races::touch(copy.to, bytes, true);
    copies[current].back().push_back(copy);
  } else {
    carry_out(copy);
  }
}

static void commit_copies() { copies[current].push_back({}); }

static void wait_for_groups(size_t left) {
  auto& groups = copies[current];
  while (groups.size() > left + 1) {
    for (const Copy& copy : groups.front()) {
      carry_out(copy);
    }
    groups.erase(groups.begin());
  }
}

static void wait_for_copies() {
  commit_copies();
  wait_for_groups(0);
}

static void barrier_arrive_after_copies(unsigned address) {
  wait_for_copies();
  barrier_arrive(address);
}
} // namespace host
