#pragma once

// Selection on the devices of layers: scores stay in their memory, and counts and a bit per cell come to the host.

#include "llama-kv-ragged-compact.h"
#include "policy/wkv-device.h"

#include <array>
#include <map>
#include <vector>

// everything throws std::runtime_error if a graph fails or memory for one runs out
class llama_kv_ragged_device_keys : public wkv::device_keys {
public:
    // they have to outlive it
    llama_kv_ragged_device_keys(llama_kv_ragged_choice & choice, const wkv::cache_view & view);

    // false as well if there is no memory for the keys
    bool    hold(int32_t il0, int32_t il1) override;
    int64_t not_finite() override;
    void    count(wkv::places kind, const wkv::key_digit & digit, int32_t * counts) override;
    void    mark (wkv::places kind, const std::vector<wkv::places_taken> & heads) override;
    void    read (wkv::marks & keep, size_t i0) override;

private:
    struct head {
        size_t  j; // among those that are held
        int32_t n_cells;
        int32_t i_word; // of its marks

        std::array<int32_t, 2> i_key;        // of its keys, of every plane
        std::array<int32_t, 2> i_not_finite; // of their count
    };

    // what one device holds
    struct part {
        const llama_kv_ragged_layer * layer; // one of those that lie there

        std::vector<head> heads;
        int64_t           n_keys  = 0;
        int64_t           n_words = 0;

        llama_kv_ragged_tensor                keys;  // I32 [n_keys] at least
        std::array<llama_kv_ragged_tensor, 2> marks; // I32 [n_words], the second one beside single tokens
        int                                   i_marks = 0; // the valid ones
    };

    llama_kv_ragged_choice & choice;
    const wkv::cache_view  & view;

    std::map<ggml_backend_dev_t, bool> supported;

    std::vector<part>         parts;
    llama_kv_ragged_workspace count_space;
    llama_kv_ragged_workspace mark_space;
    llama_kv_ragged_claim     claim; // of host memory: counts
    int64_t                   n_claimed = 0;

    bool   has_op(const llama_kv_ragged_layer & layer);
    bool   alloc(std::vector<part> & next);
    void   score(int32_t il, part & cur, size_t i_head);
    size_t n_planes() const { return choice.get_scoring().window_sizes.size(); }

    // the table of a part's heads
    std::vector<int32_t> table(const part & cur, wkv::places kind) const;
};
