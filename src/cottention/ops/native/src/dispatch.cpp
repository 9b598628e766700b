#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
// Intel's cores with AVX512-FP16 (Sapphire Rapids and later) do half as many products a cycle in the dot product of
// bfloat16 as in float, and leave the rest to AMX. Measured there, kernels in float are 1.4 times as fast.
bool dot_product_is_slow() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 23 & 1) != 0;
}
#endif

// From the plainest to the widest; null where the CPU, or the compiler that built this, lacks it.
struct Choice {
    static constexpr int kMost = 4;
    const Kernels* sets[kMost] = {};
    int count = 0;
    std::atomic<const Kernels*> active{nullptr};

    Choice() {
        offer(true, kernels_generic);
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        offer(avx2, kernels_avx2);
        offer(avx512, kernels_avx512);
        offer(avx512 && __builtin_cpu_supports("avx512bf16"), kernels_avx512bf16);
        if (avx512 && dot_product_is_slow()) active = &kernels_avx512;
#elif defined(__aarch64__)
        offer(true, kernels_neon);
#endif
    }

    void offer(bool runs, const Kernels& kernels) {
        if (!runs) return;
        sets[count++] = &kernels;
        active = &kernels;
    }
};

Choice& choice() {
    static Choice instance;
    return instance;
}

}  // namespace

const Kernels& active_kernels() { return *choice().active.load(std::memory_order_relaxed); }

const char* cottention_instruction_set(int64_t index) {
    const Choice& all = choice();
    if (index < 0) return active_kernels().name;
    return index < all.count ? all.sets[index]->name : nullptr;
}

int cottention_use_instruction_set(const char* name) {
    Choice& all = choice();
    for (int i = 0; i < all.count; i++) {
        if (strcmp(all.sets[i]->name, name) != 0) continue;
        all.active = all.sets[i];
        return kOk;
    }
    return kUnknownInstructionSet;
}
