// Whatever the compiler targets by itself: SSE2 on x86-64, NEON on Arm.
#define DK_ISA baseline
#define DK_LANES 4
#include "chunk.inc"
