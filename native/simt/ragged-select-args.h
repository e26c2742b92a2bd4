// What hosts tell the kernels of GGML_OP_RAGGED_SELECT. The op, its hosts and its kernels include this text, and nothing else in it.

#ifndef RAGGED_SELECT_ARGS_H
#define RAGGED_SELECT_ARGS_H

enum { RSEL_N_WARPS = 8, RSEL_N_THREADS = 32*RSEL_N_WARPS }; // of a block

enum { RSEL_N_CHUNK = 8*RSEL_N_THREADS }; // places that a block counts

enum { RSEL_WIDTH_MAX = 8, RSEL_N_DIGITS = 1 << RSEL_WIDTH_MAX }; // bits of a digit: a thread for each of its values

enum { RSEL_STEP_KEYS, RSEL_STEP_COUNT, RSEL_STEP_MARK };

// numbers of op parameters; those of keys take the places of the others
enum {
    RSEL_PARAM_STEP,
    RSEL_PARAM_PLACES, RSEL_PARAM_OMEGA, RSEL_PARAM_TOP_P, RSEL_PARAM_FIRST, RSEL_PARAM_SHIFT, RSEL_PARAM_WIDTH, RSEL_PARAM_N_MOST,
    RSEL_PARAM_N_REVIEW = 1, RSEL_PARAM_BEFORE, RSEL_PARAM_AFTER
};

// numbers of enum ggml_ragged_places, which kernels do not see; and of enum ggml_ragged_head
enum { RSEL_TOKENS, RSEL_REST, RSEL_WINDOWS };
enum { RSEL_HEAD_KEYS, RSEL_HEAD_N_KEYS, RSEL_HEAD_WORDS, RSEL_HEAD_N_CELLS, RSEL_HEAD_N_TAKE, RSEL_HEAD_TAIL, RSEL_HEAD_KNOWN, RSEL_N_HEAD = 8 };

struct rsel_args {
    int32_t places; // RSEL_TOKENS, ...
    int32_t omega, top_p;
    int32_t first;        // places that come before all others
    int32_t shift, width; // count: of the digit
    int32_t n_chunks;     // count: blocks of a head

    // keys
    int32_t n_cells, n_heads, n_review, before, after;
    int32_t n_blocks; // of a head
    int64_t nb_scores; // bytes between heads
};

#endif
