// Backward of erase.h over a segment of tokens: forward once more from the state before it, keeping every tile, then
// back over them with D, the gradient of the state after a tile.
//
// With g the gradient of o and y, w those of u and x, in a tile:
//
//     y_j = sum_{i>=j} P_ij g_i + exp(G_n - G_j) k_hat_j D - sum_{i>j} M_ij w_i      w_j = beta_j y_j
//     dv'_j = w_j      dbeta_j = x_j . y_j      dP_ij = g_i . u_j      dM_ij = -w_i . u_j
//     dq_hat_i = exp(G_i) g_i S^T + sum_{j<=i} W_ij dP_ij k_hat_j
//     dk_hat_j = exp(G_n - G_j) u_j D^T - exp(G_j) w_j S^T + sum_{i>=j} W_ij dP_ij q_hat_i
//                + sum_{i>j} W_ij dM_ij k_hat_i + sum_{i<j} W_ji dM_ji k_hat_i
//     D <- exp(G_n) D + sum_i exp(G_i) (q_hat_i^T g_i - k_hat_i^T w_i)
//
// The gradient of log_decay_t sums what each exponent whose span holds t was multiplied by: dP_ij P_ij + dM_ij M_ij for
// j < t <= i, and the terms with S and D of the tokens from t on and before t. Nothing cancels in it, which it would do
// in sums over whole sequences.
#pragma once

#include <new>

#include "erase.h"
#include "erase_gradients.h"

namespace {

// A tile that waits for the way back.
struct Kept : Written {
    Block x;
    float* u_transposed;
    State before;  // S, transposed

    Kept(Scratch& scratch, const Range& range)
        : Written(scratch, range),
          x(scratch.rows(range.chunk, range.V)),
          u_transposed(scratch.take(range.chunk * u.ld)),
          before(scratch, range.V, range.K) {}
};

inline Kept* take_tiles(Scratch& scratch, const Range& range) {
    const int64_t num = tiles_of(range.tokens, range.chunk);
    Kept* tiles = reinterpret_cast<Kept*>(scratch.take(num * int64_t(sizeof(Kept)) / 4));
    for (int64_t i = 0; i < num; i++) new (tiles + i) Kept(scratch, range);
    return tiles;
}

// One call, and the room that its tiles share.
struct EraseBackward {
    const Range& range;
    const int64_t C, K, V;
    Scratch scratch;
    Sum after;                      // D
    State state, after_transposed;  // S on the way there
    const Block q, g, other, dq, dk, dv, y, negative, v;
    float *k_transposed, *scores, *dp, *dm;
    Kept* tiles;
    UnitScale q_scale;
    DecayGradient decay;
    Ahead ahead;

    EraseBackward(const Range& range, float* memory)
        : range(range),
          C(range.chunk),
          K(range.K),
          V(range.V),
          scratch(memory),
          after(scratch, range, K, V),
          state(scratch, K, V),
          after_transposed(scratch, V, K),
          q(scratch.rows(C, K)),
          g(scratch.rows(C, V)),
          other(scratch.rows(C, K)),
          dq(scratch.rows(C, K)),
          dk(scratch.rows(C, K)),
          dv(scratch.rows(C, V)),
          y(scratch.rows(C, V)),
          negative(scratch.rows(C, V)),
          v(scratch.rows(C, V)),
          k_transposed(scratch.take(C * q.ld)),
          scores(scratch.take(C * C + 16)),
          dp(scratch.take(C * C + 16)),
          dm(scratch.take(C * C + 16)),
          tiles(take_tiles(scratch, range)) {}

    void run() {
        const int64_t num = tiles_of(range.tokens, C);
        int64_t count = range.divisor.count;
        state.load(range.before);
        for (int64_t i = 0; i < num; i++) {
            const int64_t t = i * C, n = smaller(C, range.tokens - t);
            keep(tiles[i], t, n, count, i + 1 == num);
            count += count_real(range.key_mask, t, n);
        }
        after.load(range.state);
        for (int64_t i = num - 1; i >= 0; i--) {
            const int64_t t = i * C, n = smaller(C, range.tokens - t);
            load(tiles[i], t, n);
            find_scores(tiles[i], n);
            find_written(tiles[i], t, n);
            find_through_scores(tiles[i], n);
            find_through_states(tiles[i], t, n);
            add_scores(tiles[i], n);
            if (t > 0 || range.state_out != nullptr) pass_on(tiles[i], n);
            store(tiles[i], t, n);
        }
        after.store(range.state_out);
    }

    void keep(Kept& tile, int64_t t, int64_t n, int64_t count, bool is_last) {
        ahead.clear();
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        tile.find(range, t, n, count, state, tile.x.data, k_transposed, other, ahead);
        transpose_rows(tile.u_transposed, C, tile.u.data, tile.u.ld, n);
        if (tile.gates.decays) scale_rows(tile.u, tile.u, tile.gates.to_end, 1, n);
        state.transpose_to(tile.before);
        if (is_last) return;
        const Product written = {tile.k.data, 1, tile.k.ld, tile.u.data, tile.u.ld, n};
        multiply_onto(K, state.ld, &written, 1, {state.data, tile.gates.whole, state.data, state.ld}, ahead, keep_all);
        state.is_zero = false;
    }

