// The kernels; tensors as in ggml-ragged-select.h, with keys and marks as uint32_t. What they add to or set single bits of was set to zero
// by rsel_zero() before.

static SIMT_FUNC void rsel_zero(SIMT_GLOBAL(uint32_t) dst, int32_t n, simt_ids id) {
    const int32_t i = id.block*RSEL_N_THREADS + id.tid;
    if (i < n) {
        dst[i] = 0;
    }
}

// a cell each thread; block = head*n_blocks + part
static SIMT_FUNC void rsel_keys(rsel_args a, SIMT_GLOBAL(const char) scores, SIMT_GLOBAL(uint32_t) dst, simt_ids id) {
    const int32_t ih = id.block/a.n_blocks;
    const int32_t ic = id.block%a.n_blocks*RSEL_N_THREADS + id.tid;
    if (ic >= a.n_cells) {
        return;
    }
    SIMT_GLOBAL(const char) row = scores + ih*a.nb_scores;

    const uint32_t own = simt_load_u32(row + (int64_t) ic*4);
    if (!rsel_is_finite(own)) {
        simt_atomic_add(SIMT_CAST(int32_t, dst), a.n_cells*a.n_heads + ih, 1);
    }

    uint32_t key = rsel_key(own);
    if (ic < a.n_review) {
        const int32_t i1 = simt_min(a.n_review - 1, ic + a.after);
        for (int32_t i = simt_max(0, ic - a.before); i <= i1; ++i) {
            key = simt_max(key, rsel_key(simt_load_u32(row + (int64_t) i*4)));
        }
    }
    dst[ih*a.n_cells + ic] = key;
}

// RSEL_N_CHUNK places each block; block = head*n_chunks + chunk
static SIMT_FUNC void rsel_count(
        rsel_args a, SIMT_GLOBAL(const uint32_t) keys, SIMT_GLOBAL(const int32_t) heads, SIMT_GLOBAL(const uint32_t) marks,
        SIMT_GLOBAL(int32_t) dst, rsel_shared sh, simt_ids id) {
    const int32_t ih = id.block/a.n_chunks;
    const int32_t i0 = id.block%a.n_chunks*RSEL_N_CHUNK;

    const rsel_head h  = rsel_head_of(heads, ih);
    const int32_t   i1 = simt_min(rsel_n_places(a, h), i0 + RSEL_N_CHUNK);

    const uint32_t mask = ((uint32_t) 1 << a.width) - 1;

    sh.counts[id.tid] = 0;
    simt_barrier();
    for (int32_t i = i0 + id.tid; i < i1; i += RSEL_N_THREADS) {
        if (i < a.first) {
            continue;
        }
        const rsel_place p = rsel_place_of(a, h, keys, marks, i);
        if (p.n > 0 && p.key >> a.shift >> a.width == h.known) {
            simt_atomic_add(sh.counts, (int32_t) ((uint32_t) (p.key >> a.shift) & mask), p.n);
        }
    }
    simt_barrier();

    const int32_t own = sh.counts[id.tid];
    if (own > 0) {
        simt_atomic_add(dst, (ih << a.width) + id.tid, own);
    }
}

// bits of a word of 32 cells from ic on that lie from i0 to i1 - 1
static SIMT_FUNC uint32_t rsel_bits(int32_t ic, int32_t i0, int32_t i1) {
    const int32_t from = simt_max(0, i0 - ic);
    const int32_t to   = simt_min(32, i1 - ic);
    return from >= to ? 0 : (to == 32 ? ~(uint32_t) 0 : ((uint32_t) 1 << to) - 1) & ~(((uint32_t) 1 << from) - 1);
}

