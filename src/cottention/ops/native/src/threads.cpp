#include "threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Work {
    void (*function)(void*, int64_t);
    void* context;
    int64_t num_tasks;
    std::atomic<int64_t> next{0};

    // What each thread does: the next task that nobody has taken, until there is none.
    void run() {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) function(context, task);
    }
};

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

// Threads that sleep between calls. It lives as long as the process: its threads may be waiting when others exit.
class Pool {
  public:
    void run(Work& work, int64_t num_helpers) {
        std::unique_lock<std::mutex> alone(caller_, std::try_to_lock);
        if (!alone.owns_lock()) {  // another thread of the program is using the pool
            work.run();
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (int64_t(threads_.size()) < num_helpers) {
                threads_.emplace_back(&Pool::serve, this, int64_t(threads_.size()), generation_);
                threads_.back().detach();
            }
            work_ = &work;
            wanted_ = busy_ = num_helpers;
            generation_++;
        }
        wake_.notify_all();
        work.run();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return busy_ == 0; });
    }

  private:
    void serve(int64_t index, int64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= wanted_) continue;
            Work* work = work_;
            lock.unlock();
            work->run();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex caller_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    Work* work_ = nullptr;
    int64_t wanted_ = 0, busy_ = 0, generation_ = 0;
};

// Threads do not survive a fork, and neither runtime notices: a child of the process that loaded this uses none.
const pid_t loaded_in = getpid();

}  // namespace

void run_tasks(int64_t num_tasks, int64_t num_threads, void (*function)(void*, int64_t), void* context) {
    Work work{function, context, num_tasks};
    if (num_threads > num_tasks) num_threads = num_tasks;
    if (num_threads <= 1 || getpid() != loaded_in) {
        work.run();
    } else if (const GompParallel parallel = find_gomp()) {
        parallel([](void* shared) { static_cast<Work*>(shared)->run(); }, &work, unsigned(num_threads), 0);
    } else {
        static Pool* const pool = new Pool;
        pool->run(work, num_threads - 1);
    }
}
