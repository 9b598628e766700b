// Runs tasks on several threads, without an OpenMP runtime of its own.
//
// The threads are those of the runtime that torch has loaded (found by name at run time), so that torch's operators and
// these kernels share one pool. Where there is none, a pool of std::thread takes its place.
#pragma once

#include <cstdint>

// function(context, task) for every task in 0 .. num_tasks, in any order, on at most num_threads threads, the calling
// one included. With one thread, or in a forked child, everything runs in the calling thread.
void run_tasks(int64_t num_tasks, int64_t num_threads, void (*function)(void* context, int64_t task), void* context);

template <class F>
void run_tasks(int64_t num_tasks, int64_t num_threads, F& function) {
    run_tasks(
        num_tasks, num_threads, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &function);
}
