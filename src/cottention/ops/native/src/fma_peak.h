// What the arithmetic units can do when nothing else limits them: one loop for each instruction set, registers alone.
//
//   double sum = fma_peak_avx2(1000000);   // kFmaPeakAvx2 operations in each round
//
// The loops live in files of their own (fma_peak_*.cpp), because each is compiled for its instruction set.
#pragma once

// Independent chains: enough to fill two units of a latency of four or five cycles, few enough for 16 registers.
constexpr int kFmaChains = 12;

// Operations of a round: lanes * 2 (multiply, add) * chains; a bfloat16 dot product does two of each in a lane.
constexpr double kFmaPeakAvx512Bf16 = 16.0 * 4 * kFmaChains;
constexpr double kFmaPeakAvx512 = 16.0 * 2 * kFmaChains;
constexpr double kFmaPeakAvx2 = 8.0 * 2 * kFmaChains;
constexpr double kFmaPeakNeon = 4.0 * 2 * kFmaChains;
constexpr double kFmaPeakGeneric = 4.0 * 2 * kFmaChains;

// Each returns a number that depends on every operation, so that none can be left out.
double fma_peak_avx512bf16(long rounds);
double fma_peak_avx512(long rounds);
double fma_peak_avx2(long rounds);
double fma_peak_neon(long rounds);
double fma_peak_generic(long rounds);
