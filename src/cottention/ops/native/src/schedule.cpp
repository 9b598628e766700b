// The calls of the C interface.
//
// Where sequences are cut into pieces, the state that each piece adds is computed first, an exclusive sum over the
// pieces gives the state that each starts from, and then all run at once. Sums run in the order of the pieces whoever
// computed them, so the result depends on the number of threads alone.
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "abi.h"
#include "erasing.h"
#include "gates.h"
#include "plan.h"

namespace {

// Sums over pieces run in double: they may be many, and the first of them large.
typedef std::vector<double> Doubles;

void add_to(Doubles& sum, const float* x) {
    for (size_t i = 0; i < sum.size(); i++) sum[i] += x[i];
}

void store(float* to, const Doubles& sum) {
    for (size_t i = 0; i < sum.size(); i++) to[i] = float(sum[i]);
}

// What is kept of a state over a piece.
double kept_over(const Plan& plan, const Piece& piece, int64_t head) {
    if (!plan.decays()) return 1;
    const Range range = plan.range(piece.sequence, head, piece.start, piece.end, 0);
    double sum = 0;
    for (int64_t t = 0; t < range.tokens; t++) sum += log2_kept(range, t);
    return std::exp2(sum);
}

// Turns the pieces' own states into those that each starts from: `initial` of its sequence and all pieces before it
// (reversed: after it), of which each piece keeps its part.
void sum_before(const Plan& plan, const Floats& states, int64_t initial, bool reversed) {
    const int64_t size = plan.state_size(), num = plan.num_pieces();
    const Floats own = floats(size);
    Doubles running(size_t(size), 0.0);
    for (int64_t head = 0; head < plan.call.H; head++) {
        for (int64_t j = 0; j < num; j++) {
            const int64_t i = reversed ? num - 1 - j : j;
            const Piece& piece = plan.piece(i);
            float* state = plan.state_of(states, i, head);
            if (reversed ? piece.is_last : piece.is_first) {
                const float* start = plan.state_of(initial, piece.sequence, head);
                running.assign(size_t(size), 0.0);
                if (start != nullptr) add_to(running, start);
            }
            memcpy(own.get(), state, size_t(size) * sizeof(float));
            store(state, running);
            const double kept = kept_over(plan, piece, head);
            for (double& x : running) x *= kept;
            add_to(running, own.get());
        }
    }
}

// What each piece adds to the state: S from its keys, or D, the gradient of S, from its queries.
void own_states(const Plan& plan, bool of_gradients, const Floats& states) {
    plan.run(1, [&](int64_t, int64_t i, float* scratch) {
        const Task& task = plan.task(i);
        const Piece& piece = plan.piece(task);
        // nothing starts from the last one
        const bool is_needed = !plan.call.causal || !(of_gradients ? piece.is_first : piece.is_last);
        for (int64_t h = task.first_head; h < task.last_head; h++)
            memset(plan.state_of(states, task.piece, h), 0, size_t(plan.state_size()) * sizeof(float));
        if (!is_needed) return;
        const auto kernel = of_gradients ? plan.kernels.query_state : plan.kernels.key_state;
        plan.walk(kernel, task, {of_gradients, false, false}, scratch,
                  [&](Range& range, int64_t head) { range.state_out = plan.state_of(states, task.piece, head); });
    });
}

// The states that pieces start from (gradients: end with); null when sequences are whole and start from the caller's.
Floats starting_states(const Plan& plan, bool of_gradients) {
    if (!plan.is_cut()) return nullptr;
    Floats states = floats(plan.num_pieces() * plan.call.H * plan.state_size());
    own_states(plan, of_gradients, states);
    sum_before(plan, states, of_gradients ? plan.call.grad_final : plan.call.kv, of_gradients);
    return states;
}

// Sums over all tokens into total [N, H, K, V].
void whole_states(const Plan& plan, bool of_gradients, float* total) {
    const int64_t size = plan.call.H * plan.state_size();
    const Floats states = floats(plan.num_pieces() * size);
    own_states(plan, of_gradients, states);
    Doubles sum;
    for (int64_t i = 0; i < plan.num_pieces(); i++) {
        const Piece& piece = plan.piece(i);
        if (piece.is_first) sum.assign(size_t(size), 0.0);
        add_to(sum, plan.state_of(states, i, 0));
        if (piece.is_last) store(total + piece.sequence * size, sum);
    }
}

void write_seen(const Call& call, const Plan& plan) {
    if (call.final_seen == 0) return;
    for (int64_t n = 0; n < call.num_sequences; n++)
        pointer<int64_t>(call.final_seen)[plan.row_of_state(n)] = plan.seen(n) + plan.real(n);
}

void forward_bidirectional(const Plan& plan) {
    const Call& call = plan.call;
    whole_states(plan, false, pointer<float>(call.final_kv));
    plan.run(1, [&](int64_t, int64_t i, float* scratch) {
        const Task& task = plan.task(i);
        plan.walk(plan.kernels.full_forward, task, {true, false, true}, scratch, [&](Range& range, int64_t head) {
            range.state = plan.state_of(call.final_kv, plan.piece(task).sequence, head);
        });
    });
}

void forward_causal(const Plan& plan) {
    const Call& call = plan.call;
    const Floats states = starting_states(plan, false);
    plan.run(1, [&](int64_t, int64_t i, float* scratch) {
        const Task& task = plan.task(i);
        const Piece& piece = plan.piece(task);
        plan.walk(plan.kernels.causal_forward, task, {false, false, false}, scratch, [&](Range& range, int64_t head) {
            range.state =
                states ? plan.state_of(states, task.piece, head) : plan.state_of(call.kv, piece.sequence, head);
            range.state_out = piece.is_last ? plan.state_of(call.final_kv, piece.sequence, head) : nullptr;
        });
    });
}

// Bidirectional attention with decay is causal, and causal once more from the last token to the first.
template <class F>
void both_ways(const Call& call, F function) {
    function(Plan(call, false));
    function(Plan(call, true));
}

// A result [B, T, H, D] of both ways, in float where the caller's numbers are shorter.
class SumOfWays {
  public:
    SumOfWays(const Call& call, const View& to, int64_t D)
        : call_(call), to_(to), D_(D), sum_(call.dtype == kFloat32 ? nullptr : floats(call.B * call.T * call.H * D)) {}

