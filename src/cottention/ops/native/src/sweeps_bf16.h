// The passes of sweeps.h for bfloat16 tokens with AVX512-BF16, whose dot product adds two products at once.
//
// Every operand of a product is rounded to bfloat16 (v and g are so already; q_hat, k', scores and the state once), all
// sums of a walk and the state itself stay in float. Rows of o are divided by the norms of q at the end, so that q goes into the
// products of forward as it is. Other dtypes, and a handful of tokens, go to the kernels of AVX-512.
#pragma once

#include "passes.h"
#include "words.h"

namespace {

// bfloat16, and enough tokens that roundings of operands average out; of fewer it is no work to do without them.
inline bool suits_pairs(const Range& range) { return range.dtype == 1 && range.tokens >= 16; }

// S = kept S + x^T y for n tokens, both interleaved.
inline void add_to(Sum& state, const Words& x, const Words& y, int64_t n, Ahead& ahead, float kept = 1) {
    state.add<DotPairs>(product(x.left_transposed(pairs(n)), y), ahead, kept);
}

// The second product's left side is a lower triangle in pairs, or its transpose.
inline const auto keep_lower_pairs = [](int64_t, int64_t i1, int p, Product& product) {
    if (p == 1) product.depth = smaller(product.depth, pairs(i1));
};
inline const auto keep_upper_pairs = [](int64_t i0, int64_t, int p, Product& product) {
    if (p == 1) narrow_upper(i0 / 2, 0, product);
};

// n tokens from t on of the queries' side, or the keys'; and where results of theirs go.
inline Tokens of_queries(const Range& range, const Rows& rows, int64_t t, int64_t n, int64_t D) {
    return {rows, t, n, D, range.query_mask};
}
inline Tokens of_keys(const Range& range, const Rows& rows, int64_t t, int64_t n, int64_t D) {
    return {rows, t, n, D, range.key_mask};
}
inline Results to_queries(const Range& range, const Rows& rows, int64_t t, int64_t n, int64_t D) {
    return {{rows, t, n, D, range.query_mask}, range.out_dtype == 0, range.mirrored};
}
inline Results to_keys(const Range& range, const Rows& rows, int64_t t, int64_t n, int64_t D) {
    return {{rows, t, n, D, range.key_mask}, range.out_dtype == 0, range.mirrored};
}

// dk and dv of n tokens from t on, from the gradients of k' and v; collects dp.
inline void store_key_gradients(const Range& range, int64_t t, int64_t n, const Block& dk, const Block& dv,
                                const UnitScale& scale, const Weights& weights, float* inner = nullptr) {
    const Tokens v = of_keys(range, range.v, t, n, range.V);
    if (weights.divides && range.dp != nullptr)
        for (int64_t i = 0; i < n; i++)
            if (!v.is_hidden(i)) *range.dp -= double(weights.log_count[i]) * dot(v.row(i), dv.row(i), range.V);
    find_inner(of_keys(range, range.k, t, n, range.K), dk, scale, inner);
    store_tokens(to_keys(range, range.dv, t, n, range.V), dv);
    store_unit_gradient(to_keys(range, range.dk, t, n, range.K), of_keys(range, range.k, t, n, range.K), dk, scale);
}

inline void scale_to_before(const Words& words, const Decay& decay, int64_t n) {
    scale_words(words, n, [&](int64_t i) { return decay.to_before(i); });
}
inline void scale_to_after(const Words& words, const Decay& decay, int64_t n) {
    scale_words(words, n, [&](int64_t i) { return decay.to_after(i); });
}
// The same, and once more as pairs.
inline void scale_to_after(const Words& words, const Words& interleaved, const Decay& decay, int64_t n) {
    scale_to_after(words, decay, n);
    interleave(interleaved, words, n);
}

// S += k'^T v; or, with the queries' side of the range in the place of the keys', D += q_hat^T g.
void add_state(const Range& range, float* memory, bool of_queries) {
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    Sum state(scratch, range, K, V);
    const Words k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V);
    const Words k_pairs = take_interleaved(scratch, C, K), v_pairs = take_interleaved(scratch, C, V);
    state.load(range.state);
    UnitScale scale;
    Weights weights;
    Ahead ahead;
    Decay decay(range);
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        of_queries ? decay.enter_queries(t, n) : decay.enter(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, of_queries ? nullptr : decay.exponents());
        count += count_real(range.key_mask, t, n);
        const float* weight = of_queries ? decay.query_weights() : weights.get();
        load_unit_words(k_rows, of_keys(range, range.k, t, n, K), weight, scale);
        copy_rows(v_rows, of_keys(range, range.v, t, n, V));
        ahead.clear();
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        interleave(k_pairs, k_rows, n);
        interleave(v_pairs, v_rows, n);
        if (decay.is_split) scale_to_after(k_rows, k_pairs, decay, n);
        add_to(state, k_pairs, v_pairs, n, ahead, decay.kept());
    }
    const float left = decay.leave(false);
    if (!of_queries) state.scale(left);
    state.store(range.state_out);
}