// a head each block, in which a word is one thread's
static SIMT_FUNC void rsel_mark_tokens(
        rsel_args a, SIMT_GLOBAL(const uint32_t) keys, SIMT_GLOBAL(const int32_t) heads, SIMT_GLOBAL(const uint32_t) marks,
        SIMT_GLOBAL(uint32_t) dst, rsel_shared sh, simt_ids id) {
    const rsel_head h    = rsel_head_of(heads, id.block);
    const rsel_last last = rsel_find_last(a, h, keys, marks, h.n_take, 32, sh, id);

    const int32_t n_words = (h.n_cells + 63)/64*2;

    int32_t n_before = 0; // tied cells of the words before
    for (int32_t iw0 = 0; iw0 < n_words; iw0 += RSEL_N_THREADS) {
        const int32_t iw = iw0 + id.tid;

        uint32_t word   = 0;
        uint32_t over   = 0;
        uint32_t tied   = 0;
        int32_t  n_tied = 0;
        if (iw < n_words) {
            word = a.places == RSEL_REST ? (uint32_t) marks[h.words + iw] : 0;
            for (int32_t i = 0; i < 32 && iw*32 + i < h.n_keys && h.n_take > 0; ++i) {
                if (word >> i & 1) {
                    continue;
                }
                const uint32_t key     = keys[h.keys + iw*32 + i];
                const bool     is_over = last.all || key > last.key;
                const bool     is_tied = !is_over && key == last.key;

                over   |= (uint32_t) is_over << i;
                tied   |= (uint32_t) is_tied << i;
                n_tied += is_tied;
            }
        }

        int32_t total;
        int32_t n_left = last.n - n_before - rsel_sum_before(n_tied, sh, id, total);
        n_before += total;
        for (int32_t i = 0; i < 32 && n_left > 0; ++i) {
            over   |= tied & (uint32_t) 1 << i;
            n_left -= tied >> i & 1;
        }
        if (iw < n_words) {
            dst[h.words + iw] = word | over | rsel_bits(iw*32, h.tail, h.n_cells);
        }
    }
}

// the best n of the cells i0 to i1 - 1 of a head, ties to the earlier one
static SIMT_FUNC void rsel_mark_best(
        rsel_head h, SIMT_GLOBAL(const uint32_t) keys, SIMT_GLOBAL(uint32_t) dst, int32_t i0, int32_t i1, int32_t n) {
    if (n == i1 - i0) {
        for (int32_t iw = i0/32; iw*32 < i1; ++iw) {
            simt_atomic_or(dst, h.words + iw, rsel_bits(iw*32, i0, i1));
        }
        return;
    }
    uint32_t last_key = 0;
    int32_t  last     = -1;
    for (int32_t ir = 0; ir < n; ++ir) {
        uint32_t best_key = 0;
        int32_t  best     = -1;
        for (int32_t i = i0; i < i1; ++i) {
            const uint32_t key    = keys[h.keys + i];
            const bool     is_new = last < 0 || key < last_key || (key == last_key && i > last);
            if (is_new && (best < 0 || key > best_key)) {
                best_key = key;
                best     = i;
            }
        }
        simt_atomic_or(dst, h.words + best/32, (uint32_t) 1 << best%32);
        last_key = best_key;
        last     = best;
    }
}

// a head each block
static SIMT_FUNC void rsel_mark_windows(
        rsel_args a, SIMT_GLOBAL(const uint32_t) keys, SIMT_GLOBAL(const int32_t) heads, SIMT_GLOBAL(uint32_t) dst, rsel_shared sh,
        simt_ids id) {
    const rsel_head h        = rsel_head_of(heads, id.block);
    const int32_t   n_places = rsel_n_places(a, h);

    // of the window that comes before all others
    const int32_t   n_first = a.first > 0 ? simt_min(h.n_take, simt_min(a.omega, h.n_keys)) : 0;
    const rsel_last last    = rsel_find_last(a, h, keys, keys, h.n_take - n_first, 64, sh, id);

    int32_t n_before = 0; // tied windows before; all of them but the very last one have omega cells
    for (int32_t ip0 = 0; ip0 < n_places; ip0 += RSEL_N_THREADS) {
        const int32_t ip = ip0 + id.tid;
        const int32_t i0 = ip*a.omega;
        const int32_t i1 = simt_min(h.n_keys, i0 + a.omega);

        int32_t n_take  = 0;
        bool    is_tied = false;
        if (ip < a.first) {
            n_take = ip < n_places ? n_first : 0;
        } else if (ip < n_places && h.n_take > n_first) {
            const uint64_t key = rsel_key_window(a, keys + h.keys + i0, i1 - i0);

            n_take  = last.all || key > last.key ? i1 - i0 : 0;
            is_tied = !last.all && key == last.key;
        }

        int32_t total;
        const int32_t n_tied = n_before + rsel_sum_before(is_tied, sh, id, total);
        n_before += total;
        if (is_tied) {
            n_take = simt_max(0, simt_min(i1 - i0, last.n - n_tied*a.omega));
        }
        if (n_take > 0) {
            rsel_mark_best(h, keys, dst, i0, i1, n_take);
        }
    }

    for (int32_t iw = h.tail/32 + id.tid; iw*32 < h.n_cells; iw += RSEL_N_THREADS) {
        simt_atomic_or(dst, h.words + iw, rsel_bits(iw*32, h.tail, h.n_cells));
    }
}