    View view() const {
        return sum_ ? View{int64_t(sum_.get()), call_.T * call_.H * D_, call_.H * D_, D_} : to_;
    }
    // To the caller, where it is not there already.
    void round() const {
        if (!sum_) return;
        auto body = [&](int64_t i) {
            const float* from = sum_.get() + i * call_.H * D_;
            for (int64_t head = 0; head < call_.H; head++, from += D_) {
                const int64_t at = i / call_.T * to_.batch + i % call_.T * to_.token + head * to_.head;
                if (call_.dtype == kBFloat16) {
                    for (int64_t d = 0; d < D_; d++) narrow(from[d], pointer<BFloat16>(to_.data) + at + d);
                } else {
                    for (int64_t d = 0; d < D_; d++) narrow(from[d], pointer<Float16>(to_.data) + at + d);
                }
            }
        };
        run_tasks(call_.B * call_.T, call_.num_threads, body);
    }

  private:
    const Call& call_;
    const View to_;
    const int64_t D_;
    const Floats sum_;
};

void forward_both_ways(const Call& call) {
    const SumOfWays o(call, call.o, call.V);
    Call in_float = call;
    in_float.o = o.view();
    both_ways(in_float, forward_causal);
    o.round();
}

void forward(const Call& call) {
    if (!call.causal && call.log_decay.data != 0) return forward_both_ways(call);
    const Plan plan(call);
    if (call.beta.data != 0) {
        Erasing(plan).forward();
    } else {
        (call.causal ? forward_causal : forward_bidirectional)(plan);
    }
    if (call.causal) write_seen(call, plan);
}

// The states at both ends of a causal piece, for one of the two passes of backward.
struct Ends {
    const Plan& plan;
    const Floats states, gradients;

