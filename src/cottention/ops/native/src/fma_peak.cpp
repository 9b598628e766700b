// Runs a loop of fma_peak.h in several threads for a while, for the benchmark's roofline.
//
//   ct_fma_peak(2, 0.5, "avx512")   // operations a second of two threads; 0: this library or processor has none
#include "fma_peak.h"

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

struct Loop {
  const char* isa;
  bool runs;  // on this processor
  double (*run)(long rounds);
  double operations;  // of a round
};

#ifdef __x86_64__
#define RUNS(name) (__builtin_cpu_supports(name) != 0)
#else
#define RUNS(name) false
#endif

std::vector<Loop> find_loops() {
#ifdef __x86_64__
  __builtin_cpu_init();
#endif
  return {
#ifdef COTTENTION_HAVE_AVX512BF16
      {"avx512bf16", RUNS("avx512bf16"), fma_peak_avx512bf16, kFmaPeakAvx512Bf16},
#endif
#ifdef COTTENTION_HAVE_AVX512
      {"avx512", RUNS("avx512f"), fma_peak_avx512, kFmaPeakAvx512},
#endif
#ifdef COTTENTION_HAVE_AVX2
      {"avx2", RUNS("avx2") && RUNS("fma"), fma_peak_avx2, kFmaPeakAvx2},
#endif
#ifdef COTTENTION_HAVE_NEON
      {"neon", true, fma_peak_neon, kFmaPeakNeon},
#endif
      {"generic", true, fma_peak_generic, kFmaPeakGeneric},
  };
}

constexpr long kRoundsBetweenLooks = 100000;  // a tenth of a millisecond or so

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Operations a second of this thread.
double rate(const Loop& loop, double seconds) {
  loop.run(kRoundsBetweenLooks);  // the clock of the core rises first
  volatile double sink = 0;
  const auto start = Clock::now();
  double rounds = 0, elapsed = 0;
  do {
    sink = loop.run(kRoundsBetweenLooks);
    rounds += kRoundsBetweenLooks;
    elapsed = seconds_since(start);
  } while (elapsed < seconds);
  (void)sink;
  return rounds * loop.operations / elapsed;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) double ct_fma_peak(int threads, double seconds, const char* isa) {
  for (const Loop& loop : find_loops()) {
    if (!loop.runs || std::strcmp(loop.isa, isa) != 0) continue;
    std::vector<double> rates(threads > 0 ? threads : 1);
    std::vector<std::thread> others;
    for (size_t i = 1; i < rates.size(); ++i) {
      others.emplace_back([&rates, &loop, seconds, i] { rates[i] = rate(loop, seconds); });
    }
    rates[0] = rate(loop, seconds);
    for (auto& other : others) other.join();
    double sum = 0;
    for (double each : rates) sum += each;
    return sum;
  }
  return 0;
}
