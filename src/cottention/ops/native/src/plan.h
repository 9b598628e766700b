// Which sequence, which heads and which tokens each task works on, and the walk of a task over its tokens.
//
// One task is some heads of one sequence, as long as that keeps all threads busy. Otherwise sequences are also cut into
// pieces of tokens; `schedule.cpp` then finds the state that each piece starts from.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "abi.h"
#include "convert.h"
#include "dispatch.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

template <class T>
T* pointer(int64_t word) {
    return reinterpret_cast<T*>(word);
}

const int64_t kElementSize[] = {4, 2, 2, 8};
// Operations that are worth another thread: some 20 microseconds of one.
const double kWorkOfThread = 2e6;

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

// While it lives, results too small for a normal float become 0. Where a state hardly outlives its chunk, it and what
// rounding took from it would fade through subnormal numbers, which Intel's processors compute a hundred times slower.
class FlushTiny {
#if defined(__x86_64__)
  public:
    FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
    ~FlushTiny() { _mm_setcsr(before_); }

  private:
    const unsigned before_;
#endif
};

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

// A piece of a sequence: all of it, unless sequences are cut.
struct Piece {
    int64_t sequence;
    int64_t start, end;              // keys, from the sequence's first
    int64_t query_start, query_end;  // the same unless in cross-attention
    int64_t real_before;             // real keys of the sequence before it
    bool is_first, is_last;
};

// What one thread works on at a time: some heads of a piece.
struct Task {
    int64_t piece, first_head, last_head;
};

// Some tokens of a piece that a head is computed at a time, counted over all pieces.
struct Turn {
    int64_t index, head, start;  // `start` from the sequence's first token
    bool is_first;               // of its piece, in the order in which they are computed
};

class Plan {
  public:
    // Mirrored, every sequence runs from its last token to its first.
    explicit Plan(const Call& call, bool mirrored = false)
        : call(call), kernels(active_kernels()), mirrored_(mirrored) {
        if (mirrored) mirror_mask();
        choose_chunk();
        find_sequences();
        choose_threads();
        choose_cuts();
        cut();
        for (int64_t h = 0; h < call.H && call.norm_const != 0; h++) {
            const double m =
                read_number(pointer<void>(call.norm_const), call.norm_const_dtype, h * call.norm_const_stride);
            p_.push_back(1 / (1 + std::exp(-m)));
        }
    }

    int64_t num_tasks() const { return int64_t(tasks_.size()); }
    const Task& task(int64_t i) const { return tasks_[size_t(i)]; }
    int64_t num_pieces() const { return int64_t(pieces_.size()); }
    const Piece& piece(int64_t i) const { return pieces_[size_t(i)]; }
    const Piece& piece(const Task& task) const { return pieces_[size_t(task.piece)]; }
    bool is_cut() const { return cuts_ > 1; }
    bool decays() const { return call.log_decay.data != 0 && call.beta.data == 0; }  // and erases nothing
    int64_t num_turns() const { return first_turns_.back(); }
    double p(int64_t head) const { return p_[size_t(head)]; }

    // Bidirectional attention with decay adds two walks up in float, and `schedule.cpp` rounds the sum.
    int64_t out_dtype() const { return !call.causal && decays() ? kFloat32 : call.dtype; }

    // The row of kv and seen that a sequence has.
    int64_t row_of_state(int64_t sequence) const {
        return call.state_indices == 0 ? sequence : pointer<int64_t>(call.state_indices)[sequence];
    }
    int64_t seen(int64_t sequence) const {
        return call.seen == 0 ? 0 : pointer<int64_t>(call.seen)[row_of_state(sequence)];
    }
    int64_t real(int64_t sequence) const { return real_[size_t(sequence)]; }
    int64_t state_size() const { return call.K * call.V; }

    // The state of a head in [N, H, K, V], or in [pieces, H, K, V].
    float* state_of(int64_t word, int64_t sequence, int64_t head) const {
        return word == 0 ? nullptr : pointer<float>(word) + (sequence * call.H + head) * state_size();
    }
    float* state_of(const Floats& states, int64_t piece, int64_t head) const {
        return states.get() + (piece * call.H + head) * state_size();
    }

    // function(task, scratch) for every task, `rounds` times over, on all threads.
    template <class F>
    void run(int64_t rounds, F function) const {
        const int64_t size = scratch_size();
        std::atomic<bool> failed{false};
        auto body = [&](int64_t i) {
            [[maybe_unused]] const FlushTiny flush;
            float* scratch = scratch_of_thread.at_least(size + heads_ * (waiting_size() + lost_size() + kOffset));
            if (scratch == nullptr) {
                failed = true;
            } else {
                function(i / num_tasks(), i % num_tasks(), scratch);
            }
        };
        run_tasks(rounds * num_tasks(), threads_, body);
        if (failed) throw OutOfMemory();
    }

