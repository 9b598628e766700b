// The passes of sweeps.h for bfloat16 tokens with AVX512-BF16, whose dot product adds two products at once.
//
// Every operand of a product is rounded to bfloat16 (v and g are so already; q_hat, k', scores and the state once), all
// sums and the state itself stay in float. A 32-bit word holds a pair of neighbours along the index that is summed
// over, so a matrix is needed as rows (pairs along the row), transposed rows, or with its rows interleaved (pairs of
// rows). Other dtypes go to the kernels of AVX-512.
#pragma once

#include "passes.h"

namespace {

struct DotPairs {
    static inline Vector::F apply(Vector::F a, Vector::F b, Vector::F c) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
};

inline int64_t pairs(int64_t n) { return (n + 1) / 2; }

// A matrix of words.
struct Words {
    float* data;
    int64_t ld;
    float* row(int64_t i) const { return data + i * ld; }
    Product left(int64_t depth) const { return {data, ld, 1, nullptr, 0, depth}; }
    Product left_transposed(int64_t depth) const { return {data, 1, ld, nullptr, 0, depth}; }
};

inline Product product(Product left, const Words& right) {
    left.b = right.data;
    left.ld = right.ld;
    return left;
}

// Rows of D numbers as pairs: D / 2 words, padded so that they can be transposed.
inline Words take_rows(Scratch& scratch, int64_t n, int64_t D) {
    const int64_t ld = round_up(D, 32) / 2;
    return {scratch.take(round_up(n, 16) * ld), ld};
}
// n rows of D numbers interleaved: n / 2 rows of D words.
inline Words take_interleaved(Scratch& scratch, int64_t n, int64_t D) {
    const int64_t ld = round_up(D, 32);
    return {scratch.take(pairs(round_up(n, 16)) * ld), ld};
}
// Rows of D numbers transposed: D / 2 rows of n words.
inline Words take_transposed(Scratch& scratch, int64_t n, int64_t D) {
    const int64_t ld = round_up(n, 16);
    return {scratch.take(round_up(D, 32) / 2 * ld), ld};
}

inline __m512 round_pair(__m512 low, __m512 high) { return (__m512)_mm512_cvtne2ps_pbh(high, low); }

// dst rows = src rows rounded; n rows of `columns` floats, a multiple of 16.
inline void round_rows(const Words& dst, const float* src, int64_t ld, int64_t n, int64_t columns) {
    for (int64_t i = 0; i < n; i++) {
        const float* row = src + i * ld;
        for (int64_t d = 0; d < 2 * dst.ld; d += 32) {
            const __m512 low = Vector::load(row + d);
            const __m512 high = d + 16 < columns ? Vector::load(row + d + 16) : Vector::zero();
            Vector::store(dst.row(i) + d / 2, round_pair(low, high));
        }
    }
}

inline void round_rows(const Words& dst, const Block& src, int64_t n) {
    round_rows(dst, src.data, src.ld, round_up(n, 16), src.ld);
}

// The same of a lower triangle, zeros right of the diagonal.
inline void round_lower(const Words& dst, const float* src, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < 2 * dst.ld; j += 32) {
            __m512 half[2];
            for (int h = 0; h < 2; h++) {
                const int64_t left = i + 1 - (j + 16 * h);
                half[h] = left <= 0 ? Vector::zero() : load_tail(src + i * ld + j + 16 * h, int(smaller(left, 16)));
            }
            Vector::store(dst.row(i) + j / 2, round_pair(half[0], half[1]));
        }
    }
    clear(dst.row(n), (round_up(n, 16) - n) * dst.ld);
}

