#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

    // Cells that stay, chosen where their scores are: one op, GGML_OP_RAGGED_SELECT, in three steps. For devices with memory of their
    // own; the CPU does not compute it.

    // what competes for cells as a whole, by a key
    enum ggml_ragged_places {
        GGML_RAGGED_PLACES_TOKENS,  // a cell by its key
        GGML_RAGGED_PLACES_REST,    // the same of cells that are not marked
        GGML_RAGGED_PLACES_WINDOWS, // omega cells from every multiple of omega on, by the mean of their top_p best scores (double)
    };

    struct ggml_ragged_selection {
        enum ggml_ragged_places places;

        int omega; // windows: cells
        int top_p; // windows: 1 to omega
        int first; // windows: 1 if the first one of a head comes before all others, else 0
    };

    // what a step is told of a head, I32 [GGML_RAGGED_N_HEAD, n_heads]
    enum ggml_ragged_head {
        GGML_RAGGED_HEAD_KEYS,    // where its keys begin
        GGML_RAGGED_HEAD_N_KEYS,  // so many of its cells have a key: those before the observation window, or all
        GGML_RAGGED_HEAD_WORDS,   // where its marks begin
        GGML_RAGGED_HEAD_N_CELLS, // cells
        GGML_RAGGED_HEAD_N_TAKE,  // mark: cells with a key that stay
        GGML_RAGGED_HEAD_TAIL,    // mark: all cells from this one on stay
        GGML_RAGGED_HEAD_KNOWN,   // count: the bits above the digit that a key must have, the lower 32 of them, then the upper ones
        GGML_RAGGED_N_HEAD = 8
    };

    // Scores as whole numbers in the same order, which are the larger the better; those of the first n_review cells are pooled: the best
    // from `before` cells before to `after` behind
    //
    // scores: [n_cells, n_heads]       F32, elements of a row contiguous
    // res:    [(n_cells + 1)*n_heads]  I32, a view of keys: [n_cells, n_heads], then how many scores of each head are not finite
    GGML_API struct ggml_tensor * ggml_ragged_keys(
            struct ggml_context * ctx,
            struct ggml_tensor  * scores,
            struct ggml_tensor  * keys,
            int                   n_review,
            int                   before,
            int                   after);

    // Cells of the places of every head, by a digit of their keys: the `width` bits from `shift` on, among those with the known bits above.
    // Keys have 32 bits, those of windows 64.
    //
    // keys:  [n]                        I32, of ggml_ragged_keys()
    // heads: [GGML_RAGGED_N_HEAD, n_heads] I32
    // marks: [n_words]                  I32, with GGML_RAGGED_PLACES_REST, else NULL
    // res:   [1 << width, n_heads]      I32
    //
    // n_most: cells with a key of the head that has most; width: 1 to 8
    GGML_API struct ggml_tensor * ggml_ragged_count(
            struct ggml_context         * ctx,
            struct ggml_tensor          * keys,
            struct ggml_tensor          * heads,
            struct ggml_tensor          * marks,
            struct ggml_ragged_selection  selection,
            int                           shift,
            int                           width,
            int                           n_most);

    // Marks the best places of every head, ties to the earlier one, and the cells from its tail on: bit i%32 of word i/32 for cell i.
    // A window that fits in part is marked in its best cells. A head has two words for every 64 cells, the last ones in part.
    //
    // marks: as above, the marks that there are
    // res:   a view of dst, I32 [n_words]; other than marks
    GGML_API struct ggml_tensor * ggml_ragged_mark(
            struct ggml_context         * ctx,
            struct ggml_tensor          * keys,
            struct ggml_tensor          * heads,
            struct ggml_tensor          * marks,
            struct ggml_tensor          * dst,
            struct ggml_ragged_selection  selection);

#ifdef __cplusplus
}
#endif
