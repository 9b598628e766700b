// A forget gate as weights of queries and keys, so that all products stay those without one.
//
// With G the running sum of log2 of what is kept, and an integer R for each token, let
//
//     q~_i = 2^(G_i - R_i) q_hat_i        k~_j = 2^(R_j - G_j) k'_j
//
// While all R are the same, q~_i . k~_j has the weight 2^(G_i - G_j) already, and S~ = sum of k~_j^T v_j is 2^(R - G) S.
// R follows G at a distance that no weight overflows in. Where R has moved since the state was summed, rows that meet it
// are multiplied by a power of two, and so is the state when more is added; that rounds nothing. A chunk in which R
// moves is split: what passes from one part to another is multiplied by 2^(R_i - R_j). Going back in time D~, the sum
// of q~_i^T g_i, is 2^(G - R) D, and R follows in the other direction.
//
// The gradient of log_decay_t is the sum of q~_i . dq~_i - k~_i . dk~_i from t to the end of the range, and
// <D, S> there.
#pragma once

#include <cmath>

#include "gates.h"
#include "product.h"
#include "rows.h"

namespace {

// Weights stay between 2^-40 and 2^40: far from the ends of float, and half a chunk of strong decays fits between.
constexpr int kReach = 40;

inline float power_of_two(int n) { return n < -126 ? 0.0f : float_of(uint32_t((n > 127 ? 127 : n) + 127) << 23); }

// 2 ** y for any y up to 900.
inline double exp2_of_any(double y) { return exp2_of(y < -900 ? -900 : y); }

class Decay {
  public:
    bool moves = false;     // R is another one than before the chunk
    bool is_split = false;  // and more than one in it

    explicit Decay(const Range& range) : range_(range), is_given_(range.log_decay.data != nullptr), at_(range.offset) {}

    // Enter a chunk of n tokens from t on, behind the one that was entered last; or ahead of it, going back in time.
    void enter(int64_t t, int64_t n) {
        if (!is_given_) return;
        for (int64_t i = 0; i < n; i++) exponent_[i] = log2_kept(range_, t + i);
        for (int64_t i = 0; i < n; i++) exponent_[i] = at_ += exponent_[i];
        follow(n, false);
        at_ = exponent_[n - 1];
    }
    void enter_backward(int64_t t, int64_t n) {
        if (!is_given_) return;
        for (int64_t i = 0; i < n; i++) kept_[i] = log2_kept(range_, t + i);
        for (int64_t i = n; i-- > 0; at_ -= kept_[i]) exponent_[i] = at_;
        follow(n, true);
        at_ = exponent_[0] - kept_[0];
    }
    // The same forward in time for a sum of q~^T g, which needs no R: weights only fall.
    void enter_queries(int64_t t, int64_t n) {
        if (!is_given_) return;
        for (int64_t i = 0; i < n; i++) exponent_[i] = at_ += log2_kept(range_, t + i);
        weigh_queries(n);
    }

    const double* exponents() const { return is_given_ ? exponent_ : nullptr; }
    const float* query_weights() const { return is_given_ ? query_weight_ : nullptr; }

    // In a split chunk: scores [n, ld] from part to part. Whole vectors of them: what is right of the diagonal stays 0,
    // or is not read.
    void join(float* scores, int64_t ld, int64_t n) const {
        for (int64_t i = 0; i < n; i++, scores += ld)
            for (int64_t j = 0; j < round_up(i, kWidth); j++) scores[j] *= power_of_two(followed_[i] - followed_[j]);
    }
    // What rows are multiplied by where they meet the state before the chunk, and where they are added to it; and what
    // that state is multiplied by then.
    float to_before(int64_t i) const { return power_of_two(backward_ ? -followed_[i] : followed_[i]); }
    float to_after(int64_t i) const { return power_of_two(backward_ ? followed_[i] - last_ : last_ - followed_[i]); }
    float kept() const { return moves ? power_of_two(backward_ ? -last_ : last_) : 1; }

