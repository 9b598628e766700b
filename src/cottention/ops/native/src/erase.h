// The delta rule over the tokens of one sequence and head: S forgets, and a key overwrites what S has in its direction.
//
// In a tile, S the state before it, W and G of erase_gates.h:
//
//     x_i = v'_i - exp(G_i) k_hat_i S - sum_{j<i} M_ij u_j      u_i = beta_i x_i      M_ij = W_ij k_hat_i . k_hat_j
//     o_i = exp(G_i) q_hat_i S + sum_{j<=i} P_ij u_j                                  P_ij = W_ij q_hat_i . k_hat_j
//     S  <- exp(G_n) S + sum_j exp(G_n - G_j) k_hat_j^T u_j
//
// x is what the values are off from what S holds. Its system is solved in panels, see panels.h, at the speed of the
// products beside it.
#pragma once

#include "erase_gates.h"
#include "panels.h"

namespace {

// The keys' side of a tile: all that S and later tokens get to see of it.
struct Written {
    Block k, u;
    float *minus, *weight;  // -M, and W where there is decay
    Gates gates;
    UnitScale scale;
    Weights divisor;

    Written(Scratch& scratch, const Range& range)
        : k(scratch.rows(range.chunk, range.K)),
          u(scratch.rows(range.chunk, range.V)),
          minus(scratch.take(range.chunk * range.chunk + 16)),
          weight(range.log_decay.data == nullptr ? nullptr : scratch.take(range.chunk * range.chunk + 16)) {}

    // Loads n tokens from t on, after `count` real ones, and solves for u and, unless null, x.
    // k_transposed and negative: room for k^T and for k.
    void find(const Range& range, int64_t t, int64_t n, int64_t count, const State& state, float* x,
              float* k_transposed, const Block& negative, Ahead& ahead) {
        const int64_t C = range.chunk;
        gates.set(range, t, n, weight, C);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, nullptr, scale);
        load_rows(u, range.v, range.dtype, t, n, range.key_mask);
        divisor.set(range.divisor, range.key_mask, t, n, count);
        if (divisor.divides) scale_rows(u, u, divisor.weight, 1, n);
        transpose_rows(k_transposed, C, k.data, k.ld, n);
        scale_rows(negative, k, nullptr, -1, n);
        multiply_lower(n, {negative.data, negative.ld, 1, k_transposed, C, range.K}, minus, C, ahead);
        weigh_lower(minus, weight, nullptr, 1, C, n);
        if (gates.decays) scale_rows(negative, negative, gates.since, 1, n);
        const Product known = {negative.data, negative.ld, 1, state.data, state.ld, state.depth_of(range.K)};
        solve(n, u.ld, known, {minus, C, 1, nullptr, 0, 0}, {u.data, gates.beta, x, u.data, u.ld, 1}, ahead);
    }
};

void erase_forward(const Range& range, float* memory) {
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    Sum state(scratch, range, K, V);
    Written written(scratch, range);
    const Block &k = written.k, &u = written.u;
    const Gates& gates = written.gates;
    const Block q = scratch.rows(C, K), negative = scratch.rows(C, K), o = scratch.rows(C, V);
    float *k_transposed = scratch.take(C * k.ld), *scores = scratch.take(C * C + 16);
    state.load(range.state);
    UnitScale q_scale;
    Ahead ahead;
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        ahead.clear();
        if (range.o.data != nullptr) {
            ask(ahead, range, range.o, t, V, true);
            ask(ahead, range, range.q, t + C, K, false);
        }
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        written.find(range, t, n, count, state, nullptr, k_transposed, negative, ahead);
        count += count_real(range.key_mask, t, n);
        if (range.o.data != nullptr) {
            load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, q_scale);
            multiply_lower(n, {q.data, q.ld, 1, k_transposed, C, K}, scores, C, ahead);
            weigh_lower(scores, written.weight, nullptr, 1, C, n);
            if (gates.decays) scale_rows(q, q, gates.since, 1, n);
            const Product products[] = {times(q, state, K), {scores, C, 1, u.data, u.ld, n}};
            multiply(n, o.ld, products, 2, o.data, nullptr, o.ld, ahead, keep_lower);
            store_rows(range.o, range.dtype, t, n, range.query_mask, o);
        }
        if (t + C >= range.tokens && range.state_out == nullptr) break;
        if (gates.decays) scale_rows(u, u, gates.to_end, 1, n);
        decay_sum(state, gates.whole);
        state.add(k, u, n, ahead);
    }
    state.store(range.state_out);
}

}  // namespace
