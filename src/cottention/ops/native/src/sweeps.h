// The passes over the tokens of one sequence and head, a chunk at a time.
//
// Causal, S the state before the chunk, k' = k_hat / max(c ** p, 1), g the gradient of o, D that of the state after it:
//
//     o   = q_hat S + tril(q_hat k'^T) v                S += k'^T v
//     dq_ = g S^T + tril(g v^T) k'                      forward in time, with S
//     dk_ = v D^T + tril(g v^T)^T q_hat                 backward in time, with D:  D += q_hat^T g
//     dv  = k' D  + tril(q_hat k'^T)^T g
//
// where dq_ and dk_ are the gradients of q_hat and k'. Not causal, S and D are those of all tokens and the triangles
// are gone. No state is stored per chunk: each pass runs its own.
#pragma once

#include "passes.h"

namespace {

// Bound for every pass below: 4 blocks of K, 4 of V, their transposes, 2 score matrices and 2 states.
int64_t scratch_size(int64_t K, int64_t V, int64_t chunk) {
    const int64_t Kp = round_up(K, 16), Vp = round_up(V, 16);
    return chunk * 5 * (Kp + Vp) + 2 * (chunk * chunk + 16) + 2 * Kp * Vp + 16 * 16;
}

inline Product times(const Block& x, const State& state, int64_t depth) {
    return {x.data, x.ld, 1, state.data, state.ld, state.depth_of(depth)};
}

// The second product's left side is a lower triangle, or its transpose.
inline const auto keep_lower = [](int64_t i0, int64_t i1, int p, Product& product) {
    if (p == 1) narrow_lower(i0, i1, product);
};
inline const auto keep_upper = [](int64_t i0, int64_t i1, int p, Product& product) {
    if (p == 1) narrow_upper(i0, i1, product);
};

void key_state(const Range& range, float* memory) {
    Scratch scratch(memory);
    const Block k = scratch.rows(range.chunk, range.K), v = scratch.rows(range.chunk, range.V);
    Sum state(scratch, range, range.K, range.V);
    state.load(range.state);
    UnitScale scale;
    Ahead ahead;
    Weights weights;
    Decay decay(range);
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += range.chunk) {
        const int64_t n = smaller(range.chunk, range.tokens - t);
        decay.enter(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        count += count_real(range.key_mask, t, n);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        ahead.clear();
        ask(ahead, range, range.k, t + range.chunk, range.K, false);
        ask(ahead, range, range.v, t + range.chunk, range.V, false);
        if (decay.is_split) scale_to_after(k, decay, n);
        state.add(k, v, n, ahead, decay.kept());
    }
    state.scale(decay.leave(false));
    state.store(range.state_out);
}

void query_state(const Range& range, float* memory) {
    Scratch scratch(memory);
    const Block q = scratch.rows(range.chunk, range.K), g = scratch.rows(range.chunk, range.V);
    Sum state(scratch, range, range.K, range.V);
    state.load(range.state);
    UnitScale scale;
    Ahead ahead;
    Decay decay(range);
    for (int64_t t = 0; t < range.tokens; t += range.chunk) {
        const int64_t n = smaller(range.chunk, range.tokens - t);
        decay.enter_queries(t, n);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, decay.query_weights(), scale);
        load_rows(g, range.grad, range.dtype, t, n, range.query_mask);
        ahead.clear();
        ask(ahead, range, range.q, t + range.chunk, range.K, false);
        ask(ahead, range, range.grad, t + range.chunk, range.V, false);
        state.add(q, g, n, ahead);
    }
    decay.leave(false);
    state.store(range.state_out);
}