    // What the state is to be multiplied by behind the last chunk, 1 where it goes on as it is.
    float leave(bool backward) const {
        if (!is_given_) return 1;
        if (range_.offset_out != nullptr) {
            *range_.offset_out = at_;
            return 1;
        }
        return float(exp2_of_any(backward ? -at_ : at_));
    }

    // Of n tokens from t on, the last ones first: the gradients of their decays from what q~ . dq~, left by an earlier
    // pass, and k~ . dk~ are.
    void store_gradients(int64_t t, int64_t n, const float* of_keys) {
        if (range_.dlog_decay == nullptr) return;
        for (int64_t i = n; i-- > 0;) {
            from_here_ += double(range_.of_queries[t + i]) - of_keys[i];
            store_gradient(range_.mirrored ? t + i - 1 : t + i);
        }
    }
    // What D is to be multiplied by before the last chunk. All weights then differ from those of the pass forward in time
    // by powers of two, and what is rounded to fewer digits is rounded as there: what both passes have in common cancels.
    float arrive() {
        if (!is_given_ || range_.continues) return 1;
        at_ = range_.reached_offset - std::nearbyint(range_.reached_offset);
        return float(exp2_of_any(at_));
    }
    // <D, S> at the end of the range, D~ [K, V] in rows of ld.
    void start_gradients(const float* after, int64_t ld) {
        if (!is_given_) return;
        double sum = 0;
        for (int64_t i = 0; i < range_.K; i++) {
            const float *row = after + i * ld, *reached = range_.reached + i * range_.V;
            for (int64_t d = 0; d < range_.V; d++) sum += double(row[d]) * reached[d];
        }
        from_here_ = sum * exp2_of_any(range_.reached_offset - at_);
    }

  private:
    // Makes exponents of running sums, and weights of these.
    void follow(int64_t n, bool backward) {
        bool fits = true;
        for (int64_t i = 0; i < n; i++) fits &= exponent_[i] >= -kReach && exponent_[i] <= kReach;
        moves = !fits;
        is_split = false;
        backward_ = backward;
        if (moves) move(n);
        weigh_queries(n);
    }

    // R starts anew where the first token is, as far from where G goes as it may be, and again when that is too far.
    void move(int64_t n) {
        int now = 0;
        for (int64_t j = 0; j < n; j++) {
            const int64_t i = backward_ ? n - 1 - j : j;
            const double x = exponent_[i], distance = x - now;
            if (j == 0 ? x == x : distance < -kReach || distance > kReach)  // of NaN nothing is true
                now = backward_ ? int(std::ceil(x)) + kReach - 1 : int(std::floor(x)) - kReach + 1;
            followed_[i] = now;
        }
        for (int64_t i = 0; i < n; i++) exponent_[i] -= followed_[i];
        for (int64_t i = n; i < round_up(n, kWidth); i++) followed_[i] = followed_[n - 1];
        last_ = now;
        is_split = followed_[0] != followed_[n - 1];
    }

    void weigh_queries(int64_t n) {
        for (int64_t i = 0; i < n; i++) query_weight_[i] = float(exp2_of_any(exponent_[i]));
    }

    void store_gradient(int64_t i) {
        if (i < 0 && range_.starts) return;
        float& to = range_.dlog_decay[i * range_.dgate_stride];
        const float own = is_padding(range_.key_mask, i) ? 0.0f : float(from_here_);
        to = range_.mirrored ? to + own : own;
    }

    const Range& range_;
    const bool is_given_;
    double at_;             // G - R behind the last token, or before the first
    double from_here_ = 0;  // the sum for the gradients so far
    double exponent_[kMaxChunk], kept_[kMaxChunk];  // G_i - R_i; log2 of what each token keeps
    float query_weight_[kMaxChunk];
    bool backward_ = false;
    int followed_[kMaxChunk], last_ = 0;  // R_i, 0 where it was before the chunk; that of the token passed last
};

}  // namespace