    void set(Range& range, const Task& task, int64_t head, bool of_gradients) const {
        const Piece& piece = plan.piece(task);
        const Floats& own = of_gradients ? gradients : states;
        const int64_t whole = of_gradients ? plan.call.grad_final : plan.call.kv;
        range.state = own ? plan.state_of(own, task.piece, head) : plan.state_of(whole, piece.sequence, head);
        range.state_out = of_gradients && piece.is_first ? plan.state_of(plan.call.dkv, piece.sequence, head) : nullptr;
    }
};

// What one pass of backward leaves for the gradients of decays in the other: q~ . dq~ of each token, and the state at the
// end of each turn.
class Reached {
  public:
    explicit Reached(const Plan& plan)
        : plan_(plan),
          of_queries_(floats(plan.call.B * plan.call.T * plan.call.H)),
          states_(floats(plan.num_turns() * plan.call.H * plan.state_size())),
          offsets_(size_t(plan.num_turns() * plan.call.H), 0.0) {}

    // For the pass forward in time, which goes on from what it leaves here.
    void keep(Range& range, const Turn& turn, int64_t sequence) {
        range.of_queries = of_queries(turn, sequence);
        range.state_out = state(turn.index, turn.head);
        range.offset_out = &offset(turn.index, turn.head);
        if (turn.is_first) return;
        range.state = state(turn.index - 1, turn.head);
        range.offset = offset(turn.index - 1, turn.head);
    }
    void give(Range& range, const Turn& turn, int64_t sequence) {
        range.of_queries = of_queries(turn, sequence);
        range.reached = state(turn.index, turn.head);
        range.reached_offset = offset(turn.index, turn.head);
    }

  private:
    float* of_queries(const Turn& turn, int64_t sequence) {
        return of_queries_.get() + plan_.place(sequence, turn.head, turn.start);
    }
    float* state(int64_t turn, int64_t head) { return plan_.state_of(states_, turn, head); }
    double& offset(int64_t turn, int64_t head) { return offsets_[size_t(turn * plan_.call.H + head)]; }

