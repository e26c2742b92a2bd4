#pragma once

// Which cells stay.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace wkv {

// bits of one head's cells, those of another
struct mark_row {
    uint64_t * words;

    bool get(int32_t i) const { return words[i >> 6] >> (i & 63) & 1; }
    void set(int32_t i)       { words[i >> 6] |= uint64_t(1) << (i & 63); }

    void set(int32_t i0, int32_t i1) {
        for (int32_t i = i0; i < i1; ++i) {
            set(i);
        }
    }
};

// One bit per cell, for every (layer, kv head) in turn. Words belong to one head each, so that threads can mark different heads.
class marks {
public:
    marks() = default;
    marks(const int32_t * cells, size_t n_heads);

    mark_row row(size_t i) { return { words.data() + first[i] }; }

    bool    get  (size_t i, int32_t ic) const { return words[first[i] + (ic >> 6)] >> (ic & 63) & 1; }
    int32_t count(size_t i) const;

    void clear(size_t i);
    void copy (size_t i, size_t from);          // of a head that holds as many cells
    void set  (size_t i, const uint8_t * keep); // where it is not 0
    void write(size_t i, uint8_t * keep) const; // 1 or 0
    void load (size_t i, const uint32_t * bits); // two words of 32 cells for every 64

    // calls fn(i0, i1) for the cells i0 to i1 - 1 that are marked, one run after the other
    template <typename F>
    void for_runs(size_t i, F fn) const;

    static size_t n_bytes(const int32_t * cells, size_t n_heads);

private:
    std::vector<int32_t>  cells;
    std::vector<size_t>   first; // [heads + 1], words
    std::vector<uint64_t> words;
};

template <typename F>
void marks::for_runs(size_t i, F fn) const {
    int32_t i0 = -1; // of the run that is open
    for (int32_t iw = 0; 64*iw < cells[i]; ++iw) {
        const uint64_t word = words[first[i] + iw];
        if (word == (i0 < 0 ? 0 : ~uint64_t(0))) {
            continue;
        }
        for (int32_t ic = 64*iw; ic < 64*(iw + 1); ++ic) {
            const bool is_marked = word >> (ic & 63) & 1;
            if (is_marked != (i0 >= 0)) {
                if (i0 >= 0) {
                    fn(i0, ic);
                }
                i0 = is_marked ? ic : -1;
            }
        }
    }
    if (i0 >= 0) {
        fn(i0, cells[i]);
    }
}

} // namespace wkv
