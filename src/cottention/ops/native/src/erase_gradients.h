// What backward of the delta rule has for the gates of a tile, in any arithmetic; see erase_backward.h.
#pragma once

#include "erase_gates.h"

namespace {

inline int64_t tiles_of(int64_t tokens, int64_t chunk) { return (tokens + chunk - 1) / chunk; }

// The gradient of log_decay in a tile, from terms that its parts add.
struct DecayGradient {
    float from[kMaxChunk];     // at i, for all t <= i
    float behind[kMaxChunk];   // at j, for all t > j
    float between[kMaxChunk];  // at t, for this t alone
    double whole;              // for all t

    // From the rows of dq and dk that came through S, and of dk that came through D, which are added up. with_q(i, row):
    // the inner product with q_hat_i.
    template <class Q, class K>
    void add_rows(int64_t n, Q with_q, K with_k, const Block& dq, const Block& dk, const Block& from_after) {
        for (int64_t i = 0; i < n; i++) {
            from[i] = with_q(i, dq.row(i)) + with_k(i, dk.row(i));
            behind[i] = with_k(i, from_after.row(i));
            for (int64_t d = 0; d < dk.ld; d += kWidth) {
                const Vector::F x = Vector::load(from_after.row(i) + d);
                Vector::store(dk.row(i) + d, Vector::add(Vector::load(dk.row(i) + d), x));
            }
        }
    }

    void store(const Range& range, int64_t t, int64_t n) const {
        double before = whole, rest = 0;
        for (int64_t i = 0; i < n; i++) before += from[i];
        for (int64_t i = 0; i < n; i++) {
            const double sum = before + rest + between[i];
            range.dlog_decay[(t + i) * range.dgate_stride] = is_padding(range.key_mask, t + i) ? 0.0f : float(sum);
            before -= from[i];
            rest += behind[i];
        }
    }
};

inline float sum_of(const float* p, int64_t n) {
    Vector::F sum = Vector::zero();
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) sum = Vector::add(sum, Vector::load(p + i));
    if (i < n) sum = Vector::add(sum, load_tail(p + i, int(n - i)));
    return Vector::sum(sum);
}

// dP and dM become W dP and W dM; `between` gets sums of dP P + dM M over the pairs on both sides of each token.
inline void weigh_gradients(float* dp, float* dm, const float* p, const float* weights, const float* minus, int64_t ld, int64_t n,
                            DecayGradient& found) {
    float later[kMaxChunk] = {};  // over the rows from t on
    for (int64_t i = n - 1; i >= 0; i--) {
        for (int64_t j = 0; j <= i; j += kWidth) {
            const int64_t at = i * ld + j;
            const Vector::F of_p = Vector::load(dp + at), of_m = Vector::load(dm + at);
            const Vector::F weight = Vector::load(weights + at);
            const Vector::F through_m = Vector::mul(of_m, Vector::load(minus + at));
            const Vector::F through_p = Vector::fma(of_p, Vector::load(p + at), Vector::load(later + j));
            Vector::store(later + j, Vector::sub(through_p, through_m));
            Vector::store(dp + at, Vector::mul(of_p, weight));
            Vector::store(dm + at, Vector::mul(of_m, weight));
        }
        found.between[i] = sum_of(later, i);
    }
}

inline void store_beta_gradient(const Range& range, int64_t t, int64_t n, const Block& x, const Block& y) {
    if (range.dbeta == nullptr) return;
    for (int64_t i = 0; i < n; i++)
        range.dbeta[(t + i) * range.dgate_stride] =
            is_padding(range.key_mask, t + i) ? 0.0f : dot(x.row(i), y.row(i), x.ld);
}

inline void clear_diagonal(float* matrix, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < n; i++) matrix[i * ld + i] = 0;
}

}  // namespace
