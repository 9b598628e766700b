// What every pass over tokens is made of: scratch, the state, rows asked for ahead, and the gradients of keys.
#pragma once

#include "ahead.h"
#include "decay.h"
#include "product.h"
#include "rows.h"

namespace {

class Scratch {
  public:
    explicit Scratch(float* next) : next_(next) {}
    float* take(int64_t n) {
        float* p = next_;
        next_ += round_up(n, 16);
        return p;
    }
    Block rows(int64_t n, int64_t D) {
        Block block(nullptr, D);
        block.data = take(n * block.ld);
        return block;
    }

  private:
    float* next_;
};

// A state [K, V] in scratch with padded rows, or transposed [V, K].
struct State {
    float* data;
    int64_t K, V, ld;
    bool is_zero = true;  // products with it need no work: all that a short sequence has

    State(Scratch& scratch, int64_t K, int64_t V) : K(K), V(V), ld(round_up(V, kWidth)) {
        data = scratch.take(round_up(K, kWidth) * ld);
    }
    void load(const float* kv) {
        clear(data, round_up(K, kWidth) * ld);
        is_zero = kv == nullptr;
        if (is_zero) return;
        for (int64_t i = 0; i < K; i++) load_row(data + i * ld, kv + i * V, V);
    }
    void store(float* kv) const {
        if (kv == nullptr) return;
        for (int64_t i = 0; i < K; i++) store_row(kv + i * V, data + i * ld, V);
    }
    void transpose_to(State& other) const {
        transpose_rows(other.data, other.ld, data, ld, K);
        other.is_zero = is_zero;
    }
    void scale(float factor) {
        if (!is_zero && factor != 1) scale_row(data, factor, round_up(K, kWidth) * ld);
    }
    // How far a sum over `depth` numbers of the state has to go.
    int64_t depth_of(int64_t depth) const { return is_zero ? 0 : depth; }
};

// A state that tokens are added to, with what rounding took from it in the range's memory.
struct Sum : State {
    uint16_t* lost;

    Sum(Scratch& scratch, const Range& range, int64_t K, int64_t V) : State(scratch, K, V), lost(range.lost) {
        if (!range.continues) memset(lost, 0, size_t(round_up(K, kWidth) * ld) * sizeof *lost);
    }
    // `kept` times itself, a power of two, += x^T y for n tokens of x [n, K] and y [n, V].
    void add(const Block& x, const Block& y, int64_t n, Ahead& ahead, float kept = 1) {
        add<MultiplyAdd>({x.data, 1, x.ld, y.data, y.ld, n}, ahead, kept);
    }
    template <class Arithmetic>
    void add(const Product& product, Ahead& ahead, float kept) {
        multiply<Arithmetic>(K, ld, product, data, lost, ld, ahead, kept);
        is_zero = false;
    }
};

// Ask for the rows that chunk t reads or writes; nothing when there is no such chunk.
inline void ask(Ahead& ahead, const Range& range, const Rows& rows, int64_t t, int64_t D, bool to_write) {
    if (t < 0 || t >= range.tokens) return;
    const int64_t size = (to_write ? range.out_dtype : range.dtype) == 0 ? 4 : 2, stride = rows.stride * size;
    ahead.add(static_cast<const char*>(rows.data) + t * stride, stride, smaller(range.chunk, range.tokens - t),
              D * size, to_write);
}

inline void scale_to_before(const Block& block, const Decay& decay, int64_t n) {
    for (int64_t i = 0; i < n; i++) scale_row(block.row(i), decay.to_before(i), block.ld);
}
inline void scale_to_after(const Block& block, const Decay& decay, int64_t n) {
    for (int64_t i = 0; i < n; i++) scale_row(block.row(i), decay.to_after(i), block.ld);
}

// What is to be done to scores [n, ld] before they are used, if anything.
inline void finish_scores(const Range& range, const Decay& decay, float* scores, int64_t ld, int64_t n) {
    if (decay.is_split) decay.join(scores, ld, n);
    for (int64_t i = 0; i < n && range.mirrored; i++) scores[i * ld + i] = 0;
}

// dk and dv of n tokens from t on, from the gradients of k' and v; collects dp.
inline void store_key_gradients(const Range& range, int64_t t, int64_t n, const Block& dk, const Block& dv,
                                const Block& k, const Block& v, const UnitScale& scale, const Weights& weights,
                                float* inner = nullptr) {
    if (weights.divides && range.dp != nullptr)
        for (int64_t i = 0; i < n; i++)
            if (!is_padding(range.key_mask, t + i))
                *range.dp -= double(weights.log_count[i]) * dot(v.row(i), dv.row(i), v.ld);
    store_rows(range.dv, range.out_dtype, t, n, range.key_mask, dv, range.mirrored);
    store_unit_gradient(range.dk, range.out_dtype, t, n, range.key_mask, dk, k, scale, range.mirrored, inner);
}

}  // namespace