    void load(const Kept& tile, int64_t t, int64_t n) {
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.q, t - C, K, false);
        ask(ahead, range, range.grad, t - C, V, false);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, q_scale);
        load_rows(g, range.grad, range.dtype, t, n, range.query_mask);
        after.transpose_to(after_transposed);
        transpose_rows(k_transposed, C, tile.k.data, tile.k.ld, n);
    }

    // P and dP.
    void find_scores(const Kept& tile, int64_t n) {
        multiply_lower(n, {q.data, q.ld, 1, k_transposed, C, K}, scores, C, ahead);
        weigh_lower(scores, tile.weight, nullptr, 1, C, n);
        multiply_lower(n, {g.data, g.ld, 1, tile.u_transposed, C, V}, dp, C, ahead);
    }

    // y, w in dv, and the gradient of beta.
    void find_written(const Kept& tile, int64_t t, int64_t n) {
        if (tile.gates.decays) scale_rows(other, tile.k, tile.gates.to_end, 1, n);
        const Block& k = tile.gates.decays ? other : tile.k;
        const Product for_y[] = {times(k, after, K), {scores, 1, C, g.data, g.ld, n}};
        multiply(n, y.ld, for_y, 2, y.data, nullptr, y.ld, ahead, keep_upper);
        solve_transposed(n, y.ld, tile.minus, C, {y.data, tile.gates.beta, y.data, dv.data, y.ld, 1}, ahead);
        store_beta_gradient(range, t, n, tile.x, y);
    }

    // dM, both times their weights; g and -w as S meets them.
    void find_through_scores(const Kept& tile, int64_t n) {
        scale_rows(negative, dv, nullptr, -1, n);
        multiply_lower(n, {negative.data, negative.ld, 1, tile.u_transposed, C, V}, dm, C, ahead);
        if (tile.gates.decays) {
            weigh_gradients(dp, dm, scores, tile.weight, tile.minus, C, n, decay);
            scale_rows(g, g, tile.gates.since, 1, n);
            scale_rows(negative, negative, tile.gates.since, 1, n);
        }
        clear_diagonal(dm, C, n);
    }

    // What of dq and dk comes through S and D, and the gradient of log_decay.
    void find_through_states(const Kept& tile, int64_t t, int64_t n) {
        const Block& k = tile.k;
        const Product of_both[] = {times(negative, tile.before, V), times(tile.u, after_transposed, V)};
        multiply(n, dq.ld, times(g, tile.before, V), dq.data, nullptr, dq.ld, ahead);
        if (!tile.gates.decays) return multiply(n, dk.ld, of_both, 2, dk.data, nullptr, dk.ld, ahead, keep_all);
        multiply(n, dk.ld, of_both[0], dk.data, nullptr, dk.ld, ahead);
        multiply(n, other.ld, of_both[1], other.data, nullptr, other.ld, ahead);
        decay.add_rows(n, [&](int64_t i, const float* row) { return dot(q.row(i), row, q.ld); },
                       [&](int64_t i, const float* row) { return dot(k.row(i), row, k.ld); }, dq, dk, other);
        decay.whole = double(tile.gates.whole) * dot(after_transposed.data, tile.before.data, V * k.ld);
        if (range.dlog_decay != nullptr) decay.store(range, t, n);
    }

    void add_scores(const Kept& tile, int64_t n) {
        const Block& k = tile.k;
        const Product for_q = {dp, C, 1, k.data, k.ld, n};
        const Product for_k[] = {
            {dp, 1, C, q.data, q.ld, n}, {dm, 1, C, k.data, k.ld, n}, {dm, C, 1, k.data, k.ld, n}};
        multiply_onto(n, dq.ld, &for_q, 1, {dq.data, 1, dq.data, dq.ld}, ahead, keep_lower_rows);
        multiply_onto(n, dk.ld, for_k, 3, {dk.data, 1, dk.data, dk.ld}, ahead,
                      [](int64_t i0, int64_t i1, int p, Product& product) {
                          p < 2 ? narrow_upper(i0, i1, product) : narrow_lower(i0, i1, product);
                      });
    }

    // D before the tile.
    void pass_on(const Kept& tile, int64_t n) {
        const Product added[] = {{q.data, 1, q.ld, g.data, g.ld, n},
                                 {tile.k.data, 1, tile.k.ld, negative.data, negative.ld, n}};
        decay_sum(after, tile.gates.whole);
        multiply(K, after.ld, added, 2, after.data, after.lost, after.ld, ahead, keep_all);
        after.is_zero = false;
    }

    void store(const Kept& tile, int64_t t, int64_t n) {
        store_unit_gradient(range.dq, range.dtype, t, n, range.query_mask, dq, q, q_scale);
        if (tile.divisor.divides) {
            load_rows(v, range.v, range.dtype, t, n, range.key_mask);
            scale_rows(dv, dv, tile.divisor.weight, 1, n);
        }
        store_key_gradients(range, t, n, dk, dv, tile.k, v, tile.scale, tile.divisor);
    }
};

void erase_backward(const Range& range, float* memory) { EraseBackward(range, memory).run(); }

// Bound for both passes.
int64_t erase_scratch_size(int64_t K, int64_t V, int64_t chunk) {
    const int64_t Kp = round_up(K, 16), Vp = round_up(V, 16), scores = chunk * chunk + 16;
    const int64_t tile = chunk * (Kp + 3 * Vp) + 2 * scores + Kp * Vp + round_up(sizeof(Kept), 64) / 4;
    return 3 * Kp * Vp + 5 * chunk * (Kp + Vp) + 3 * scores + tiles_of(kTurn, chunk) * tile;
}

}  // namespace
