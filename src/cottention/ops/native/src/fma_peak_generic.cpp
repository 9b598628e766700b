// The loop of fma_peak.h with what every processor of the kind has: 4 float32 lanes (SSE2 on x86-64, without FMA).
#include "fma_peak.h"

typedef float Lanes __attribute__((vector_size(16)));

double fma_peak_generic(long rounds) {
  const Lanes factor = {0.999f, 0.999f, 0.999f, 0.999f}, term = {0.001f, 0.001f, 0.001f, 0.001f};
  Lanes chain[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chain[i] = Lanes{} + static_cast<float>(i);
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kFmaChains; ++i) chain[i] = chain[i] * factor + term;
  }
  double sum = 0;
  for (int i = 0; i < kFmaChains; ++i) sum += chain[i][0] + chain[i][1] + chain[i][2] + chain[i][3];
  return sum;
}
