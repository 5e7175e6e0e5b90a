/* The kernels with the vectors that every processor of the platform has: NEON, SSE2, or plain C. */
#ifdef __aarch64__
#include <arm_neon.h>
#define NAME "NEON"
#else
#define NAME "128-bit vectors"
#endif
#define LANES 4
#define TABLE ringattn_generic
#include "kernels.h"