void key_state(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.key_state(range, memory);
    add_state(range, memory, false);
}

void query_state(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.query_state(range, memory);
    Range turned = range;
    turned.k = range.q;
    turned.v = range.grad;
    turned.key_mask = range.query_mask;
    turned.divisor = {false, true, 0, 0};
    add_state(turned, memory, true);
}

void causal_forward(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.causal_forward(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    Sum state(scratch, range, K, V);
    const Words state_pairs = take_interleaved(scratch, K, V);
    const Block o = scratch.rows(C, V);
    const Words q_rows = take_rows(scratch, C, K), k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V);
    const Words k_transposed = take_transposed(scratch, C, K);
    const Words k_pairs = take_interleaved(scratch, C, K), v_pairs = take_interleaved(scratch, C, V);
    float* scores = scratch.take(C * C + 16);
    const Words score_rows = take_rows(scratch, C, C);
    state.load(range.state);
    UnitScale q_scale, k_scale;
    Weights weights;
    Ahead ahead;
    Decay decay(range);
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        decay.enter(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        count += count_real(range.key_mask, t, n);
        const Tokens q = of_queries(range, range.q, t, n, K);
        find_unit_scale(q, decay.query_weights(), q_scale);
        copy_rows(q_rows, q);
        load_unit_words(k_rows, of_keys(range, range.k, t, n, K), weights.get(), k_scale);
        copy_rows(v_rows, of_keys(range, range.v, t, n, V));
        ahead.clear();
        ask(ahead, range, range.o, t, V, true);
        ask(ahead, range, range.q, t + C, K, false);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        if (!state.is_zero) interleave(state_pairs, state.data, state.ld, K);
        transpose_words(k_transposed, k_rows, n);
        interleave(k_pairs, k_rows, n);
        interleave(v_pairs, v_rows, n);
        multiply_lower<DotPairs>(n, product(q_rows.left(pairs(K)), k_transposed), scores, C, ahead);
        finish_scores(range, decay, scores, C, n);
        round_lower(score_rows, scores, C, n);
        if (decay.moves) scale_to_before(q_rows, decay, n);
        const Product products[] = {product(q_rows.left(state.depth_of(pairs(K))), state_pairs),
                                    product(score_rows.left(pairs(n)), v_pairs)};
        multiply<DotPairs>(n, o.ld, products, 2, o.data, nullptr, o.ld, ahead, keep_lower_pairs);
        store_tokens(to_queries(range, range.o, t, n, V), o, q_scale.factor);
        if (decay.is_split) scale_to_after(k_rows, k_pairs, decay, n);
        if (t + C < range.tokens || range.state_out != nullptr) add_to(state, k_pairs, v_pairs, n, ahead, decay.kept());
    }
    state.scale(decay.leave(false));
    state.store(range.state_out);
}

void causal_backward_q(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.causal_backward_q(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    State upright(scratch, K, V);
    Sum state(scratch, range, V, K);  // transposed
    const Words state_pairs = take_interleaved(scratch, V, K);
    const Block dq = scratch.rows(C, K);
    const Words k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V), g_rows = take_rows(scratch, C, V);
    const Words v_transposed = take_transposed(scratch, C, V);
    const Words k_pairs = take_interleaved(scratch, C, K), v_pairs = take_interleaved(scratch, C, V);
    float* dscores = scratch.take(C * C + 16);
    const Words dscore_rows = take_rows(scratch, C, C);
    upright.load(range.state);
    upright.transpose_to(state);
    UnitScale q_scale, k_scale;
    Weights weights;
    Ahead ahead;
    Decay decay(range);
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        const Tokens q = of_queries(range, range.q, t, n, K);
        decay.enter(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        count += count_real(range.key_mask, t, n);
        load_unit_words(k_rows, of_keys(range, range.k, t, n, K), weights.get(), k_scale);
        copy_rows(v_rows, of_keys(range, range.v, t, n, V));
        copy_rows(g_rows, of_queries(range, range.grad, t, n, V));
        ahead.clear();
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        ask(ahead, range, range.grad, t + C, V, false);
        ask(ahead, range, range.q, t + C, K, false);
        if (!state.is_zero) interleave(state_pairs, state.data, state.ld, V);
        transpose_words(v_transposed, v_rows, n);
        interleave(k_pairs, k_rows, n);
        interleave(v_pairs, v_rows, n);
        multiply_lower<DotPairs>(n, product(g_rows.left(pairs(V)), v_transposed), dscores, C, ahead);
        finish_scores(range, decay, dscores, C, n);
        round_lower(dscore_rows, dscores, C, n);
        if (decay.moves) scale_to_before(g_rows, decay, n);
        const Product products[] = {product(g_rows.left(state.depth_of(pairs(V))), state_pairs),
                                    product(dscore_rows.left(pairs(n)), k_pairs)};
        multiply<DotPairs>(n, dq.ld, products, 2, dq.data, nullptr, dq.ld, ahead, keep_lower_pairs);
        find_unit_scale(q, decay.query_weights(), q_scale);
        find_inner(q, dq, q_scale, range.of_queries == nullptr ? nullptr : range.of_queries + t);
        store_unit_gradient(to_queries(range, range.dq, t, n, K), q, dq, q_scale);
        if (decay.is_split) scale_to_after(k_rows, k_pairs, decay, n);
        if (t + C < range.tokens || range.state_out != nullptr) add_to(state, v_pairs, k_pairs, n, ahead, decay.kept());
    }
    state.scale(decay.leave(false));
    if (range.state_out == nullptr) return;
    state.transpose_to(upright);
    upright.store(range.state_out);
}

