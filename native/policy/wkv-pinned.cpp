// Pinned positions.

#include "wkv-pinned.h"

#include <algorithm>
#include <numeric>

namespace wkv {

// the cell of a position, or n_cells
static int32_t find(const cell_positions & positions, int32_t n_cells, int32_t position) {
    int32_t lo = 0;
    int32_t hi = n_cells;
    while (lo < hi) {
        const int32_t mid = lo + (hi - lo)/2;
        if (positions[mid] < position) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return lo < n_cells && positions[lo] == position ? lo : n_cells;
}

rest_cells::rest_cells(
        const std::vector<position_range> & ranges, const std::vector<cell_positions> & positions, const std::vector<int32_t> & n_cells) :
    pinned(n_cells.size()), listed(n_cells.size()) {
    // those of the ranges that the first head holds, then those of them that all others do
    for (int32_t ic = 0; ic < n_cells[0]; ++ic) {
        const int32_t position = positions[0][ic];
        if (std::any_of(ranges.begin(), ranges.end(), [&](const auto & cur) { return cur.first <= position && position < cur.last; })) {
            at.push_back(position);
        }
    }
    for (size_t i = 1; i < n_cells.size(); ++i) {
        at.erase(std::remove_if(at.begin(), at.end(), [&](int32_t cur) { return find(positions[i], n_cells[i], cur) == n_cells[i]; }), at.end());
    }

    for (size_t i = 0; i < n_cells.size(); ++i) {
        pinned[i].reserve(at.size());
        listed[i].reserve(n_cells[i] - at.size());
        for (int32_t ic = 0; ic < n_cells[i]; ++ic) {
            const int32_t position = positions[i][ic];
            if (pinned[i].size() < at.size() && position == at[pinned[i].size()]) {
                pinned[i].push_back(ic);
            } else {
                listed[i].push_back(position);
            }
        }
        n_rest.push_back(listed[i].size());
        views.push_back({ listed[i].data(), n_rest[i], 0 });
    }
}

void rest_cells::take(float * scores, size_t i0, size_t i1, size_t n_rows) const {
    const float * src = scores;
    float       * dst = scores;
    for (size_t i = i0; i < i1; ++i) {
        for (size_t ir = 0; ir < n_rows; ++ir) {
            // between one pinned cell and the next
            const float * row = src;
            for (const int32_t ic : pinned[i]) {
                dst = std::copy(src, row + ic, dst);
                src = row + ic + 1;
            }
            const float * end = row + n_rest[i] + pinned[i].size();
            dst = std::copy(src, end, dst);
            src = end;
        }
    }
}

void rest_cells::give(const marks & rest, marks & keep) const {
    for (size_t i = 0; i < n_rest.size(); ++i) {
        mark_row row = keep.row(i);

        size_t ip = 0;
        for (int32_t ic = 0, ir = 0; ir < n_rest[i] || ip < pinned[i].size(); ++ic) {
            if (ip < pinned[i].size() && pinned[i][ip] == ic) {
                row.set(ic);
                ++ip;
            } else if (rest.get(i, ir++)) {
                row.set(ic);
            }
        }
    }
}

int64_t rest_cells::n_bytes(const std::vector<int32_t> & n_cells) {
    // a position of each, pinned or not; their marks
    return int64_t(sizeof(int32_t))*std::accumulate(n_cells.begin(), n_cells.end(), int64_t(0)) + marks::n_bytes(n_cells.data(), n_cells.size()) +
        (n_cells.empty() ? 0 : int64_t(sizeof(int32_t))*n_cells[0]);
}

} // namespace wkv
