#pragma once

// Scores that stay on the devices where they are made: their keys are counted and marked there, and what the heads hold is decided here.

#include "wkv-parts.h"

namespace wkv {

// what competes for cells as a whole
enum class places {
    tokens,  // kind = tokens: cells before the observation window, by pooled score
    windows, // kind = windows: those of such cells
    rest,    // token_share: cells that are not marked, by their token_score()
};

// what stays of a head
struct places_taken {
    int32_t n;    // cells of the best places
    int32_t tail; // and all cells from this one on
};

// Keys of some layers, on their devices. Heads are those of the layers il0 to il1 - 1 that hold() was called with, in turn. Everything
// may throw.
class device_keys {
public:
    virtual ~device_keys() = default;

    // scores the layers il0 to il1 - 1, whose keys stay until the next call, without marks; false if their devices cannot
    virtual bool hold(int32_t il0, int32_t il1) = 0;

    // the first head with a score that is not finite, -1 if there is none
    virtual int64_t not_finite() = 0;

    // as competition::count; a key has n_bits(kind)
    virtual void count(places kind, const key_digit & digit, int32_t * counts) = 0;

    // the best places, ties to the earlier one; rest: beside those that are marked
    virtual void mark(places kind, const std::vector<places_taken> & heads) = 0;

    // what is marked, for the heads from i0 on
    virtual void read(marks & keep, size_t i0) = 0;
};

constexpr int32_t n_bits(places kind) { return kind == places::windows ? 64 : 32; }

// longer ones are sorted faster on the host, which looks at every score once
constexpr int32_t OMEGA_MAX_DEVICE       = 128;
constexpr int32_t KERNEL_SIZE_MAX_DEVICE = 1024;

// whether select_on_devices() chooses as the policy says: windows that every head has by itself, and windows and scores that carry over
// while no position is missing
bool fits_devices(const cache_view & view, int32_t il0, int32_t il1);

// What select_cells() does with the layers il0 to il1 - 1, whose keys are held; "" or why it cannot be done.
std::string select_on_devices(const cache_view & view, device_keys & devices, int32_t il0, int32_t il1, head_budgets & own, marks & keep);

// host memory that this takes beside marks, in bytes
int64_t select_on_devices_bytes(const cache_view & view, int32_t il0, int32_t il1);

} // namespace wkv
