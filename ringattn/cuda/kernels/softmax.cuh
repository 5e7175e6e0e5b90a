#define RA_LOG2E 1.44269504088896340736f

__device__ __forceinline__ float power_of_2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// exp(score * factor - top), 0 where the score is -inf even when `top` is as well.
__device__ __forceinline__ float weight(float score, float top, float factor = 1.0f) {
  const float least = -__int_as_float(0x7f800000);
  return power_of_2(fmaf(score, factor, top == least ? 0.0f : -top) * RA_LOG2E);
}
