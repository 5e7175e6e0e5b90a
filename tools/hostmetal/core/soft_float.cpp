// Conversions that compiled code calls by name on processors without an instruction for them.

#include <stdint.h>
#include <string.h>

extern "C" __bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint16_t top;
  if (x != x) {
    top = uint16_t((bits >> 16) | 0x40);
  } else {
    top = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); // to nearest, ties to even
  }
  __bf16 result;
  memcpy(&result, &top, sizeof result);
  return result;
}