void causal_forward(const Range& range, float* memory) {
    const int64_t C = range.chunk, K = range.K;
    Scratch scratch(memory);
    Sum state(scratch, range, K, range.V);
    const Block q = scratch.rows(C, K), k = scratch.rows(C, K), v = scratch.rows(C, range.V);
    const Block o = scratch.rows(C, range.V);
    float *k_transposed = scratch.take(C * k.ld), *scores = scratch.take(C * C + 16);
    // Rows of whole vectors that are written as they are come from the registers.
    const bool stores_at_once =
        range.out_dtype == 0 && range.query_mask == nullptr && !range.mirrored && o.ld == range.V;
    state.load(range.state);
    UnitScale q_scale, k_scale;
    Ahead ahead;
    Weights weights;
    Decay decay(range);
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        decay.enter(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        count += count_real(range.key_mask, t, n);
        load_rows_square(q, range.q, range.dtype, t, n, range.query_mask, q_scale);
        load_rows_square(k, range.k, range.dtype, t, n, range.key_mask, k_scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        make_unit(q, n, decay.query_weights(), q_scale);
        make_unit(k, n, weights.get(), k_scale);
        ahead.clear();
        ask(ahead, range, range.o, t, range.V, true);
        ask(ahead, range, range.q, t + C, range.K, false);
        ask(ahead, range, range.k, t + C, range.K, false);
        ask(ahead, range, range.v, t + C, range.V, false);
        transpose_rows(k_transposed, C, k.data, k.ld, n);
        multiply_lower(n, {q.data, q.ld, 1, k_transposed, C, K}, scores, C, ahead);
        finish_scores(range, decay, scores, C, n);
        if (decay.moves) scale_to_before(q, decay, n);
        const Product products[] = {times(q, state, K), {scores, C, 1, v.data, v.ld, n}};
        if (stores_at_once) {
            multiply(n, o.ld, products, 2, static_cast<float*>(range.o.data) + t * range.o.stride, nullptr,
                     range.o.stride, ahead, keep_lower);
        } else {
            multiply(n, o.ld, products, 2, o.data, nullptr, o.ld, ahead, keep_lower);
            store_rows(range.o, range.out_dtype, t, n, range.query_mask, o, range.mirrored);
        }
        if (decay.is_split) scale_to_after(k, decay, n);
        if (t + C < range.tokens || range.state_out != nullptr) state.add(k, v, n, ahead, decay.kept());
    }
    state.scale(decay.leave(false));
    state.store(range.state_out);
}

void causal_backward_q(const Range& range, float* memory) {
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    State upright(scratch, K, V);
    Sum state(scratch, range, V, K);  // transposed
    const Block q = scratch.rows(C, K), k = scratch.rows(C, K), v = scratch.rows(C, V), g = scratch.rows(C, V);
    const Block dq = scratch.rows(C, K);
    float *v_transposed = scratch.take(C * v.ld), *dscores = scratch.take(C * C + 16);
    upright.load(range.state);
    upright.transpose_to(state);
    UnitScale q_scale, k_scale;
    Ahead ahead;
    Weights weights;
    Decay decay(range);
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        decay.enter(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        count += count_real(range.key_mask, t, n);
        load_rows_square(q, range.q, range.dtype, t, n, range.query_mask, q_scale);
        load_rows_square(k, range.k, range.dtype, t, n, range.key_mask, k_scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        load_rows(g, range.grad, range.dtype, t, n, range.query_mask);
        make_unit(q, n, decay.query_weights(), q_scale);
        make_unit(k, n, weights.get(), k_scale);
        ahead.clear();
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.q, t + C, K, false);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        ask(ahead, range, range.grad, t + C, V, false);
        transpose_rows(v_transposed, C, v.data, v.ld, n);
        multiply_lower(n, {g.data, g.ld, 1, v_transposed, C, V}, dscores, C, ahead);
        finish_scores(range, decay, dscores, C, n);
        if (decay.moves) scale_to_before(g, decay, n);
        const Product products[] = {times(g, state, V), {dscores, C, 1, k.data, k.ld, n}};
        multiply(n, dq.ld, products, 2, dq.data, nullptr, dq.ld, ahead, keep_lower);
        store_unit_gradient(range.dq, range.out_dtype, t, n, range.query_mask, dq, q, q_scale, range.mirrored,
                            range.of_queries == nullptr ? nullptr : range.of_queries + t);
        if (decay.is_split) scale_to_after(k, decay, n);
        if (t + C < range.tokens || range.state_out != nullptr) state.add(v, k, n, ahead, decay.kept());
    }
    state.scale(decay.leave(false));
    if (range.state_out == nullptr) return;
    state.transpose_to(upright);
    upright.store(range.state_out);
}

void causal_backward_kv(const Range& range, float* memory) {
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    Sum after(scratch, range, K, V);
    State after_transposed(scratch, V, K);
    const Block q = scratch.rows(C, K), k = scratch.rows(C, K), v = scratch.rows(C, V), g = scratch.rows(C, V);
    const Block dk = scratch.rows(C, K), dv = scratch.rows(C, V);
    float *k_transposed = scratch.take(C * k.ld), *v_transposed = scratch.take(C * v.ld);
    float *scores = scratch.take(C * C + 16), *dscores = scratch.take(C * C + 16);
    Decay decay(range);
    float of_keys[kMaxChunk];
    after.load(range.state);
    after.scale(decay.arrive());
    after.transpose_to(after_transposed);
    decay.start_gradients(after.data, after.ld);
    UnitScale q_scale, k_scale;
    Ahead ahead;
    Weights weights;
    int64_t count = range.divisor.count + count_real(range.key_mask, 0, range.tokens);
    for (int64_t t = range.tokens > 0 ? (range.tokens - 1) / C * C : -1; t >= 0; t -= C) {
        const int64_t n = smaller(C, range.tokens - t);
        count -= count_real(range.key_mask, t, n);
        decay.enter_backward(t, n);
        weights.set(range.divisor, range.key_mask, t, n, count, decay.exponents());
        load_rows_square(q, range.q, range.dtype, t, n, range.query_mask, q_scale);
        load_rows_square(k, range.k, range.dtype, t, n, range.key_mask, k_scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        load_rows(g, range.grad, range.dtype, t, n, range.query_mask);
        make_unit(q, n, decay.query_weights(), q_scale);
        make_unit(k, n, weights.get(), k_scale);
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.q, t - C, K, false);
        ask(ahead, range, range.k, t - C, K, false);
        ask(ahead, range, range.v, t - C, V, false);
        ask(ahead, range, range.grad, t - C, V, false);
        transpose_rows(k_transposed, C, k.data, k.ld, n);
        transpose_rows(v_transposed, C, v.data, v.ld, n);
        multiply_lower(n, {q.data, q.ld, 1, k_transposed, C, K}, scores, C, ahead);
        multiply_lower(n, {g.data, g.ld, 1, v_transposed, C, V}, dscores, C, ahead);
        finish_scores(range, decay, scores, C, n);
        finish_scores(range, decay, dscores, C, n);
        if (decay.moves) {
            scale_to_before(k, decay, n);
            scale_to_before(v, decay, n);
        }
        const Product for_k[] = {times(v, after_transposed, V), {dscores, 1, C, q.data, q.ld, n}};
        const Product for_v[] = {times(k, after, K), {scores, 1, C, g.data, g.ld, n}};
        multiply(n, dk.ld, for_k, 2, dk.data, nullptr, dk.ld, ahead, keep_upper);
        multiply(n, dv.ld, for_v, 2, dv.data, nullptr, dv.ld, ahead, keep_upper);
        if (decay.moves) {  // as they were, which scaling back would not give
            load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), k_scale);
            load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        }
        store_key_gradients(range, t, n, dk, dv, k, v, k_scale, weights, range.of_queries == nullptr ? nullptr : of_keys);
        if (range.of_queries != nullptr) decay.store_gradients(t, n, of_keys);
        if (decay.is_split) scale_to_after(q, decay, n);
        if (t > 0 || range.state_out != nullptr) after.add(q, g, n, ahead, decay.kept());
        if (t > 0) after.transpose_to(after_transposed);
    }
    after.scale(decay.leave(true));
    after.store(range.state_out);
}

