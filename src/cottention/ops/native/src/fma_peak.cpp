// Runs a loop of fma_peak.h in several threads for a while, for the benchmark's roofline.
//
// The threads are those that torch's operators run in: others would share the cores with these, which spin for some
// milliseconds after a torch.mm, and read two thirds of the peak there.
//
//   ct_fma_peak(2, 0.5, "avx512")   // operations a second of two threads; 0: this library or processor has none
#include "fma_peak.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "threads.h"

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

constexpr long kRoundsBetweenLooks = 100000;  // a fifth of a millisecond or so

// One reading: until `from` the threads gather and the clocks of their cores rise, until `end` is counted.
struct Reading {
  const Loop& loop;
  Clock::time_point from, end;
  std::vector<double> rounds;             // of each thread
  std::vector<Clock::time_point> ends;    // when each looked last

  // A thread that comes when the others are done, where one core has them all, counts a single run.
  void operator()(int64_t thread) {
    Clock::time_point now = Clock::now();
    for (; now < from; now = Clock::now()) sink = loop.run(kRoundsBetweenLooks);
    do {
      sink = loop.run(kRoundsBetweenLooks);
      rounds[thread] += kRoundsBetweenLooks;
      now = Clock::now();
    } while (now < end);
    ends[thread] = now;
  }

  double operations_a_second() const {
    double sum = 0;
    for (double each : rounds) sum += each;
    const Clock::time_point last = *std::max_element(ends.begin(), ends.end());
    return sum * loop.operations / std::chrono::duration<double>(last - from).count();
  }

  volatile double sink = 0;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) double ct_fma_peak(int threads, double seconds, const char* isa) {
  if (threads < 1) threads = 1;
  for (const Loop& loop : find_loops()) {
    if (!loop.runs || std::strcmp(loop.isa, isa) != 0) continue;
    const auto span = [](double s) { return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s)); };
    const Clock::time_point from = Clock::now() + span(seconds / 4);
    Reading reading{loop, from, from + span(seconds), std::vector<double>(threads), std::vector<Clock::time_point>(threads, from)};
    run_tasks(threads, threads, reading);
    return reading.operations_a_second();
  }
  return 0;
}
