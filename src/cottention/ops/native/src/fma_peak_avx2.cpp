// The loop of fma_peak.h in AVX2 and FMA: 8 float32 lanes.
#include <immintrin.h>

#include "fma_peak.h"

double fma_peak_avx2(long rounds) {
  const __m256 factor = _mm256_set1_ps(0.999f), term = _mm256_set1_ps(0.001f);
  __m256 chain[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chain[i] = _mm256_set1_ps(static_cast<float>(i));
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kFmaChains; ++i) chain[i] = _mm256_fmadd_ps(chain[i], factor, term);
  }
  alignas(32) float lanes[8];
  double sum = 0;
  for (int i = 0; i < kFmaChains; ++i) {
    _mm256_store_ps(lanes, chain[i]);
    for (float lane : lanes) sum += lane;
  }
  return sum;
}
