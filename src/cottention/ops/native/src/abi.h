// The plain C interface of the library: no torch, no Python, one struct of 64-bit words per call.
//
// Python fills a Call by name (cottention/ops/native/call.py) and compares the layout of both when it loads the library.
// A pointer is a word, 0 where there is none. Tensors are described by element strides; their last dimension has stride 1. Every
// function returns 0, or a Status.
//
//     Call call = {...}; int status = cottention_forward(&call);
#pragma once

#include <cstdint>

// Changes with the functions and what fields mean, so that a library left over from another version is told apart.
#define COTTENTION_ABI_VERSION 4

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

enum Status : int { kOk = 0, kOutOfMemory = 1, kBadBoundaries = 2, kUnknownInstructionSet = 3 };

struct View {  // [B, T, H, D], [B, T, H], or [B, H, D] with `token` unused
    int64_t data, batch, token, head;
};

// Every field of a call in its order; the structure and the names that Python compares with its own come from this list.
#define COTTENTION_CALL(WORD, VIEW)                                                                    \
    WORD(dtype)       /* DType of q, k, v, o and their gradients; never kFloat64 */                    \
    WORD(causal)      /* bool */                                                                       \
    WORD(num_threads) /* at most this many, the calling one included */                                \
    WORD(chunk)       /* tokens per tile, 0: choose */                                                 \
    WORD(B)                                                                                            \
    WORD(T)                                                                                            \
    WORD(S)                                                                                            \
    WORD(H)                                                                                            \
    WORD(K)                                                                                            \
    WORD(V)                                                                                            \
    WORD(num_sequences) /* B, or the packed ones */                                                    \
    WORD(boundaries)    /* int64 [num_sequences + 1], or 0: rows of a batch */                         \
    WORD(mask)          /* uint8 [B, S], or 0 */                                                       \
    WORD(mask_row)      /* and its row stride */                                                       \
    WORD(norm_const)                                                                                   \
    WORD(norm_const_dtype)                                                                             \
    WORD(norm_const_stride)                                                                            \
    WORD(seen)       /* int64 [N] before the first token, or 0 */                                      \
    WORD(kv)         /* float [N, H, K, V] before the first token, or 0 */                             \
    WORD(final_kv)   /* float [N, H, K, V] to write, or 0; of all keys when not causal */              \
    WORD(final_seen) /* int64 [N] to write, or 0 */                                                    \
    VIEW(q)                                                                                            \
    VIEW(k)                                                                                            \
    VIEW(v)                                                                                            \
    VIEW(o)                                                                                            \
    VIEW(grad) /* of o; backward alone, like all gradients */                                          \
    WORD(dq)   /* contiguous, like dk and dv */                                                        \
    WORD(dk)                                                                                           \
    WORD(dv)                                                                                           \
    WORD(dm)         /* float [H] to write, or 0 */                                                    \
    WORD(grad_final) /* float [N, H, K, V], or 0 */                                                    \
    WORD(dkv)        /* float [N, H, K, V] to write, or 0 */                                           \
    VIEW(log_decay)  /* float [B, T, H], 0: nothing is forgotten */                                    \
    VIEW(beta)       /* float [B, T, H], 0: nothing is erased */                                       \
    WORD(dlog_decay) /* float [B, T, H] to write, contiguous, or 0 */                                  \
    WORD(dbeta)      /* the same */                                                                      \
    WORD(saved)      /* with beta: float [., H, K, V], states after every saved_tokens, or 0; of each  */    \
    WORD(saved_tokens)  /* sequence one for each such part that it begins; backward reads what forward wrote */ \
    WORD(state_indices) /* int64 [N], step alone: the rows of kv and seen that are read and written, or 0 */

struct Call {
#define COTTENTION_WORD(name) int64_t name;
#define COTTENTION_VIEW(name) View name;
    COTTENTION_CALL(COTTENTION_WORD, COTTENTION_VIEW)
#undef COTTENTION_WORD
#undef COTTENTION_VIEW
};

// A short convolution, see convolution.h; x, y and their gradients are [R, T or S, C] of one dtype.
#define COTTENTION_CONVOLUTION(WORD)                                    \
    WORD(dtype)     /* DType, never kFloat64 */                         \
    WORD(activates) /* bool: whether SiLU follows */                    \
    WORD(num_threads)                                                   \
    WORD(R) /* rows */                                                  \
    WORD(T) /* tokens of x */                                           \
    WORD(S) /* tokens of y */                                           \
    WORD(C) /* channels */                                              \
    WORD(W) /* taps, at most 64 */                                      \
    WORD(before) /* zeros in front of x that the first taps read */     \
    WORD(weight) /* float [C, W] */                                     \
    WORD(x)                                                             \
    WORD(x_row)                                                         \
    WORD(x_token)                                                       \
    WORD(y)  /* to write, contiguous; forward alone */                  \
    WORD(dy) /* backward alone, like all that follows */                \
    WORD(dy_row)                                                        \
    WORD(dy_token)                                                      \
    WORD(dx)      /* to write, contiguous, or 0 */                      \
    WORD(dweight) /* float [R, C, W] to write, each row's share, or 0 */

struct Convolution {
#define COTTENTION_WORD(name) int64_t name;
    COTTENTION_CONVOLUTION(COTTENTION_WORD)
#undef COTTENTION_WORD
};

#if defined(__GNUC__)
#define COTTENTION_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define COTTENTION_EXPORT extern "C"
#endif

COTTENTION_EXPORT int cottention_abi_version();
// A line for each word of Call, its name and offset ("q_batch 176"), and a last one, "size 480".
COTTENTION_EXPORT const char* cottention_call_layout();
// Name of the index-th instruction set that runs here, plainest first, null after the last; -1: of the active one.
COTTENTION_EXPORT const char* cottention_instruction_set(int64_t index);
// Make this one active, for tests and for whoever suspects a kernel; the widest is at first.
COTTENTION_EXPORT int cottention_use_instruction_set(const char* name);
// o, and final_kv and final_seen where asked for.
COTTENTION_EXPORT int cottention_forward(const Call* call);
// dq, dk, dv, and dm and dkv where asked for. When not causal, kv is the state over all keys that forward wrote.
COTTENTION_EXPORT int cottention_backward(const Call* call);
// One token (T = 1): o, final_kv and final_seen; final_kv may be kv itself, and with state_indices it is.
COTTENTION_EXPORT int cottention_step(const Call* call);
// The same lines for Convolution.
COTTENTION_EXPORT const char* cottention_convolution_layout();
// y.
COTTENTION_EXPORT int cottention_convolution(const Convolution* call);
// dx and dweight where asked for.
COTTENTION_EXPORT int cottention_convolution_backward(const Convolution* call);
