// Which cells stay.

#include "wkv-marks.h"

#include <algorithm>
#include <bitset>

namespace wkv {

static size_t n_words(int32_t n_cells) {
    return (size_t(n_cells) + 63)/64;
}

marks::marks(const int32_t * n_cells, size_t n_heads) : cells(n_cells, n_cells + n_heads), first(n_heads + 1, 0) {
    for (size_t i = 0; i < n_heads; ++i) {
        first[i + 1] = first[i] + n_words(cells[i]);
    }
    words.resize(first.back(), 0);
}

size_t marks::n_bytes(const int32_t * cells, size_t n_heads) {
    size_t res = 0;
    for (size_t i = 0; i < n_heads; ++i) {
        res += n_words(cells[i])*sizeof(uint64_t);
    }
    return res;
}

int32_t marks::count(size_t i) const {
    int32_t res = 0;
    for (size_t iw = first[i]; iw < first[i + 1]; ++iw) {
        res += std::bitset<64>(words[iw]).count();
    }
    return res;
}

void marks::clear(size_t i) {
    std::fill(words.begin() + first[i], words.begin() + first[i + 1], 0);
}

void marks::copy(size_t i, size_t from) {
    std::copy(words.begin() + first[from], words.begin() + first[from + 1], words.begin() + first[i]);
}

void marks::set(size_t i, const uint8_t * keep) {
    for (int32_t ic = 0; ic < cells[i]; ++ic) {
        words[first[i] + (ic >> 6)] |= uint64_t(keep[ic] != 0) << (ic & 63);
    }
}

void marks::load(size_t i, const uint32_t * bits) {
    for (size_t iw = first[i]; iw < first[i + 1]; ++iw, bits += 2) {
        words[iw] = uint64_t(bits[1]) << 32 | bits[0];
    }
}

void marks::write(size_t i, uint8_t * keep) const {
    for (int32_t ic = 0; ic < cells[i]; ++ic) {
        keep[ic] = get(i, ic);
    }
}

} // namespace wkv
