// erase.h for bfloat16 tokens with AVX512-BF16: products with the state and scores take pairs of numbers.
//
// k_hat and S are rounded to bfloat16 for them, q is as it is and o divided by its norm; the system, and what scores
// take from u, stay in float, and so do all sums.
#pragma once

#include "erase_gates.h"
#include "panels.h"
#include "words.h"

namespace {

// A state in pairs of rows, which is renewed as the state changes.
struct StatePairs {
    Words pairs;
    StatePairs(Scratch& scratch, int64_t K, int64_t V) : pairs(take_interleaved(scratch, K, V)) {}
    void renew(const State& state) const {
        if (!state.is_zero) interleave(pairs, state.data, state.ld, state.K);
    }
};

// The keys' side of a tile, see erase.h.
struct WrittenPairs {
    Words k_rows, k_pairs;
    Block u;
    float *minus, *weight;
    Gates gates;
    UnitScale scale;
    Weights divisor;

    WrittenPairs(Scratch& scratch, const Range& range, const Block& u)
        : k_rows(take_rows(scratch, range.chunk, range.K)),
          k_pairs(take_interleaved(scratch, range.chunk, range.K)),
          u(u),
          minus(scratch.take(range.chunk * range.chunk + 16)),
          weight(range.log_decay.data == nullptr ? nullptr : scratch.take(range.chunk * range.chunk + 16)) {}

    // `transposed` and `read`: room for k^T, and for what keys read.
    void find(const Range& range, int64_t t, int64_t n, int64_t count, const State& state, const StatePairs& pairs_of,
              float* x, const Words& transposed, const Block& read, Ahead& ahead) {
        const int64_t C = range.chunk;
        gates.set(range, t, n, weight, C);
        load_unit_words(k_rows, of_keys(range, range.k, t, n, range.K), nullptr, scale);
        load_rows(u, range.v, range.dtype, t, n, range.key_mask);
        divisor.set(range.divisor, range.key_mask, t, n, count);
        transpose_words(transposed, k_rows, n);
        interleave(k_pairs, k_rows, n);
        multiply_lower<DotPairs>(n, product(k_rows.left(pairs(range.K)), transposed), minus, C, ahead);
        weigh_lower(minus, weight, nullptr, -1, C, n);
        const Product reading = product(k_rows.left(state.depth_of(pairs(range.K))), pairs_of.pairs);
        multiply<DotPairs>(n, read.ld, reading, read.data, nullptr, read.ld, ahead);
        subtract_read(read, n);
        solve(n, u.ld, kNothing, {minus, C, 1, nullptr, 0, 0}, {u.data, gates.beta, x, u.data, u.ld, 1}, ahead);
    }

  private:
    void subtract_read(const Block& read, int64_t n) const {
        for (int64_t i = 0; i < n; i++) {
            const Vector::F left = Vector::set1(gates.decays ? -gates.since[i] : -1.0f);
            const Vector::F value = Vector::set1(divisor.divides ? divisor.weight[i] : 1.0f);
            for (int64_t d = 0; d < u.ld; d += kWidth) {
                const Vector::F own = Vector::mul(value, Vector::load(u.row(i) + d));
                Vector::store(u.row(i) + d, Vector::fma(left, Vector::load(read.row(i) + d), own));
            }
        }
    }
};

void erase_forward(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.erase_forward(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    Sum state(scratch, range, K, V);
    const StatePairs state_pairs(scratch, K, V);
    const Block u = scratch.rows(C, V);
    WrittenPairs written(scratch, range, u);
    const Gates& gates = written.gates;
    const Words q_rows = take_rows(scratch, C, K), k_transposed = take_transposed(scratch, C, K);
    const Words u_pairs = take_interleaved(scratch, C, V);
    const Block o = scratch.rows(C, V);
    float* scores = scratch.take(C * C + 16);
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
        state_pairs.renew(state);
        written.find(range, t, n, count, state, state_pairs, nullptr, k_transposed, o, ahead);
        count += count_real(range.key_mask, t, n);
        if (range.o.data != nullptr) {
            const Tokens q = of_queries(range, range.q, t, n, K);
            find_unit_scale(q, nullptr, q_scale);
            copy_rows(q_rows, q);
            multiply_lower<DotPairs>(n, product(q_rows.left(pairs(K)), k_transposed), scores, C, ahead);
            weigh_lower(scores, written.weight, q_scale.factor, 1, C, n);
            const Product reading = product(q_rows.left(state.depth_of(pairs(K))), state_pairs.pairs);
            multiply<DotPairs>(n, o.ld, reading, o.data, nullptr, o.ld, ahead);
            if (gates.decays) scale_rows(o, o, gates.since, 1, n);
            scale_rows(o, o, q_scale.factor, 1, n);
            const Product recent = {scores, C, 1, u.data, u.ld, n};
            multiply_onto(n, o.ld, &recent, 1, {o.data, 1, o.data, o.ld}, ahead, keep_lower_rows);
            store_tokens(to_queries(range, range.o, t, n, V), o);
        }
        if (t + C >= range.tokens && range.state_out == nullptr) break;
        if (gates.decays) scale_rows(u, u, gates.to_end, 1, n);
        interleave(u_pairs, u.data, u.ld, n);
        decay_sum(state, gates.whole);
        add_to(state, written.k_pairs, u_pairs, n, ahead);
    }
    state.store(range.state_out);
}

}  // namespace
