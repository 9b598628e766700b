// The loop of fma_peak.h with AVX512-BF16's dot product: 16 float32 lanes that take two bfloat16 products each.
#include <immintrin.h>

#include "fma_peak.h"

double fma_peak_avx512bf16(long rounds) {
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.25f), _mm512_set1_ps(-0.5f));  // adds a.b = 0 in all
  __m512 chain[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kFmaChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], a, b);
  }
  double sum = 0;
  for (int i = 0; i < kFmaChains; ++i) sum += _mm512_reduce_add_ps(chain[i]);
  return sum;
}