    const Plan& plan_;
    const Floats of_queries_, states_;
    std::vector<double> offsets_;
};

void backward_causal(const Plan& plan, std::vector<double>& dp) {
    const Ends ends{plan, starting_states(plan, false), starting_states(plan, true)};
    const auto pass = [&](bool of_gradients, const Task& task, float* scratch, auto also) {
        const auto kernel = of_gradients ? plan.kernels.causal_backward_kv : plan.kernels.causal_backward_q;
        const auto set = [&](Range& range, int64_t head) {
            ends.set(range, task, head, of_gradients);
            range.dp = &dp[size_t(task.piece * plan.call.H + head)];
        };
        plan.walk(kernel, task, {false, of_gradients, false}, scratch, set, also);
    };
    if (!plan.decays()) {
        plan.run(2, [&](int64_t round, int64_t i, float* scratch) {  // the longer tasks first
            pass(round == 0, plan.task(i), scratch, [](Range&, const Turn&) {});
        });
        return;
    }
    Reached reached(plan);
    plan.run(1, [&](int64_t, int64_t i, float* scratch) {
        const int64_t sequence = plan.piece(plan.task(i)).sequence;
        pass(false, plan.task(i), scratch, [&](Range& range, const Turn& turn) { reached.keep(range, turn, sequence); });
    });
    plan.run(1, [&](int64_t, int64_t i, float* scratch) {
        const int64_t sequence = plan.piece(plan.task(i)).sequence;
        pass(true, plan.task(i), scratch, [&](Range& range, const Turn& turn) { reached.give(range, turn, sequence); });
    });
}

void backward_bidirectional(const Plan& plan, std::vector<double>& dp) {
    const Call& call = plan.call;
    const Floats total = floats(call.num_sequences * call.H * plan.state_size());
    whole_states(plan, true, total.get());
    plan.run(2, [&](int64_t round, int64_t i, float* scratch) {
        const Task& task = plan.task(i);
        const int64_t sequence = plan.piece(task).sequence;
        const bool for_keys = round == 0;
        const auto kernel = for_keys ? plan.kernels.full_backward_kv : plan.kernels.full_backward_q;
        plan.walk(kernel, task, {!for_keys, false, true}, scratch, [&](Range& range, int64_t head) {
            range.state = for_keys ? plan.state_of(total, sequence, head) : plan.state_of(call.kv, sequence, head);
            range.dp = &dp[size_t(task.piece * call.H + head)];
        });
    });
}

void backward_both_ways(const Call& call, std::vector<double>& dp) {
    const auto sum_of = [&](int64_t data, int64_t D) {
        return SumOfWays(call, {data, call.T * call.H * D, call.H * D, D}, D);
    };
    const SumOfWays dq = sum_of(call.dq, call.K), dk = sum_of(call.dk, call.K), dv = sum_of(call.dv, call.V);
    Call in_float = call;
    in_float.dq = dq.view().data;
    in_float.dk = dk.view().data;
    in_float.dv = dv.view().data;
    both_ways(in_float, [&](const Plan& way) { backward_causal(way, dp); });
    for (const SumOfWays* each : {&dq, &dk, &dv}) each->round();
}

void backward(const Call& call) {
    const Plan plan(call);
    std::vector<double> dp(size_t(plan.num_pieces() * call.H), 0.0);
    if (call.beta.data != 0) {
        Erasing(plan).backward(dp);
    } else if (!call.causal && plan.decays()) {
        backward_both_ways(call, dp);
    } else {
        (call.causal ? backward_causal : backward_bidirectional)(plan, dp);
    }
    for (int64_t head = 0; head < call.H && call.dm != 0 && call.norm_const != 0; head++) {
        double sum = 0;
        for (int64_t i = 0; i < plan.num_pieces(); i++) sum += dp[size_t(i * call.H + head)];
        pointer<float>(call.dm)[head] = float(sum * plan.p(head) * (1 - plan.p(head)));
    }
}

void step(const Call& call) {
    const Plan plan(call);
    const auto kernel = call.log_decay.data != 0 || call.beta.data != 0 ? plan.kernels.gated_step : plan.kernels.step;
    plan.run(1, [&](int64_t, int64_t i, float* scratch) {
        const Task& task = plan.task(i);
        const int64_t row = plan.row_of_state(plan.piece(task).sequence);
        plan.walk(kernel, task, {false, false, false}, scratch, [&](Range& range, int64_t head) {
            range.state = plan.state_of(call.kv, row, head);
            range.state_out = plan.state_of(call.final_kv, row, head);
        });
    });
    write_seen(call, plan);
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

const char* cottention_call_layout() {
    static const std::string layout = [] {
        std::string lines;
        const auto add = [&](const char* name, size_t offset) { lines += name + (" " + std::to_string(offset) + "\n"); };
#define COTTENTION_WORD(name) add(#name, offsetof(Call, name));
#define COTTENTION_VIEW(name)                          \
    add(#name "_data", offsetof(Call, name.data));     \
    add(#name "_batch", offsetof(Call, name.batch));   \
    add(#name "_token", offsetof(Call, name.token));   \
    add(#name "_head", offsetof(Call, name.head));
        COTTENTION_CALL(COTTENTION_WORD, COTTENTION_VIEW)
#undef COTTENTION_WORD
#undef COTTENTION_VIEW
        return lines + "size " + std::to_string(sizeof(Call));
    }();
    return layout.c_str();
}

int cottention_forward(const Call* call) { return guarded(forward, call); }
int cottention_backward(const Call* call) { return guarded(backward, call); }
int cottention_step(const Call* call) { return guarded(step, call); }
