// The calls of the C interface: which sequence, head and segment of tokens each task works on.
//
// One task is one head of one sequence, as long as that keeps all threads busy. Otherwise sequences are also cut into
// segments of tokens: the state that each segment adds is computed first, an exclusive sum over the segments gives the
// state that each starts from, and then all run at once. Sums run in the order of the segments whoever computed them, so
// the result depends on the number of threads alone.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "abi.h"
#include "convert.h"
#include "dispatch.h"
#include "threads.h"

namespace {

template <class T>
T* pointer(int64_t word) {
    return reinterpret_cast<T*>(word);
}

const int64_t kElementSize[] = {4, 2, 2, 8};
const int64_t kMaxThreads = 1024;

struct OutOfMemory {};
struct BadBoundaries {};

// 64-byte aligned floats of one thread, kept for its next call.
class Buffer {
  public:
    ~Buffer() { free(data_); }
    float* at_least(int64_t n) {
        if (n > size_) {
            free(data_);
            size_ = 0;
            data_ = nullptr;
            void* p = nullptr;
            if (posix_memalign(&p, 64, size_t(n) * sizeof(float)) != 0) return nullptr;
            data_ = static_cast<float*>(p);
            size_ = n;
        }
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

thread_local Buffer scratch_of_thread;

typedef std::unique_ptr<float[]> Floats;

Floats floats(int64_t n) {
    Floats p(new (std::nothrow) float[size_t(n > 0 ? n : 1)]);
    if (!p) throw OutOfMemory();
    return p;
}

double read_number(const void* p, int64_t dtype, int64_t i) {
    switch (dtype) {
        case kFloat32:
            return static_cast<const float*>(p)[i];
        case kBFloat16:
            return widen(static_cast<const BFloat16*>(p)[i]);
        case kFloat16:
            return widen(static_cast<const Float16*>(p)[i]);
        default:
            return static_cast<const double*>(p)[i];
    }
}

struct Segment {
    int64_t sequence, head;
    int64_t start, end;              // keys, from the sequence's first
    int64_t query_start, query_end;  // the same unless in cross-attention
    int64_t real_before;             // real keys of the sequence before it
    int64_t state;                   // index of this segment's state, counted over all segments
    bool is_first, is_last;
};

class Plan {
  public:
    Plan(const Call& call, bool splits) : call(call), kernels(active_kernels()) {
        chunk = choose_chunk();
        find_sequences();
        if (splits) choose_pieces();
        cut();
        for (int64_t h = 0; h < call.H && call.norm_const != 0; h++) {
            const double m = read_number(pointer<void>(call.norm_const), call.norm_const_dtype, h * call.norm_const_stride);
            p.push_back(1 / (1 + std::exp(-m)));
        }
    }

    // What the kernels see of a segment.
    Range range(const Segment& s) const {
        Range r = {};
        r.dtype = call.dtype;
        r.tokens = s.end - s.start;
        r.K = call.K;
        r.V = call.V;
        r.chunk = chunk;
        const int64_t row = row_of(s.sequence), first = first_token(s.sequence);
        r.k = rows(call.k, row, first + s.start, s.head);
        r.v = rows(call.v, row, first + s.start, s.head);
        if (call.dk != 0) {
            r.dk = rows(contiguous(call.dk, call.S, call.K), row, first + s.start, s.head);
            r.dv = rows(contiguous(call.dv, call.S, call.V), row, first + s.start, s.head);
        }
        r.key_mask = mask_of(s.sequence);
        if (r.key_mask != nullptr) r.key_mask += s.start;
        set_queries(r, s, s.start, s.end);
        r.divisor.divides = call.norm_const != 0;
        r.divisor.constant = !call.causal;
        r.divisor.p = r.divisor.divides ? p[size_t(s.head)] : 0;
        r.divisor.count = call.causal ? seen(s.sequence) + s.real_before : real[size_t(s.sequence)];
        return r;
    }

    // The same segment of the queries alone, which in cross-attention are cut by themselves.
    Range query_range(const Segment& s) const {
        Range r = range(s);
        r.tokens = s.query_end - s.query_start;
        set_queries(r, s, s.query_start, s.query_end);
        return r;
    }

    int64_t seen(int64_t sequence) const { return call.seen == 0 ? 0 : pointer<int64_t>(call.seen)[sequence]; }
    int64_t state_size() const { return call.K * call.V; }
    float* state_of(int64_t word, const Segment& s) const {
        return word == 0 ? nullptr : pointer<float>(word) + (s.sequence * call.H + s.head) * state_size();
    }

    // function(segment, scratch) for each of num_tasks, on all threads; `of` gives a task's segment.
    template <class F>
    void run(int64_t num_tasks, F function) const {
        const int64_t size = kernels.scratch_size(call.K, call.V, chunk);
        std::atomic<bool> failed{false};
        auto task = [&](int64_t i) {
            float* scratch = scratch_of_thread.at_least(size);
            if (scratch == nullptr) {
                failed = true;
            } else {
                function(i, scratch);
            }
        };
        run_tasks(num_tasks, call.num_threads < kMaxThreads ? call.num_threads : kMaxThreads, task);
        if (failed) throw OutOfMemory();
    }

    const Call& call;
    const Kernels& kernels;
    int64_t chunk, pieces = 1;
    std::vector<int64_t> starts, lengths, real;  // of each sequence
    std::vector<double> p;                       // of each head
    std::vector<Segment> segments;

  private:
    int64_t choose_chunk() const {
        int64_t C = call.chunk > 0 ? call.chunk : 64;
        if (C > 128) C = 128;
        return (C + 15) / 16 * 16;
    }

    int64_t row_of(int64_t sequence) const { return call.boundaries != 0 ? 0 : sequence; }
    int64_t first_token(int64_t sequence) const { return starts[size_t(sequence)]; }

    const uint8_t* mask_of(int64_t sequence) const {
        if (call.mask == 0) return nullptr;
        return pointer<uint8_t>(call.mask) + row_of(sequence) * call.mask_row;
    }

    View contiguous(int64_t data, int64_t T, int64_t D) const { return {data, T * call.H * D, call.H * D, D}; }

    Rows rows(const View& view, int64_t b, int64_t t, int64_t h) const {
        const int64_t offset = b * view.batch + t * view.token + h * view.head;
        return {pointer<char>(view.data) + offset * kElementSize[call.dtype], view.token};
    }

    void set_queries(Range& r, const Segment& s, int64_t start, int64_t) const {
        const int64_t row = row_of(s.sequence), t = first_token(s.sequence) + start;
        r.q = rows(call.q, row, t, s.head);
        if (call.o.data != 0) r.o = rows(call.o, row, t, s.head);
        if (call.grad.data != 0) r.grad = rows(call.grad, row, t, s.head);
        if (call.dq != 0) r.dq = rows(contiguous(call.dq, call.T, call.K), row, t, s.head);
        const uint8_t* mask = call.T == call.S ? mask_of(s.sequence) : nullptr;
        r.query_mask = mask == nullptr ? nullptr : mask + start;
    }

    void find_sequences() {
        const int64_t N = call.num_sequences;
        if (call.boundaries == 0) {
            starts.assign(size_t(N), 0);
            lengths.assign(size_t(N), call.S);
        } else {
            const int64_t* at = pointer<int64_t>(call.boundaries);
            if (at[0] != 0 || at[N] != call.T) throw BadBoundaries();
            for (int64_t n = 0; n < N; n++) {
                if (at[n + 1] < at[n]) throw BadBoundaries();
                starts.push_back(at[n]);
                lengths.push_back(at[n + 1] - at[n]);
            }
        }
        real = lengths;
        if (call.mask == 0) return;
        for (int64_t n = 0; n < N; n++) real[size_t(n)] = count(mask_of(n), 0, lengths[size_t(n)]);
    }

    static int64_t count(const uint8_t* mask, int64_t start, int64_t end) {
        if (mask == nullptr) return end - start;
        int64_t sum = 0;
        for (int64_t i = start; i < end; i++) sum += mask[i] != 0;
        return sum;
    }

    // Pieces that the longest sequence is cut into. In units of that sequence's time on one thread: tasks come in rounds
    // of num_threads, and cutting costs the states of the pieces once more, less than half of everything.
    void choose_pieces() {
        int64_t longest = 0, total = 0;
        for (const int64_t length : lengths) {
            longest = length > longest ? length : longest;
            total += length;
        }
        if (call.T != call.S) longest = call.T > longest ? call.T : longest;
        if (call.num_threads <= 1 || longest == 0) return;
        const double tasks = call.T != call.S ? double(call.num_sequences * call.H) : double(total) / double(longest) * double(call.H);
        double best = 0;
        const int64_t most = longest / (4 * chunk) < call.num_threads ? longest / (4 * chunk) : call.num_threads;
        for (int64_t n = 1; n <= most || n == 1; n++) {
            const double rounds = std::ceil(tasks * double(n) / double(call.num_threads));
            const double time = rounds / double(n) * (n > 1 ? 1.4 : 1.0);
            if (n == 1 || time < 0.95 * best) {
                best = time;
                pieces = n;
            }
        }
        longest_ = longest;
    }

    void cut() {
        for (int64_t n = 0; n < call.num_sequences; n++) {
            const int64_t length = lengths[size_t(n)], queries = call.T == call.S ? length : call.T;
            const int64_t most = length > queries ? length : queries;
            const int64_t num = pieces == 1 ? 1 : (most * pieces + longest_ - 1) / longest_ + (most == 0);
            const uint8_t* mask = mask_of(n);
            std::vector<int64_t> before(size_t(num) + 1, 0);
            for (int64_t i = 0; i < num; i++)
                before[size_t(i) + 1] = before[size_t(i)] + (num == 1 ? 0 : count(mask, at(length, i, num), at(length, i + 1, num)));
            for (int64_t h = 0; h < call.H; h++)
                for (int64_t i = 0; i < num; i++)
                    segments.push_back({n, h, at(length, i, num), at(length, i + 1, num), at(queries, i, num),
                                        at(queries, i + 1, num), before[size_t(i)], int64_t(segments.size()), i == 0,
                                        i == num - 1});
        }
    }

    // Where piece i of num begins: a whole number of chunks.
    int64_t at(int64_t length, int64_t i, int64_t num) const {
        if (i == num) return length;
        return length * i / num / chunk * chunk;
    }

    int64_t longest_ = 1;
};

void add_to(float* sum, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) sum[i] += x[i];
}

// Turns the segments' own states into those that each starts from: `initial` of its sequence and all segments before it
// (reversed: after it).
void sum_before(const Plan& plan, float* states, int64_t initial, bool reversed) {
    const int64_t size = plan.state_size(), num = int64_t(plan.segments.size());
    const Floats running = floats(size), own = floats(size);
    for (int64_t j = 0; j < num; j++) {
        const Segment& s = plan.segments[size_t(reversed ? num - 1 - j : j)];
        float* state = states + s.state * size;
        if (reversed ? s.is_last : s.is_first) {
            const float* start = plan.state_of(initial, s);
            for (int64_t i = 0; i < size; i++) running[i] = start == nullptr ? 0 : start[i];
        }
        memcpy(own.get(), state, size_t(size) * sizeof(float));
        memcpy(state, running.get(), size_t(size) * sizeof(float));
        add_to(running.get(), own.get(), size);
    }
}

// Sums the segments' states into `total` [N, H, K, V].
void sum_all(const Plan& plan, const float* states, float* total) {
    const int64_t size = plan.state_size();
    for (const Segment& s : plan.segments) {
        float* sum = total + (s.sequence * plan.call.H + s.head) * size;
        if (s.is_first) {
            memcpy(sum, states + s.state * size, size_t(size) * sizeof(float));
        } else {
            add_to(sum, states + s.state * size, size);
        }
    }
}

// The state that each segment starts from; null unless sequences are cut, then each starts from the caller's.
Floats starting_states(const Plan& plan, bool of_gradients) {
    if (plan.pieces == 1) return nullptr;
    const Call& call = plan.call;
    const int64_t size = plan.state_size(), num = int64_t(plan.segments.size());
    Floats states = floats(num * size);
    plan.run(num, [&](int64_t i, float* scratch) {
        const Segment& s = plan.segments[size_t(i)];
        Range range = plan.range(s);
        range.state_out = states.get() + s.state * size;
        if (of_gradients ? s.is_first : s.is_last) {  // nothing starts from this one
            memset(range.state_out, 0, size_t(size) * sizeof(float));
        } else {
            (of_gradients ? plan.kernels.query_state : plan.kernels.key_state)(range, scratch);
        }
    });
    sum_before(plan, states.get(), of_gradients ? call.grad_final : call.kv, of_gradients);
    return states;
}

// Sums over all tokens into total [N, H, K, V].
void whole_states(const Plan& plan, bool of_gradients, float* total) {
    const int64_t size = plan.state_size(), num = int64_t(plan.segments.size());
    const Floats states = plan.pieces == 1 ? nullptr : floats(num * size);
    plan.run(num, [&](int64_t i, float* scratch) {
        const Segment& s = plan.segments[size_t(i)];
        Range range = of_gradients ? plan.query_range(s) : plan.range(s);
        range.state_out = states ? states.get() + s.state * size : total + (s.sequence * plan.call.H + s.head) * size;
        (of_gradients ? plan.kernels.query_state : plan.kernels.key_state)(range, scratch);
    });
    if (states) sum_all(plan, states.get(), total);
}

void write_seen(const Plan& plan) {
    if (plan.call.final_seen == 0) return;
    int64_t* seen = pointer<int64_t>(plan.call.final_seen);
    for (int64_t n = 0; n < plan.call.num_sequences; n++) seen[n] = plan.seen(n) + plan.real[size_t(n)];
}

void forward(const Call& call) {
    const Plan plan(call, true);
    const int64_t num = int64_t(plan.segments.size()), size = plan.state_size();
    if (!call.causal) {
        float* total = pointer<float>(call.final_kv);
        whole_states(plan, false, total);
        plan.run(num, [&](int64_t i, float* scratch) {
            const Segment& s = plan.segments[size_t(i)];
            Range range = plan.query_range(s);
            range.state = plan.state_of(call.final_kv, s);
            plan.kernels.full_forward(range, scratch);
        });
        return;
    }
    const Floats states = starting_states(plan, false);
    plan.run(num, [&](int64_t i, float* scratch) {
        const Segment& s = plan.segments[size_t(i)];
        Range range = plan.range(s);
        range.state = states ? states.get() + s.state * size : plan.state_of(call.kv, s);
        range.state_out = s.is_last ? plan.state_of(call.final_kv, s) : nullptr;
        plan.kernels.causal_forward(range, scratch);
    });
    write_seen(plan);
}

void backward(const Call& call) {
    const Plan plan(call, true);
    const int64_t num = int64_t(plan.segments.size()), size = plan.state_size();
    std::vector<double> dp(size_t(num), 0.0);
    Floats states, gradients;
    if (call.causal) {
        states = starting_states(plan, false);
        gradients = starting_states(plan, true);
    } else {
        gradients = floats(call.num_sequences * call.H * size);
        whole_states(plan, true, gradients.get());
    }
    // Two tasks a segment, the longer ones first.
    plan.run(2 * num, [&](int64_t i, float* scratch) {
        const Segment& s = plan.segments[size_t(i % num)];
        const bool for_queries = i >= num;
        Range range = for_queries ? plan.query_range(s) : plan.range(s);
        range.dp = &dp[size_t(i % num)];
        if (!call.causal) {
            range.state = for_queries ? plan.state_of(call.kv, s)
                                      : gradients.get() + (s.sequence * call.H + s.head) * size;
            (for_queries ? plan.kernels.full_backward_q : plan.kernels.full_backward_kv)(range, scratch);
        } else if (for_queries) {
            range.state = states ? states.get() + s.state * size : plan.state_of(call.kv, s);
            plan.kernels.causal_backward_q(range, scratch);
        } else {
            range.state = gradients ? gradients.get() + s.state * size : plan.state_of(call.grad_final, s);
            range.state_out = s.is_first ? plan.state_of(call.dkv, s) : nullptr;
            plan.kernels.causal_backward_kv(range, scratch);
        }
    });
    if (call.dm == 0 || call.norm_const == 0) return;
    std::vector<double> sum(size_t(call.H), 0.0);
    for (const Segment& s : plan.segments) sum[size_t(s.head)] += dp[size_t(s.state)];
    for (int64_t h = 0; h < call.H; h++) {
        const double p = plan.p[size_t(h)];
        pointer<float>(call.dm)[h] = float(sum[size_t(h)] * p * (1 - p));
    }
}

void step(const Call& call) {
    const Plan plan(call, false);
    plan.run(int64_t(plan.segments.size()), [&](int64_t i, float* scratch) {
        const Segment& s = plan.segments[size_t(i)];
        Range range = plan.range(s);
        range.state = plan.state_of(call.kv, s);
        range.state_out = plan.state_of(call.final_kv, s);
        plan.kernels.step(range, scratch);
    });
    write_seen(plan);
}

int guarded(void (*function)(const Call&), const Call* call) {
    try {
        function(*call);
        return kOk;
    } catch (const OutOfMemory&) {
        return kOutOfMemory;
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    } catch (const BadBoundaries&) {
        return kBadBoundaries;
    }
}

}  // namespace

int cottention_abi_version() { return COTTENTION_ABI_VERSION; }
int cottention_forward(const Call* call) { return guarded(forward, call); }
int cottention_backward(const Call* call) { return guarded(backward, call); }
int cottention_step(const Call* call) { return guarded(step, call); }