// Tokens as they are.
inline void copy_rows(const Words& dst, const Rows& rows, int64_t t, int64_t n, int64_t D, const uint8_t* mask) {
    const uint16_t* src = static_cast<const uint16_t*>(rows.data) + t * rows.stride;
    for (int64_t i = 0; i < n; i++, src += rows.stride) {
        float* row = dst.row(i);
        if (is_padding(mask, t + i)) {
            clear(row, dst.ld);
            continue;
        }
        for (int64_t d = 0; d < 2 * dst.ld; d += 32) {
            const int64_t left = D - d;
            const __mmask32 there = left >= 32 ? 0xffffffffu : (1u << left) - 1;
            _mm512_storeu_si512(row + d / 2, _mm512_maskz_loadu_epi16(there, src + d));
        }
    }
    clear(dst.row(n), (round_up(n, 16) - n) * dst.ld);
}

inline __m512i halves(const float* words) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
}

// dst[i, d] = the pair of src rows 2 i and 2 i + 1 at d; n rows, the last one beside zeros.
inline void interleave(const Words& dst, const Words& src, int64_t n) {
    for (int64_t i = 0; i < pairs(n); i++) {
        const float *first = src.row(2 * i), *second = src.row(2 * i + 1);
        for (int64_t d = 0; d < 2 * src.ld; d += 16) {
            const __m512i word = _mm512_or_si512(halves(first + d / 2), _mm512_slli_epi32(halves(second + d / 2), 16));
            _mm512_storeu_si512(dst.row(i) + d, word);
        }
    }
}

inline void transpose_words(const Words& dst, const Words& src, int64_t n) {
    transpose_rows(dst.data, dst.ld, src.data, src.ld, n);
}

// The state in float, and its rounded copies.
struct RoundedState {
    State state;
    Words rows;

    RoundedState(Scratch& scratch, const Range& range)
        : state(scratch, range.K, range.V), rows(take_rows(scratch, range.K, range.V)) {
        state.load(range.state);
    }
    void round() const { round_rows(rows, state.data, state.ld, round_up(state.K, 16), state.ld); }
    // += x^T y for n tokens, both interleaved.
    void add(const Words& x, const Words& y, int64_t n, Ahead& ahead) {
        multiply<DotPairs>(state.K, state.ld, product(x.left_transposed(pairs(n)), y), state.data, state.ld, true,
                           ahead);
    }
};

// The second product's left side is a lower triangle in pairs, or its transpose.
inline const auto keep_lower_pairs = [](int64_t, int64_t i1, int p, Product& product) {
    if (p == 1) product.depth = smaller(product.depth, pairs(i1));
};
inline const auto keep_upper_pairs = [](int64_t i0, int64_t, int p, Product& product) {
    if (p == 1) narrow_upper(i0 / 2, 0, product);
};

void key_state(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.key_state(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    RoundedState state(scratch, range);
    const Block k = scratch.rows(C, K);
    const Words k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V);
    const Words k_pairs = take_interleaved(scratch, C, K), v_pairs = take_interleaved(scratch, C, V);
    UnitScale scale;
    Weights weights;
    Ahead ahead;
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        weights.set(range.divisor, range.key_mask, t, n, count);
        count += count_real(range.key_mask, t, n);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), scale);
        copy_rows(v_rows, range.v, t, n, V, range.key_mask);
        ahead.clear();
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        round_rows(k_rows, k, n);
        interleave(k_pairs, k_rows, n);
        interleave(v_pairs, v_rows, n);
        state.add(k_pairs, v_pairs, n, ahead);
    }
    state.state.store(range.state_out);
}

void query_state(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.query_state(range, memory);
    Range as_keys = range;  // q_hat^T g is what k'^T v would be with these in their places
    as_keys.k = range.q;
    as_keys.v = range.grad;
    as_keys.key_mask = range.query_mask;
    as_keys.divisor = {false, true, 0, 0};
    key_state(as_keys, memory);
}