    // Run a kernel over the tokens of a task, its heads taking turns every kTurn tokens: heads lie side by side in
    // memory, so that pages and what the hardware fetches beside a line are used by all of them. `set(range, head)`
    // fills in the states at both ends; between turns a running state waits in scratch, while a fixed one is the same
    // at every token. Beside the state waits what rounding took from it.
    struct Way {
        bool over_queries, reversed, fixed;
    };
    template <class F>
    void walk(void (*kernel)(const Range&, float*), const Task& task, Way way, float* scratch, F set) const {
        walk(kernel, task, way, scratch, set, [](Range&, const Turn&) {});
    }
    // `also(range, turn)` may change what a turn begins with and leaves.
    template <class F, class G>
    void walk(void (*kernel)(const Range&, float*), const Task& task, Way way, float* scratch, F set, G also) const {
        const Piece& piece = pieces_[size_t(task.piece)];
        const int64_t start = way.over_queries ? piece.query_start : piece.start;
        const int64_t end = way.over_queries ? piece.query_end : piece.end;
        const int64_t heads = task.last_head - task.first_head;
        const int64_t turn = heads == 1 && !decays() ? end - start + 1 : turn_size();
        const int64_t turns = num_turns(end - start, turn);
        float* waiting = scratch + scratch_size();
        int64_t real_before = piece.real_before;
        if (way.reversed && turns > 1) real_before += count(mask_of(piece.sequence), start, end);
        for (int64_t i = 0; i < turns; i++) {
            const int64_t at = way.reversed ? turns - 1 - i : i;
            const int64_t t0 = start + at * turn, t1 = t0 + turn < end ? t0 + turn : end;
            const int64_t here = turns > 1 && !way.over_queries ? count(mask_of(piece.sequence), t0, t1) : 0;
            if (way.reversed) real_before -= here;
            for (int64_t head = task.first_head; head < task.last_head; head++) {
                Range r = range(piece.sequence, head, t0, t1, real_before);
                set(r, head);
                float* own = waiting + (head - task.first_head) * (waiting_size() + lost_size() + kOffset);
                double* offset = reinterpret_cast<double*>(own + waiting_size() + lost_size());
                if (i > 0) r.offset = *offset;
                if (i < turns - 1) r.offset_out = offset;
                if (i > 0 && !way.fixed) r.state = own;
                if (i < turns - 1 && !way.fixed) r.state_out = own;
                r.lost = reinterpret_cast<uint16_t*>(own + waiting_size());
                r.continues = i > 0;
                also(r, {first_turns_[size_t(task.piece)] + at, head, t0, i == 0});
                kernel(r, scratch);
            }
            if (!way.reversed) real_before += here;
        }
    }

    // Where the number of a token of a sequence and head stands in [B, H, T].
    int64_t place(int64_t sequence, int64_t head, int64_t t0) const {
        return (row_of(sequence) * call.H + head) * call.T + starts_[size_t(sequence)] + t0;
    }

    // What a kernel sees of the tokens t0 .. t1 of a sequence; of the keys, or of the queries.
    Range range(int64_t sequence, int64_t head, int64_t t0, int64_t t1, int64_t real_before) const {
        const int64_t row = row_of(sequence);
        const int64_t t = starts_[size_t(sequence)] + (mirrored_ ? lengths_[size_t(sequence)] - 1 - t0 : t0);
        Range r = {};
        r.dtype = call.dtype;
        r.out_dtype = out_dtype();
        r.tokens = t1 - t0;
        r.K = call.K;
        r.V = call.V;
        r.chunk = chunk_;
        r.q = rows(call.q, call.dtype, row, t, head);
        r.k = rows(call.k, call.dtype, row, t, head);
        r.v = rows(call.v, call.dtype, row, t, head);
        r.o = rows(call.o, r.out_dtype, row, t, head);
        r.grad = rows(call.grad, call.dtype, row, t, head);
        r.dq = rows(contiguous(call.dq, call.T, call.K), r.out_dtype, row, t, head);
        r.dk = rows(contiguous(call.dk, call.S, call.K), r.out_dtype, row, t, head);
        r.dv = rows(contiguous(call.dv, call.S, call.V), r.out_dtype, row, t, head);
        const uint8_t* mask = mask_of(sequence);
        r.key_mask = mask == nullptr ? nullptr : mask + t0;
        r.query_mask = call.T == call.S ? r.key_mask : nullptr;
        r.log_decay = gate(call.log_decay, row, t, head);
        r.beta = gate(call.beta, row, t, head);
        r.dlog_decay = gate_gradient(call.dlog_decay, row, t, head);
        r.dbeta = gate_gradient(call.dbeta, row, t, head);
        r.dgate_stride = mirrored_ ? -call.H : call.H;
        r.starts = t0 == 0;
        r.mirrored = mirrored_;
        r.divisor.divides = call.norm_const != 0;
        r.divisor.constant = !call.causal;
        r.divisor.p = r.divisor.divides ? p_[size_t(head)] : 0;
        r.divisor.count = call.causal ? seen(sequence) + real_before : real_[size_t(sequence)];
        return r;
    }