void causal_backward_kv(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.causal_backward_kv(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    Sum after(scratch, range, K, V);
    const Words after_pairs = take_interleaved(scratch, K, V);
    const Words after_rows = take_rows(scratch, K, V), after_transposed = take_transposed(scratch, K, V);
    const Block dk = scratch.rows(C, K), dv = scratch.rows(C, V);
    const Words q_rows = take_rows(scratch, C, K), k_rows = take_rows(scratch, C, K);
    const Words v_rows = take_rows(scratch, C, V), g_rows = take_rows(scratch, C, V);
    const Words k_transposed = take_transposed(scratch, C, K), v_transposed = take_transposed(scratch, C, V);
    const Words q_pairs = take_interleaved(scratch, C, K), g_pairs = take_interleaved(scratch, C, V);
    float* scores = scratch.take(C * C + 16);
    const Words score_pairs = take_interleaved(scratch, C, C), dscore_pairs = take_interleaved(scratch, C, C);
    after.load(range.state);
    UnitScale q_scale, k_scale;
    Weights weights;
    Ahead ahead;
    Decay decay(range);
    after.scale(decay.arrive());
    decay.start_gradients(after.data, after.ld);
    float inner[kMaxChunk];
    int64_t count = range.divisor.count + count_real(range.key_mask, 0, range.tokens);
    for (int64_t t = range.tokens > 0 ? (range.tokens - 1) / C * C : -1; t >= 0; t -= C) {
        const int64_t n = smaller(C, range.tokens - t);
        count -= count_real(range.key_mask, t, n);
        decay.enter_backward(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        load_unit_words(q_rows, of_queries(range, range.q, t, n, K), decay.query_weights(), q_scale);
        load_unit_words(k_rows, of_keys(range, range.k, t, n, K), weights.get(), k_scale);
        copy_rows(v_rows, of_keys(range, range.v, t, n, V));
        copy_rows(g_rows, of_queries(range, range.grad, t, n, V));
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.q, t - C, K, false);
        ask(ahead, range, range.k, t - C, K, false);
        ask(ahead, range, range.v, t - C, V, false);
        ask(ahead, range, range.grad, t - C, V, false);
        if (!after.is_zero) {
            interleave(after_pairs, after.data, after.ld, K);
            round_rows(after_rows, after.data, after.ld, round_up(K, kWidth));
            transpose_words(after_transposed, after_rows, K);
        }
        transpose_words(k_transposed, k_rows, n);
        transpose_words(v_transposed, v_rows, n);
        interleave(q_pairs, q_rows, n);
        interleave(g_pairs, g_rows, n);
        multiply_lower<DotPairs>(n, product(q_rows.left(pairs(K)), k_transposed), scores, C, ahead);
        finish_scores(range, decay, scores, C, n);
        interleave_lower(score_pairs, scores, C, n);
        multiply_lower<DotPairs>(n, product(g_rows.left(pairs(V)), v_transposed), scores, C, ahead);
        finish_scores(range, decay, scores, C, n);
        interleave_lower(dscore_pairs, scores, C, n);
        if (decay.moves) {
            scale_to_before(k_rows, decay, n);
            scale_to_before(v_rows, decay, n);
        }
        const Product for_k[] = {product(v_rows.left(after.depth_of(pairs(V))), after_transposed),
                                 product(dscore_pairs.left_transposed(pairs(n)), q_pairs)};
        const Product for_v[] = {product(k_rows.left(after.depth_of(pairs(K))), after_pairs),
                                 product(score_pairs.left_transposed(pairs(n)), g_pairs)};
        multiply<DotPairs>(n, dk.ld, for_k, 2, dk.data, nullptr, dk.ld, ahead, keep_upper_pairs);
        multiply<DotPairs>(n, dv.ld, for_v, 2, dv.data, nullptr, dv.ld, ahead, keep_upper_pairs);
        store_key_gradients(range, t, n, dk, dv, k_scale, weights, range.of_queries == nullptr ? nullptr : inner);
        if (range.of_queries != nullptr) decay.store_gradients(t, n, inner);
        if (decay.is_split) scale_to_after(q_rows, q_pairs, decay, n);
        if (t > 0 || range.state_out != nullptr) add_to(after, q_pairs, g_pairs, n, ahead, decay.kept());
    }
    after.scale(decay.leave(true));
    after.store(range.state_out);
}

void full_forward(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.full_forward(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    State state(scratch, K, V);
    const Words state_pairs = take_interleaved(scratch, K, V), q_rows = take_rows(scratch, C, K);
    const Block o = scratch.rows(C, V);
    state.load(range.state);
    interleave(state_pairs, state.data, state.ld, K);
    UnitScale scale;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        const Tokens q = of_queries(range, range.q, t, n, K);
        find_unit_scale(q, nullptr, scale);
        copy_rows(q_rows, q);
        ahead.clear();
        ask(ahead, range, range.o, t, V, true);
        ask(ahead, range, range.q, t + C, K, false);
        multiply<DotPairs>(n, o.ld, product(q_rows.left(pairs(K)), state_pairs), o.data, nullptr, o.ld, ahead);
        store_tokens(to_queries(range, range.o, t, n, V), o, scale.factor);
    }
}

void full_backward_q(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.full_backward_q(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    State state(scratch, K, V);
    const Words state_rows = take_rows(scratch, K, V), state_transposed = take_transposed(scratch, K, V);
    const Block dq = scratch.rows(C, K);
    const Words g_rows = take_rows(scratch, C, V);
    state.load(range.state);
    round_rows(state_rows, state.data, state.ld, round_up(K, kWidth));
    transpose_words(state_transposed, state_rows, K);
    UnitScale scale;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        const Tokens q = of_queries(range, range.q, t, n, K);
        copy_rows(g_rows, of_queries(range, range.grad, t, n, V));
        ahead.clear();
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.q, t + C, K, false);
        ask(ahead, range, range.grad, t + C, V, false);
        multiply<DotPairs>(n, dq.ld, product(g_rows.left(pairs(V)), state_transposed), dq.data, nullptr, dq.ld, ahead);
        find_unit_scale(q, nullptr, scale);
        store_unit_gradient(to_queries(range, range.dq, t, n, K), q, dq, scale);
    }
}