void full_forward(const Range& range, float* memory) {
    const int64_t C = range.chunk;
    Scratch scratch(memory);
    State state(scratch, range.K, range.V);
    const Block q = scratch.rows(C, range.K), o = scratch.rows(C, range.V);
    state.load(range.state);
    UnitScale scale;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, scale);
        ahead.clear();
        ask(ahead, range, range.o, t, range.V, true);
        ask(ahead, range, range.q, t + C, range.K, false);
        multiply(n, o.ld, times(q, state, range.K), o.data, nullptr, o.ld, ahead);
        store_rows(range.o, range.dtype, t, n, range.query_mask, o);
    }
}

void full_backward_q(const Range& range, float* memory) {
    const int64_t C = range.chunk;
    Scratch scratch(memory);
    State state(scratch, range.K, range.V), transposed(scratch, range.V, range.K);
    const Block q = scratch.rows(C, range.K), g = scratch.rows(C, range.V), dq = scratch.rows(C, range.K);
    state.load(range.state);
    state.transpose_to(transposed);
    UnitScale scale;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, scale);
        load_rows(g, range.grad, range.dtype, t, n, range.query_mask);
        ahead.clear();
        ask(ahead, range, range.dq, t, range.K, true);
        ask(ahead, range, range.q, t + C, range.K, false);
        ask(ahead, range, range.grad, t + C, range.V, false);
        multiply(n, dq.ld, times(g, transposed, range.V), dq.data, nullptr, dq.ld, ahead);
        store_unit_gradient(range.dq, range.dtype, t, n, range.query_mask, dq, q, scale);
    }
}

