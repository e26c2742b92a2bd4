#pragma once

// Pinned positions: their cells always stay, and a selection chooses among the others as if they were all that there is.

#include "wkv-marks.h"
#include "wkv-policy.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace wkv {

// positions from first on, last not included
struct position_range {
    int32_t first;
    int32_t last;
};

// A cache without its pinned cells. A position counts as pinned where every (layer, kv head) holds it, so that all of them keep equally
// many for it.
class rest_cells {
public:
    // positions: of every (layer, kv head), as many as n_cells says
    rest_cells(const std::vector<position_range> & pinned, const std::vector<cell_positions> & positions, const std::vector<int32_t> & n_cells);

    const std::vector<int32_t> & cells() const { return n_rest; } // [heads]

    int64_t n_pinned() const { return at.size(); } // of every head

    const std::vector<cell_positions> & positions() const { return views; } // of the rest

    // Moves the scores of the rest of the heads i0 to i1 - 1 to the front, over those of pinned cells: for every head in turn n_rows rows.
    void take(float * scores, size_t i0, size_t i1, size_t n_rows) const;

    // marks of the rest become marks of all cells, with the pinned ones
    void give(const marks & rest, marks & keep) const;

    // host memory that such an object takes, in bytes at most
    static int64_t n_bytes(const std::vector<int32_t> & n_cells);

private:
    std::vector<int32_t>              at;     // pinned positions, ascending
    std::vector<std::vector<int32_t>> pinned; // [heads], their cells, ascending
    std::vector<std::vector<int32_t>> listed; // [heads], positions of the others
    std::vector<int32_t>              n_rest;
    std::vector<cell_positions>       views;
};

} // namespace wkv
