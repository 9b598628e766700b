// The loop of fma_peak.h in NEON: 4 float32 lanes.
#include <arm_neon.h>

#include "fma_peak.h"

double fma_peak_neon(long rounds) {
  const float32x4_t factor = vdupq_n_f32(0.999f), term = vdupq_n_f32(0.001f);
  float32x4_t chain[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chain[i] = vdupq_n_f32(static_cast<float>(i));
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kFmaChains; ++i) chain[i] = vfmaq_f32(term, chain[i], factor);
  }
  double sum = 0;
  for (int i = 0; i < kFmaChains; ++i) sum += vaddvq_f32(chain[i]);
  return sum;
}
