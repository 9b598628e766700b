// The loop of fma_peak.h in AVX-512: 16 float32 lanes.
#include <immintrin.h>

#include "fma_peak.h"

double fma_peak_avx512(long rounds) {
  const __m512 factor = _mm512_set1_ps(0.999f), term = _mm512_set1_ps(0.001f);  // stays near 1 for ever
  __m512 chain[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kFmaChains; ++i) chain[i] = _mm512_fmadd_ps(chain[i], factor, term);
  }
  double sum = 0;
  for (int i = 0; i < kFmaChains; ++i) sum += _mm512_reduce_add_ps(chain[i]);
  return sum;
}
