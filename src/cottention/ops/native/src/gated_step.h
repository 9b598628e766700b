// One token with decay, erase or both: the state is read for k and q together, then written.
//
//     u = beta (v' - a k_hat S)      o = a q_hat S + (q_hat . k_hat) u      S <- a S + k_hat^T u      u = v' without beta
#pragma once

#include "erase_gates.h"

namespace {

struct GatedToken {
    const float *q, *k, *v;
    float inner, left, beta;  // q_hat . k_hat, and a
    bool erases;
};

// Some vectors of columns; fewer than `columns` of the last one where it is less than a vector.
template <int kVectors, bool kIsTail>
inline void gated_columns(const GatedToken& token, int64_t d, int64_t K, int64_t V, int columns, const float* kv,
                          float* out, float* o) {
    const auto load = [&](const float* p) {
        if constexpr (kIsTail) return load_tail(p, columns);
        else return Vector::load(p);
    };
    Vector::F for_k[kVectors], for_q[kVectors], u[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) for_k[j] = for_q[j] = Vector::zero();
    const float* row = kv;
    for (int64_t i = 0; i < K && kv != nullptr; i++, row += V) {
        const Vector::F query = Vector::set1(token.q[i]), key = Vector::set1(token.k[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
            const Vector::F x = load(row + j * kWidth);
            for_k[j] = Vector::fma(key, x, for_k[j]);
            for_q[j] = Vector::fma(query, x, for_q[j]);
        }
    }
    const Vector::F left = Vector::set1(token.left), inner = Vector::set1(token.inner);
    const Vector::F erased = Vector::set1(-token.left), beta = Vector::set1(token.beta);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
        u[j] = Vector::load(token.v + d + j * kWidth);
        if (token.erases) u[j] = Vector::mul(beta, Vector::fma(erased, for_k[j], u[j]));
        Vector::store(o + d + j * kWidth, Vector::fma(inner, u[j], Vector::mul(left, for_q[j])));
    }
    row = kv;
    for (int64_t i = 0; i < K; i++, out += V) {
        const Vector::F key = Vector::set1(token.k[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
            Vector::F x = Vector::mul(key, u[j]);
            if (kv != nullptr) x = Vector::fma(left, load(row + j * kWidth), x);
            if constexpr (kIsTail) store_tail(out, x, columns);
            else Vector::store(out + j * kWidth, x);
        }
        if (kv != nullptr) row += V;
    }
}

void gated_step(const Range& range, float* memory) {
    Scratch scratch(memory);
    const int64_t K = range.K, V = range.V;
    const Block q = scratch.rows(kWidth, K), k = scratch.rows(kWidth, K);
    const Block v = scratch.rows(kWidth, V), o = scratch.rows(kWidth, V);
    UnitScale scale;
    Weights weights;
    weights.set(range.divisor, range.key_mask, 0, 1, range.divisor.count);
    load_unit_rows(q, range.q, range.dtype, 0, 1, range.query_mask, nullptr, scale);
    load_unit_rows(k, range.k, range.dtype, 0, 1, range.key_mask, nullptr, scale);
    load_rows(v, range.v, range.dtype, 0, 1, range.key_mask);
    if (weights.divides) scale_rows(v, v, weights.weight, 1, 1);
    const bool is_hidden = is_padding(range.key_mask, 0);
    const float decay = is_hidden || range.log_decay.data == nullptr ? 0.0f : range.log_decay.data[0];
    const float beta = is_hidden || range.beta.data == nullptr ? 0.0f : range.beta.data[0];
    const GatedToken token = {q.data, k.data, v.data, dot(q.data, k.data, q.ld), exp_of(decay), beta,
                              range.beta.data != nullptr};
    for (int64_t d = 0; d < V;) {
        const int64_t left = (V - d) / kWidth;
        const float* kv = range.state == nullptr ? nullptr : range.state + d;
        float* out = range.state_out + d;
        if (left >= 4) {
            gated_columns<4, false>(token, d, K, V, 0, kv, out, o.data);
            d += 4 * kWidth;
        } else if (left > 0) {
            gated_columns<1, false>(token, d, K, V, 0, kv, out, o.data);
            d += kWidth;
        } else {
            gated_columns<1, true>(token, d, K, V, int(V - d), kv, out, o.data);
            d = V;
        }
    }
    store_rows(range.o, range.dtype, 0, 1, range.query_mask, o);
}

}  // namespace