void causal_forward(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.causal_forward(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    RoundedState state(scratch, range);
    const Words state_pairs = take_interleaved(scratch, K, V);
    const Block q = scratch.rows(C, K), k = scratch.rows(C, K), o = scratch.rows(C, V);
    const Words q_rows = take_rows(scratch, C, K), k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V);
    const Words k_transposed = take_transposed(scratch, C, K);
    const Words k_pairs = take_interleaved(scratch, C, K), v_pairs = take_interleaved(scratch, C, V);
    float* scores = scratch.take(C * C + 16);
    const Words score_rows = take_rows(scratch, C, C);
    UnitScale q_scale, k_scale;
    Weights weights;
    Ahead ahead;
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        weights.set(range.divisor, range.key_mask, t, n, count);
        count += count_real(range.key_mask, t, n);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, q_scale);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), k_scale);
        copy_rows(v_rows, range.v, t, n, V, range.key_mask);
        ahead.clear();
        ask(ahead, range, range.o, t, V, true);
        ask(ahead, range, range.q, t + C, K, false);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        state.round();
        interleave(state_pairs, state.rows, K);
        round_rows(q_rows, q, n);
        round_rows(k_rows, k, n);
        transpose_words(k_transposed, k_rows, n);
        interleave(k_pairs, k_rows, n);
        interleave(v_pairs, v_rows, n);
        multiply_lower<DotPairs>(n, product(q_rows.left(pairs(K)), k_transposed), scores, C, ahead);
        round_lower(score_rows, scores, C, n);
        const Product products[] = {product(q_rows.left(pairs(K)), state_pairs),
                                    product(score_rows.left(pairs(n)), v_pairs)};
        multiply<DotPairs>(n, o.ld, products, 2, o.data, o.ld, false, ahead, keep_lower_pairs);
        store_rows(range.o, range.dtype, t, n, range.query_mask, o);
        if (t + C < range.tokens || range.state_out != nullptr) state.add(k_pairs, v_pairs, n, ahead);
    }
    state.state.store(range.state_out);
}

void causal_backward_q(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.causal_backward_q(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    RoundedState state(scratch, range);
    const Words state_transposed = take_transposed(scratch, K, V);
    const Block q = scratch.rows(C, K), k = scratch.rows(C, K), dq = scratch.rows(C, K);
    const Words k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V), g_rows = take_rows(scratch, C, V);
    const Words v_transposed = take_transposed(scratch, C, V);
    const Words k_pairs = take_interleaved(scratch, C, K), v_pairs = take_interleaved(scratch, C, V);
    float* dscores = scratch.take(C * C + 16);
    const Words dscore_rows = take_rows(scratch, C, C);
    UnitScale q_scale, k_scale;
    Weights weights;
    Ahead ahead;
    int64_t count = range.divisor.count;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        weights.set(range.divisor, range.key_mask, t, n, count);
        count += count_real(range.key_mask, t, n);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, q_scale);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), k_scale);
        copy_rows(v_rows, range.v, t, n, V, range.key_mask);
        copy_rows(g_rows, range.grad, t, n, V, range.query_mask);
        ahead.clear();
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.q, t + C, K, false);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        ask(ahead, range, range.grad, t + C, V, false);
        state.round();
        transpose_words(state_transposed, state.rows, K);
        round_rows(k_rows, k, n);
        transpose_words(v_transposed, v_rows, n);
        interleave(k_pairs, k_rows, n);
        interleave(v_pairs, v_rows, n);
        multiply_lower<DotPairs>(n, product(g_rows.left(pairs(V)), v_transposed), dscores, C, ahead);
        round_lower(dscore_rows, dscores, C, n);
        const Product products[] = {product(g_rows.left(pairs(V)), state_transposed),
                                    product(dscore_rows.left(pairs(n)), k_pairs)};
        multiply<DotPairs>(n, dq.ld, products, 2, dq.data, dq.ld, false, ahead, keep_lower_pairs);
        store_unit_gradient(range.dq, range.dtype, t, n, range.query_mask, dq, q, q_scale);
        if (t + C < range.tokens || range.state_out != nullptr) state.add(k_pairs, v_pairs, n, ahead);
    }
    state.state.store(range.state_out);
}