    const Call& call;
    const Kernels& kernels;

  private:
    friend class Erasing;
    static constexpr int64_t kMaxHeads = 16;
    static constexpr int64_t kOffset = 16;  // floats that keep what follows on a cache line of its own

    int64_t turn_size() const { return (kTurn + chunk_ - 1) / chunk_ * chunk_; }
    static int64_t num_turns(int64_t tokens, int64_t turn) { return tokens > 0 ? (tokens + turn - 1) / turn : 1; }

    // Floats of a state in scratch, and of what rounding took from it: half as many bytes, rows and columns padded.
    int64_t waiting_size() const { return (state_size() + 15) / 16 * 16; }
    int64_t lost_size() const { return (call.K + 15) / 16 * 16 * ((call.V + 15) / 16 * 16) / 2; }

    int64_t scratch_size() const {
        return (call.beta.data != 0 ? kernels.erase_scratch_size : kernels.scratch_size)(call.K, call.V, chunk_);
    }

    void choose_chunk() {
        // 32 tokens: scores cost little beside the states, and all of it fits the first cache. Measured fastest or near
        // it from K = V = 32 to 128, float32 and bfloat16.
        int64_t C = call.chunk > 0 ? call.chunk : call.causal || decays() ? 32 : 64;
        if (C > 128) C = 128;
        chunk_ = (C + 15) / 16 * 16;
    }

    int64_t row_of(int64_t sequence) const { return call.boundaries != 0 ? 0 : sequence; }

    const uint8_t* mask_of(int64_t sequence) const {
        if (call.mask == 0) return nullptr;
        if (mirrored_) return mirrored_mask_.data() + row_of(sequence) * call.S;
        return pointer<uint8_t>(call.mask) + row_of(sequence) * call.mask_row;
    }

    View contiguous(int64_t data, int64_t T, int64_t D) const { return {data, T * call.H * D, call.H * D, D}; }

    Rows rows(const View& view, int64_t dtype, int64_t b, int64_t t, int64_t h) const {
        if (view.data == 0) return {nullptr, 0};
        const int64_t offset = b * view.batch + t * view.token + h * view.head;
        return {pointer<char>(view.data) + offset * kElementSize[dtype], mirrored_ ? -view.token : view.token};
    }

    Gate gate(const View& view, int64_t b, int64_t t, int64_t h) const {
        if (view.data == 0) return {nullptr, 0};
        const int64_t offset = b * view.batch + t * view.token + h * view.head;
        return {pointer<float>(view.data) + offset, mirrored_ ? -view.token : view.token};
    }
    float* gate_gradient(int64_t word, int64_t b, int64_t t, int64_t h) const {
        return word == 0 ? nullptr : pointer<float>(word) + (b * call.T + t) * call.H + h;
    }

    void find_sequences() {
        const int64_t N = call.num_sequences;
        if (call.boundaries == 0) {
            starts_.assign(size_t(N), 0);
            lengths_.assign(size_t(N), call.S);
        } else {
            const int64_t* at = pointer<int64_t>(call.boundaries);
            if (at[0] != 0 || at[N] != call.T) throw BadBoundaries();
            for (int64_t n = 0; n < N; n++) {
                if (at[n + 1] < at[n]) throw BadBoundaries();
                starts_.push_back(at[n]);
                lengths_.push_back(at[n + 1] - at[n]);
            }
        }
        real_ = lengths_;
        for (int64_t n = 0; n < N && call.mask != 0; n++) real_[size_t(n)] = count(mask_of(n), 0, lengths_[size_t(n)]);
    }

