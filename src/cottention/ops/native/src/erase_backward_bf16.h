// erase_backward.h for bfloat16 tokens with AVX512-BF16: the same tile by tile, all products but the systems in pairs.
#pragma once

#include <new>

#include "erase_bf16.h"
#include "erase_gradients.h"

namespace {

// A tile that waits for the way back.
struct KeptPairs : WrittenPairs {
    Block x;
    Words u_rows, u_transposed;  // u as D meets it, and as it is
    Words before;                // S, transposed
    bool starts_from_zero = true;

    KeptPairs(Scratch& scratch, const Range& range, const Block& u)
        : WrittenPairs(scratch, range, u),
          x(scratch.rows(range.chunk, range.V)),
          u_rows(take_rows(scratch, range.chunk, range.V)),
          u_transposed(take_transposed(scratch, range.chunk, range.V)),
          before(take_transposed(scratch, range.K, range.V)) {}

    // u of n tokens, which is left as D meets it; S in rows of pairs.
    void keep(int64_t n, const State& state, const Words& state_rows) {
        const int64_t rows = round_up(n, kWidth);
        round_rows(u_rows, u.data, u.ld, rows);
        transpose_words(u_transposed, u_rows, n);
        if (gates.decays) {
            scale_rows(u, u, gates.to_end, 1, n);
            round_rows(u_rows, u.data, u.ld, rows);
        }
        starts_from_zero = state.is_zero;
        if (starts_from_zero) return;
        round_rows(state_rows, state.data, state.ld, round_up(state.K, kWidth));
        transpose_words(before, state_rows, state.K);
    }
    int64_t depth_of(int64_t depth) const { return starts_from_zero ? 0 : depth; }
};

// Rows of pairs, each number times its row's factor.
inline void scale_word_rows(const Words& words, const float* factors, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < words.ld; d += kWidth) {
            float* at = words.row(i) + d;
            store_words(at, scale_numbers(load_words(at), Vector::set1(factors[i])));
        }
}

inline float dot(const Words& words, int64_t i, const float* row, int64_t D) {
    return dot(reinterpret_cast<const uint16_t*>(words.row(i)), row, D);
}

// The sum of products of all numbers of two matrices, transposed alike.
inline float dot_all(const Words& a, const Words& b, int64_t D) {
    __m512 sum = Vector::zero();
    for (int64_t i = 0; i < pairs(D) * a.ld; i += kWidth)
        sum = DotPairs::apply((__m512)load_words(a.data + i), (__m512)load_words(b.data + i), sum);
    return Vector::sum(sum);
}

// Lower triangles as left sides: in rows, or transposed.
inline const auto keep_triangle = [](int64_t i0, int64_t i1, int p, Product& product) {
    p < 2 ? narrow_upper(i0 / 2, 0, product) : keep_lower_pairs(i0, i1, 1, product);
};

// One call, and the room that its tiles share.
struct EraseBackward {
    const Range& range;
    const int64_t C, K, V;
    Scratch scratch;
    Sum after;    // D
    State state;  // S on the way there
    const StatePairs state_pairs, after_pairs;
    const Words state_rows, after_transposed;
    const Words q_rows, q_pairs, g_rows, g_pairs, w_rows, w_pairs, k_transposed, u_pairs;  // of w the negative
    const Words dp_rows, dp_pairs, dm_rows, dm_pairs;
    const Block dq, dk, other, dv, y, w, u;
    float *scores, *dp, *dm;
    KeptPairs* tiles;
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
          state_pairs(scratch, K, V),
          after_pairs(scratch, K, V),
          state_rows(take_rows(scratch, K, V)),
          after_transposed(take_transposed(scratch, K, V)),
          q_rows(take_rows(scratch, C, K)),
          q_pairs(take_interleaved(scratch, C, K)),
          g_rows(take_rows(scratch, C, V)),
          g_pairs(take_interleaved(scratch, C, V)),
          w_rows(take_rows(scratch, C, V)),
          w_pairs(take_interleaved(scratch, C, V)),
          k_transposed(take_transposed(scratch, C, K)),
          u_pairs(take_interleaved(scratch, C, V)),
          dp_rows(take_rows(scratch, C, C)),
          dp_pairs(take_interleaved(scratch, C, C)),
          dm_rows(take_rows(scratch, C, C)),
          dm_pairs(take_interleaved(scratch, C, C)),
          dq(scratch.rows(C, K)),
          dk(scratch.rows(C, K)),
          other(scratch.rows(C, K)),
          dv(scratch.rows(C, V)),
          y(scratch.rows(C, V)),
          w(scratch.rows(C, V)),
          u(scratch.rows(C, V)),
          scores(scratch.take(C * C + 16)),
          dp(scratch.take(C * C + 16)),
          dm(scratch.take(C * C + 16)),
          tiles(take_tiles()) {}