void full_backward_kv(const Range& range, float* memory) {
    const int64_t C = range.chunk;
    Scratch scratch(memory);
    State after(scratch, range.K, range.V), transposed(scratch, range.V, range.K);
    const Block k = scratch.rows(C, range.K), v = scratch.rows(C, range.V);
    const Block dk = scratch.rows(C, range.K), dv = scratch.rows(C, range.V);
    after.load(range.state);
    after.transpose_to(transposed);
    UnitScale scale;
    Ahead ahead;
    Weights weights;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        weights.set(range.divisor, range.key_mask, t, n, 0);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        ahead.clear();
        ask(ahead, range, range.dk, t, range.K, true);
        ask(ahead, range, range.dv, t, range.V, true);
        ask(ahead, range, range.k, t + C, range.K, false);
        ask(ahead, range, range.v, t + C, range.V, false);
        multiply(n, dk.ld, times(v, transposed, range.V), dk.data, nullptr, dk.ld, ahead);
        multiply(n, dv.ld, times(k, after, range.K), dv.data, nullptr, dv.ld, ahead);
        store_key_gradients(range, t, n, dk, dv, k, v, scale, weights);
    }
}

// S += k'^T v and o = q_hat S for some vectors of columns, each number of S read and written once.
template <int kVectors>
inline void step_columns(const float* q, const float* k, const float* v, int64_t K, int64_t V, const float* kv,
                         float* out, float* o) {
    Vector::F value[kVectors], sum[kVectors];
    for (int j = 0; j < kVectors; j++) {
        value[j] = Vector::load(v + j * kWidth);
        sum[j] = Vector::zero();
    }
    for (int64_t i = 0; i < K; i++, out += V) {
        const Vector::F query = Vector::set1(q[i]), key = Vector::set1(k[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
            Vector::F row = kv == nullptr ? Vector::zero() : Vector::load(kv + j * kWidth);
            row = Vector::fma(key, value[j], row);
            sum[j] = Vector::fma(query, row, sum[j]);
            Vector::store(out + j * kWidth, row);
        }
        if (kv != nullptr) kv += V;
    }
    for (int j = 0; j < kVectors; j++) Vector::store(o + j * kWidth, sum[j]);
}

// The same for fewer columns than a vector has.
inline void step_tail(const float* q, const float* k, const float* v, int64_t K, int64_t V, int columns,
                      const float* kv, float* out, float* o) {
    const Vector::F value = Vector::load(v);
    Vector::F sum = Vector::zero();
    for (int64_t i = 0; i < K; i++) {
        Vector::F row = kv == nullptr ? Vector::zero() : load_tail(kv + i * V, columns);
        row = Vector::fma(Vector::set1(k[i]), value, row);
        sum = Vector::fma(Vector::set1(q[i]), row, sum);
        store_tail(out + i * V, row, columns);
    }
    Vector::store(o, sum);
}

void step(const Range& range, float* memory) {
    Scratch scratch(memory);
    const int64_t K = range.K, V = range.V;
    const Block q = scratch.rows(kWidth, K), k = scratch.rows(kWidth, K);
    const Block v = scratch.rows(kWidth, V), o = scratch.rows(kWidth, V);
    UnitScale scale;
    Weights weights;
    weights.set(range.divisor, range.key_mask, 0, 1, range.divisor.count);
    load_unit_rows(q, range.q, range.dtype, 0, 1, range.query_mask, nullptr, scale);
    load_unit_rows(k, range.k, range.dtype, 0, 1, range.key_mask, weights.get(), scale);
    load_rows(v, range.v, range.dtype, 0, 1, range.key_mask);
    for (int64_t d = 0; d < V;) {
        const int64_t left = (V - d) / kWidth;
        const float* kv = range.state == nullptr ? nullptr : range.state + d;
        float* out = range.state_out + d;
        if (left >= 4) {
            step_columns<4>(q.data, k.data, v.data + d, K, V, kv, out, o.data + d);
            d += 4 * kWidth;
        } else if (left > 0) {
            step_columns<1>(q.data, k.data, v.data + d, K, V, kv, out, o.data + d);
            d += kWidth;
        } else {
            step_tail(q.data, k.data, v.data + d, K, V, int(V - d), kv, out, o.data + d);
            d = V;
        }
    }
    store_rows(range.o, range.dtype, 0, 1, range.query_mask, o);
}

}  // namespace