    static int64_t count(const uint8_t* mask, int64_t start, int64_t end) {
        if (mask == nullptr) return end - start;
        int64_t sum = 0;
        for (int64_t i = start; i < end; i++) sum += mask[i] != 0;
        return sum;
    }

    void choose_threads() {
        const double tokens = double(call.B) * double(call.T + call.S) / 2 * double(call.H);
        const double most = tokens * double(4 * call.K * call.V) / kWorkOfThread;
        threads_ = most < 1 ? 1 : most < double(call.num_threads) ? int64_t(most) : call.num_threads;
    }

    // Into how many pieces the longest sequence is cut, and how many heads go together. In units of one head's whole
    // time: tasks come in rounds of as many as there are threads, and cutting costs the states of the pieces once more.
    void choose_cuts() {
        int64_t total = 0;
        for (const int64_t length : lengths_) {
            longest_ = length > longest_ ? length : longest_;
            total += length;
        }
        double sequences = longest_ == 0 ? 1 : double(total) / double(longest_);
        if (call.T != call.S) {
            longest_ = call.T > longest_ ? call.T : longest_;
            sequences = double(call.num_sequences);
        }
        const int64_t shortest = 4 * chunk_, pieces_of_longest = call.beta.data != 0 ? 1 : longest_ / shortest;
        const int64_t most = pieces_of_longest < threads_ ? pieces_of_longest : threads_;
        double best = 0;
        for (int64_t pieces = 1; pieces <= most || pieces == 1; pieces++) {
            const double tasks = std::ceil(sequences * double(call.H * pieces));
            const double time = std::ceil(tasks / double(threads_)) / double(pieces) * (pieces > 1 ? 1.4 : 1.0);
            if (pieces == 1 || time < 0.95 * best) {
                best = time;
                cuts_ = pieces;
            }
        }
        const double fewest = std::ceil(std::ceil(sequences * double(call.H * cuts_)) / double(threads_));
        for (heads_ = call.H < kMaxHeads ? call.H : kMaxHeads; heads_ > 1; heads_--) {
            const int64_t groups = (call.H + heads_ - 1) / heads_;
            const double rounds = std::ceil(std::ceil(sequences * double(groups * cuts_)) / double(threads_));
            if (rounds * double(heads_) <= 1.05 * fewest) break;
        }
        if (heads_ < 1) heads_ = 1;
    }

    void cut() {
        for (int64_t n = 0; n < call.num_sequences; n++) {
            const int64_t length = lengths_[size_t(n)], queries = call.T == call.S ? length : call.T;
            const int64_t size = length > queries ? length : queries;
            const int64_t num = cuts_ == 1 || size == 0 ? 1 : (size * cuts_ + longest_ - 1) / longest_;
            int64_t before = 0;
            for (int64_t i = 0; i < num; i++) {
                const int64_t start = edge(length, i, num), end = edge(length, i + 1, num);
                pieces_.push_back(
                    {n, start, end, edge(queries, i, num), edge(queries, i + 1, num), before, i == 0, i == num - 1});
                if (num > 1) before += count(mask_of(n), start, end);
            }
        }
        first_turns_ = {0};
        for (const Piece& piece : pieces_)
            first_turns_.push_back(first_turns_.back() + num_turns(piece.end - piece.start, turn_size()));
        for (int64_t i = 0; i < num_pieces(); i++)
            for (int64_t h = 0; h < call.H; h += heads_)
                tasks_.push_back({i, h, h + heads_ < call.H ? h + heads_ : call.H});
    }

    void mirror_mask() {
        if (call.mask == 0) return;
        mirrored_mask_.resize(size_t(call.B * call.S));
        for (int64_t b = 0; b < call.B; b++) {
            const uint8_t* row = pointer<uint8_t>(call.mask) + b * call.mask_row;
            std::reverse_copy(row, row + call.S, mirrored_mask_.data() + b * call.S);
        }
    }

    // Where piece i of num begins: a whole number of chunks.
    int64_t edge(int64_t length, int64_t i, int64_t num) const {
        return i == num ? length : length * i / num / chunk_ * chunk_;
    }

    const bool mirrored_;
    std::vector<uint8_t> mirrored_mask_;  // [B, S]
    int64_t chunk_ = 0, threads_ = 1, longest_ = 0, cuts_ = 1, heads_ = 1;
    std::vector<int64_t> starts_, lengths_, real_;  // of each sequence
    std::vector<double> p_;                         // of each head
    std::vector<int64_t> first_turns_;  // of each piece, and how many there are
    std::vector<Piece> pieces_;
    std::vector<Task> tasks_;
};

}  // namespace