void causal_backward_kv(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.causal_backward_kv(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    RoundedState after(scratch, range);
    const Words after_pairs = take_interleaved(scratch, K, V), after_transposed = take_transposed(scratch, K, V);
    const Block q = scratch.rows(C, K), k = scratch.rows(C, K), v = scratch.rows(C, V);
    const Block dk = scratch.rows(C, K), dv = scratch.rows(C, V);
    const Words q_rows = take_rows(scratch, C, K), k_rows = take_rows(scratch, C, K);
    const Words v_rows = take_rows(scratch, C, V), g_rows = take_rows(scratch, C, V);
    const Words k_transposed = take_transposed(scratch, C, K), v_transposed = take_transposed(scratch, C, V);
    const Words q_pairs = take_interleaved(scratch, C, K), g_pairs = take_interleaved(scratch, C, V);
    float* scores = scratch.take(C * C + 16);
    const Words score_rows = take_rows(scratch, C, C), score_pairs = take_interleaved(scratch, C, C);
    const Words dscore_pairs = take_interleaved(scratch, C, C);
    UnitScale q_scale, k_scale;
    Weights weights;
    Ahead ahead;
    int64_t count = range.divisor.count + count_real(range.key_mask, 0, range.tokens);
    for (int64_t t = range.tokens > 0 ? (range.tokens - 1) / C * C : -1; t >= 0; t -= C) {
        const int64_t n = smaller(C, range.tokens - t);
        count -= count_real(range.key_mask, t, n);
        weights.set(range.divisor, range.key_mask, t, n, count);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, q_scale);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), k_scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        copy_rows(g_rows, range.grad, t, n, V, range.query_mask);
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.q, t - C, K, false);
        ask(ahead, range, range.k, t - C, K, false);
        ask(ahead, range, range.v, t - C, V, false);
        ask(ahead, range, range.grad, t - C, V, false);
        after.round();
        interleave(after_pairs, after.rows, K);
        transpose_words(after_transposed, after.rows, K);
        round_rows(q_rows, q, n);
        round_rows(k_rows, k, n);
        round_rows(v_rows, v, n);
        transpose_words(k_transposed, k_rows, n);
        transpose_words(v_transposed, v_rows, n);
        interleave(q_pairs, q_rows, n);
        interleave(g_pairs, g_rows, n);
        multiply_lower<DotPairs>(n, product(q_rows.left(pairs(K)), k_transposed), scores, C, ahead);
        round_lower(score_rows, scores, C, n);
        interleave(score_pairs, score_rows, n);
        multiply_lower<DotPairs>(n, product(g_rows.left(pairs(V)), v_transposed), scores, C, ahead);
        round_lower(score_rows, scores, C, n);
        interleave(dscore_pairs, score_rows, n);
        const Product for_k[] = {product(v_rows.left(pairs(V)), after_transposed),
                                 product(dscore_pairs.left_transposed(pairs(n)), q_pairs)};
        const Product for_v[] = {product(k_rows.left(pairs(K)), after_pairs),
                                 product(score_pairs.left_transposed(pairs(n)), g_pairs)};
        multiply<DotPairs>(n, dk.ld, for_k, 2, dk.data, dk.ld, false, ahead, keep_upper_pairs);
        multiply<DotPairs>(n, dv.ld, for_v, 2, dv.data, dv.ld, false, ahead, keep_upper_pairs);
        store_key_gradients(range, t, n, dk, dv, k, v, k_scale, weights);
        if (t > 0 || range.state_out != nullptr) after.add(q_pairs, g_pairs, n, ahead);
    }
    after.state.store(range.state_out);
}

void full_forward(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.full_forward(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    const RoundedState state(scratch, range);
    const Words state_pairs = take_interleaved(scratch, K, V);
    const Block q = scratch.rows(C, K), o = scratch.rows(C, V);
    const Words q_rows = take_rows(scratch, C, K);
    state.round();
    interleave(state_pairs, state.rows, K);
    UnitScale scale;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, scale);
        ahead.clear();
        ask(ahead, range, range.o, t, V, true);
        ask(ahead, range, range.q, t + C, K, false);
        round_rows(q_rows, q, n);
        multiply<DotPairs>(n, o.ld, product(q_rows.left(pairs(K)), state_pairs), o.data, o.ld, false, ahead);
        store_rows(range.o, range.dtype, t, n, range.query_mask, o);
    }
}