    KeptPairs* take_tiles() {
        const int64_t num = tiles_of(range.tokens, C);
        KeptPairs* first = reinterpret_cast<KeptPairs*>(scratch.take(num * int64_t(sizeof(KeptPairs)) / 4));
        for (int64_t i = 0; i < num; i++) new (first + i) KeptPairs(scratch, range, u);
        return first;
    }

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

    void keep(KeptPairs& tile, int64_t t, int64_t n, int64_t count, bool is_last) {
        ahead.clear();
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        state_pairs.renew(state);
        tile.find(range, t, n, count, state, state_pairs, tile.x.data, k_transposed, y, ahead);
        tile.keep(n, state, state_rows);
        if (is_last) return;
        interleave(u_pairs, u.data, u.ld, n);
        const Product written = product(tile.k_pairs.left_transposed(pairs(n)), u_pairs);
        multiply_onto<DotPairs>(K, state.ld, &written, 1, {state.data, tile.gates.whole, state.data, state.ld}, ahead,
                                keep_all);
        state.is_zero = false;
    }

    Tokens q(int64_t t, int64_t n) const { return of_queries(range, range.q, t, n, K); }

    void load(const KeptPairs& tile, int64_t t, int64_t n) {
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.q, t - C, K, false);
        ask(ahead, range, range.grad, t - C, V, false);
        load_unit_words(q_rows, q(t, n), nullptr, q_scale);
        copy_rows(g_rows, of_queries(range, range.grad, t, n, V));
        interleave(q_pairs, q_rows, n);
        interleave(g_pairs, g_rows, n);
        after_pairs.renew(after);
        if (!after.is_zero) {
            round_rows(state_rows, after.data, after.ld, round_up(K, kWidth));
            transpose_words(after_transposed, state_rows, K);
        }
        transpose_words(k_transposed, tile.k_rows, n);
    }

    // P and dP.
    void find_scores(const KeptPairs& tile, int64_t n) {
        multiply_lower<DotPairs>(n, product(q_rows.left(pairs(K)), k_transposed), scores, C, ahead);
        weigh_lower(scores, tile.weight, nullptr, 1, C, n);
        multiply_lower<DotPairs>(n, product(g_rows.left(pairs(V)), tile.u_transposed), dp, C, ahead);
    }

    // y, w in dv, and the gradient of beta.
    void find_written(const KeptPairs& tile, int64_t t, int64_t n) {
        interleave_lower(dp_pairs, scores, C, n);
        const Product of_after = product(tile.k_rows.left(after.depth_of(pairs(K))), after_pairs.pairs);
        const Product of_scores = product(dp_pairs.left_transposed(pairs(n)), g_pairs);
        multiply<DotPairs>(n, y.ld, of_after, y.data, nullptr, y.ld, ahead);
        if (tile.gates.decays) scale_rows(y, y, tile.gates.to_end, 1, n);
        multiply_onto<DotPairs>(n, y.ld, &of_scores, 1, {y.data, 1, y.data, y.ld}, ahead, keep_triangle);
        solve_transposed(n, y.ld, tile.minus, C, {y.data, tile.gates.beta, y.data, dv.data, y.ld, 1}, ahead);
        store_beta_gradient(range, t, n, tile.x, y);
    }

    // dM, both times their weights; g and -w as S meets them.
    void find_through_scores(const KeptPairs& tile, int64_t n) {
        scale_rows(w, dv, nullptr, -1, n);
        clear_rows_after(w, n);
        round_rows(w_rows, w.data, w.ld, n);
        multiply_lower<DotPairs>(n, product(w_rows.left(pairs(V)), tile.u_transposed), dm, C, ahead);
        if (tile.gates.decays) {
            weigh_gradients(dp, dm, scores, tile.weight, tile.minus, C, n, decay);
            scale_word_rows(g_rows, tile.gates.since, n);
            interleave(g_pairs, g_rows, n);
            scale_rows(w, w, tile.gates.since, 1, n);
            round_rows(w_rows, w.data, w.ld, n);
        }
        clear_diagonal(dm, C, n);
    }

    // What of dq and dk comes through S and D, and the gradient of log_decay.
    void find_through_states(const KeptPairs& tile, int64_t t, int64_t n) {
        const Product of_state = product(g_rows.left(tile.depth_of(pairs(V))), tile.before);
        const Product of_both[] = {product(w_rows.left(tile.depth_of(pairs(V))), tile.before),
                                   product(tile.u_rows.left(after.depth_of(pairs(V))), after_transposed)};
        multiply<DotPairs>(n, dq.ld, of_state, dq.data, nullptr, dq.ld, ahead);
        if (!tile.gates.decays)
            return multiply<DotPairs>(n, dk.ld, of_both, 2, dk.data, nullptr, dk.ld, ahead, keep_all);
        multiply<DotPairs>(n, dk.ld, of_both[0], dk.data, nullptr, dk.ld, ahead);
        multiply<DotPairs>(n, other.ld, of_both[1], other.data, nullptr, other.ld, ahead);
        decay.add_rows(n, [&](int64_t i, const float* row) { return dot(q_rows, i, row, K); },
                       [&](int64_t i, const float* row) { return dot(tile.k_rows, i, row, K); }, dq, dk, other);
        const bool meets = !after.is_zero && !tile.starts_from_zero;
        decay.whole = meets ? double(tile.gates.whole) * dot_all(after_transposed, tile.before, V) : 0;
        if (range.dlog_decay != nullptr) decay.store(range, t, n);
    }

    void add_scores(const KeptPairs& tile, int64_t n) {
        round_lower(dp_rows, dp, C, n);
        round_lower(dm_rows, dm, C, n);
        interleave_lower(dp_pairs, dp, C, n);
        interleave_lower(dm_pairs, dm, C, n);
        const Product for_q = product(dp_rows.left(pairs(n)), tile.k_pairs);
        const Product for_k[] = {product(dp_pairs.left_transposed(pairs(n)), q_pairs),
                                 product(dm_pairs.left_transposed(pairs(n)), tile.k_pairs),
                                 product(dm_rows.left(pairs(n)), tile.k_pairs)};
        multiply_onto<DotPairs>(n, dq.ld, &for_q, 1, {dq.data, 1, dq.data, dq.ld}, ahead,
                                [](int64_t i0, int64_t i1, int, Product& product) { keep_triangle(i0, i1, 2, product); });
        multiply_onto<DotPairs>(n, dk.ld, for_k, 3, {dk.data, 1, dk.data, dk.ld}, ahead, keep_triangle);
    }

    // D before the tile.
    void pass_on(const KeptPairs& tile, int64_t n) {
        interleave(w_pairs, w.data, w.ld, n);
        const Product added[] = {product(q_pairs.left_transposed(pairs(n)), g_pairs),
                                 product(tile.k_pairs.left_transposed(pairs(n)), w_pairs)};
        decay_sum(after, tile.gates.whole);
        multiply<DotPairs>(K, after.ld, added, 2, after.data, after.lost, after.ld, ahead, keep_all);
        after.is_zero = false;
    }

    void store(const KeptPairs& tile, int64_t t, int64_t n) {
        store_unit_gradient(to_queries(range, range.dq, t, n, K), q(t, n), dq, q_scale);
        if (tile.divisor.divides) scale_rows(dv, dv, tile.divisor.weight, 1, n);
        store_key_gradients(range, t, n, dk, dv, tile.scale, tile.divisor);
    }
};

void erase_backward(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.erase_backward(range, memory);
    EraseBackward(range, memory).run();
}

// Bound for both passes.
int64_t erase_scratch_size(int64_t K, int64_t V, int64_t chunk) {
    const int64_t Kp = round_up(K, 32), Vp = round_up(V, 32), C = round_up(chunk, 32), scores = C * C + 16;
    const int64_t tile = C * (Kp + 2 * Vp) + 2 * scores + Kp * Vp / 2 + round_up(sizeof(KeptPairs), 64) / 4;
    const int64_t needed =
        4 * Kp * Vp + C * (5 * Kp + 7 * Vp) + 3 * scores + 2 * C * C + tiles_of(kTurn, chunk) * tile;
    const int64_t plain = kernels_avx512.erase_scratch_size(K, V, chunk);
    return needed > plain ? needed : plain;
}

}  // namespace