void full_backward_kv(const Range& range, float* memory) {
    if (!suits_pairs(range)) return kernels_avx512.full_backward_kv(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    State after(scratch, K, V);
    const Words after_pairs = take_interleaved(scratch, K, V);
    const Words after_rows = take_rows(scratch, K, V), after_transposed = take_transposed(scratch, K, V);
    const Block dk = scratch.rows(C, K), dv = scratch.rows(C, V);
    const Words k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V);
    after.load(range.state);
    interleave(after_pairs, after.data, after.ld, K);
    round_rows(after_rows, after.data, after.ld, round_up(K, kWidth));
    transpose_words(after_transposed, after_rows, K);
    UnitScale scale;
    Weights weights;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        weights.set(range.divisor, range.key_mask, t, n, 0);
        load_unit_words(k_rows, of_keys(range, range.k, t, n, K), weights.get(), scale);
        copy_rows(v_rows, of_keys(range, range.v, t, n, V));
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        multiply<DotPairs>(n, dk.ld, product(v_rows.left(pairs(V)), after_transposed), dk.data, nullptr, dk.ld, ahead);
        multiply<DotPairs>(n, dv.ld, product(k_rows.left(pairs(K)), after_pairs), dv.data, nullptr, dv.ld, ahead);
        store_key_gradients(range, t, n, dk, dv, scale, weights);
    }
}

void step(const Range& range, float* memory) { kernels_avx512.step(range, memory); }
void gated_step(const Range& range, float* memory) { kernels_avx512.gated_step(range, memory); }

// Bound for every pass: 2 blocks of K and of V in float or in words of each layout, scores in both, 3 states.
int64_t scratch_size(int64_t K, int64_t V, int64_t chunk) {
    const int64_t Kp = round_up(K, 32), Vp = round_up(V, 32), C = round_up(chunk, 32);
    const int64_t needed = C * 4 * (Kp + Vp) + 3 * C * C + 16 + 3 * Kp * Vp;
    const int64_t plain = kernels_avx512.scratch_size(K, V, chunk);
    return needed > plain ? needed : plain;
}

}  // namespace