void full_backward_q(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.full_backward_q(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    const RoundedState state(scratch, range);
    const Words state_transposed = take_transposed(scratch, K, V);
    const Block q = scratch.rows(C, K), dq = scratch.rows(C, K);
    const Words g_rows = take_rows(scratch, C, V);
    state.round();
    transpose_words(state_transposed, state.rows, K);
    UnitScale scale;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        load_unit_rows(q, range.q, range.dtype, t, n, range.query_mask, nullptr, scale);
        copy_rows(g_rows, range.grad, t, n, V, range.query_mask);
        ahead.clear();
        ask(ahead, range, range.dq, t, K, true);
        ask(ahead, range, range.q, t + C, K, false);
        ask(ahead, range, range.grad, t + C, V, false);
        multiply<DotPairs>(n, dq.ld, product(g_rows.left(pairs(V)), state_transposed), dq.data, dq.ld, false, ahead);
        store_unit_gradient(range.dq, range.dtype, t, n, range.query_mask, dq, q, scale);
    }
}

void full_backward_kv(const Range& range, float* memory) {
    if (range.dtype != 1) return kernels_avx512.full_backward_kv(range, memory);
    const int64_t C = range.chunk, K = range.K, V = range.V;
    Scratch scratch(memory);
    const RoundedState after(scratch, range);
    const Words after_pairs = take_interleaved(scratch, K, V), after_transposed = take_transposed(scratch, K, V);
    const Block k = scratch.rows(C, K), v = scratch.rows(C, V), dk = scratch.rows(C, K), dv = scratch.rows(C, V);
    const Words k_rows = take_rows(scratch, C, K), v_rows = take_rows(scratch, C, V);
    after.round();
    interleave(after_pairs, after.rows, K);
    transpose_words(after_transposed, after.rows, K);
    UnitScale scale;
    Weights weights;
    Ahead ahead;
    for (int64_t t = 0; t < range.tokens; t += C) {
        const int64_t n = smaller(C, range.tokens - t);
        weights.set(range.divisor, range.key_mask, t, n, 0);
        load_unit_rows(k, range.k, range.dtype, t, n, range.key_mask, weights.get(), scale);
        load_rows(v, range.v, range.dtype, t, n, range.key_mask);
        ahead.clear();
        ask(ahead, range, range.dk, t, K, true);
        ask(ahead, range, range.dv, t, V, true);
        ask(ahead, range, range.k, t + C, K, false);
        ask(ahead, range, range.v, t + C, V, false);
        round_rows(k_rows, k, n);
        round_rows(v_rows, v, n);
        multiply<DotPairs>(n, dk.ld, product(v_rows.left(pairs(V)), after_transposed), dk.data, dk.ld, false, ahead);
        multiply<DotPairs>(n, dv.ld, product(k_rows.left(pairs(K)), after_pairs), dv.data, dv.ld, false, ahead);
        store_key_gradients(range, t, n, dk, dv, k, v, scale, weights);
    }
}

void step(const Range& range, float* memory) { kernels_avx512.step(range, memory); }

// Bound for every pass: 3 float blocks of K and of V, 3 of their layouts each at a word per number, scores, 4 states.
int64_t scratch_size(int64_t K, int64_t V, int64_t chunk) {
    const int64_t Kp = round_up(K, 32), Vp = round_up(V, 32), C = round_up(chunk, 32);
    const int64_t needed = chunk * 6 * (Kp + Vp) + 4 * C * C + 16 + 4 * Kp * Vp;
    const int64_t plain = kernels_avx512.scratch_size(K, V, chunk);
    return needed > plain ? needed : plain;
}

}  // namespace
