// The entries of the short convolution: its tasks on the threads, with the kernels of this CPU.
#include <algorithm>
#include <cstddef>
#include <string>

#include "abi.h"
#include "dispatch.h"
#include "threads.h"

namespace {

constexpr int64_t kChannels = 64;            // of a task, as in convolution.h
constexpr int64_t kLeastOfThread = 1 << 14;  // numbers: fewer take less time than another thread to wake

int run(void (*kernel)(const Convolution&, int64_t), const Convolution& call) {
    auto task = [&](int64_t i) { kernel(call, i); };
    const int64_t worthwhile = call.R * call.S * call.C / kLeastOfThread + 1;
    run_tasks(call.R * ((call.C + kChannels - 1) / kChannels), std::min(call.num_threads, worthwhile), task);
    return kOk;
}

}  // namespace

const char* cottention_convolution_layout() {
    static const std::string layout = [] {
        std::string lines;
#define COTTENTION_WORD(name) lines += #name " " + std::to_string(offsetof(Convolution, name)) + "\n";
        COTTENTION_CONVOLUTION(COTTENTION_WORD)
#undef COTTENTION_WORD
        return lines + "size " + std::to_string(sizeof(Convolution));
    }();
    return layout.c_str();
}

int cottention_convolution(const Convolution* call) { return run(active_kernels().convolution, *call); }

int cottention_convolution_backward(const Convolution* call) {
    return run(active_kernels().convolution_backward, *call);
}
