// What one instruction set offers: functions over the tokens of one sequence and one head.
//
// Each `kernels_*.cpp` fills a Kernels; the dispatcher picks one at run time. Everything above (which sequence, which
// segment, which thread) is plain code in `schedule.cpp`.
#pragma once

#include <cstdint>

#include "abi.h"

// Tokens of a head that are computed at a time, before other heads have their turn; backward of the delta rule keeps the
// tiles of so many, and starts each such part from a state that forward kept there. Python's ERASE_SEGMENT is the same.
constexpr int64_t kTurn = 512;

struct Rows {  // one head's tokens: [tokens, D], `stride` elements apart
    void* data;
    int64_t stride;
};

struct Gate {  // one head's log_decay or beta: a number a token, `stride` apart; null: none
    const float* data;
    int64_t stride;
};

// c ** -p under each value, c the count of real tokens, or the same count for every token.
struct Divisor {
    bool divides;   // false: every weight is 1
    bool constant;  // true: `count` is the count at every token
    double p;
    int64_t count;  // real tokens before the range
};

struct Range {  // a range of tokens of one sequence and head
    int64_t dtype;      // of q, k, v and grad
    int64_t out_dtype;  // of o, dq, dk and dv: the same, or float where two walks are added
    int64_t tokens, K, V;
    int64_t chunk;  // tokens per tile, a multiple of 16
    Rows q, k, v, o, grad, dq, dk, dv;
    const uint8_t* key_mask;    // at the first token; null: all real
    const uint8_t* query_mask;  // the same one in self-attention
    Divisor divisor;
    Gate log_decay, beta;
    float *dlog_decay, *dbeta;  // at the first token, `dgate_stride` apart; or null
    int64_t dgate_stride;
    bool starts;    // no token of the sequence comes before
    bool mirrored;  // tokens run back in time: each adds what comes after it alone to what is there, see decay.h
    const float* before;  // erase_backward: [K, V] before the range, and `state` is the gradient after it
    const float* state;   // [K, V] before the range (gradients: after it); null: zeros
    float* state_out;    // [K, V] after the range (gradients: before it), or null
    uint16_t* lost;      // room for what rounding takes from a sum, see product.h: round_up(K) x round_up(V) to 16
    bool continues;      // lost holds what the range before it left there
    double* dp;          // the share of dp, or null
    // Of decay.h: how far the state is from what it stands for, at the start; the same at the end, null: not at all.
    double offset;
    double* offset_out;
    float* of_queries;     // [tokens] q~ . dq~, from one pass of backward to the other
    const float* reached;  // [K, V] the state after the range, for the gradient of log_decay; or null
    double reached_offset;
};

struct Kernels {
    const char* name;
    // Floats of scratch, 64-byte aligned, that each function needs.
    int64_t (*scratch_size)(int64_t K, int64_t V, int64_t chunk);
    // S += k_hat^T v' over the range, without output.
    void (*key_state)(const Range&, float* scratch);
    // dS += q_hat^T do over the range, without output.
    void (*query_state)(const Range&, float* scratch);
    void (*causal_forward)(const Range&, float* scratch);
    // dq, forward in time with the running S.
    void (*causal_backward_q)(const Range&, float* scratch);
    // dk and dv, backward in time with the running dS.
    void (*causal_backward_kv)(const Range&, float* scratch);
    // o = q_hat S, dq_hat = do S^T, and dk_hat = v' dS^T, dv' = k_hat dS with the state over all tokens.
    void (*full_forward)(const Range&, float* scratch);
    void (*full_backward_q)(const Range&, float* scratch);
    void (*full_backward_kv)(const Range&, float* scratch);
    // The delta rule, see erase.h; o may be null in forward. Backward takes at most kTurn tokens.
    int64_t (*erase_scratch_size)(int64_t K, int64_t V, int64_t chunk);
    void (*erase_forward)(const Range&, float* scratch);
    void (*erase_backward)(const Range&, float* scratch);
    // One token: the state goes from `state` to `state_out` (may be the same) while it is read out.
    void (*step)(const Range&, float* scratch);
    // The same with log_decay, beta or both.
    void (*gated_step)(const Range&, float* scratch);
    // One row's block of channels, see convolution.h; blocks of a row come one after the other.
    void (*convolution)(const Convolution&, int64_t task);
    void (*convolution_backward)(const Convolution&, int64_t task);
};

// A Kernels made of the functions that sweeps.h, or a variant of it, defines under these names.
#define COTTENTION_KERNELS(NAME) \
    {NAME,                       \
     scratch_size,               \
     key_state,                  \
     query_state,                \
     causal_forward,             \
     causal_backward_q,          \
     causal_backward_kv,         \
     full_forward,               \
     full_backward_q,            \
     full_backward_kv,           \
     erase_scratch_size,         \
     erase_forward,              \
     erase_backward,             \
     step,                       \
     gated_step,                 \
     convolution,                \
     convolution_backward}

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_neon;
