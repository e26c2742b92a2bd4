// What the threads of a block find together.

struct rsel_shared {
    SIMT_SHARED(int32_t) counts; // [RSEL_N_DIGITS]
    SIMT_SHARED(int32_t) sums;   // [RSEL_N_WARPS]
    SIMT_SHARED(int32_t) found;  // [2]
};

// sum of x over the threads before this one; total: over all
static SIMT_FUNC int32_t rsel_sum_before(int32_t x, rsel_shared sh, simt_ids id, SIMT_THREAD(int32_t) total) {
    int32_t sum = x;
    for (int32_t d = 1; d < 32; d *= 2) {
        const int32_t other = simt_shuffle(sum, simt_max(0, id.lane - d), 32, 0);
        sum += id.lane >= d ? other : 0;
    }
    simt_barrier(); // what was there before has been read
    if (id.lane == 31) {
        sh.sums[id.warp] = sum;
    }
    simt_barrier();

    int32_t before = 0;
    total = 0;
    for (int32_t i = 0; i < RSEL_N_WARPS; ++i) {
        const int32_t n = sh.sums[i];
        before += i < id.warp ? n : 0;
        total  += n;
    }
    return before + sum - x;
}

// where the places end that are taken
struct rsel_last {
    uint64_t key; // all with a larger one are taken
    int32_t  n;   // and so many cells of those that have it
    bool     all; // or all there are
};

// The end of the best n cells: digit by digit of the key, from the top, the one of the n-th cell. n_bits: of a key. All threads of
// the block.
static SIMT_FUNC rsel_last rsel_find_last(
        rsel_args a, rsel_head h, SIMT_GLOBAL(const uint32_t) keys, SIMT_GLOBAL(const uint32_t) marks, int32_t n, int32_t n_bits,
        rsel_shared sh, simt_ids id) {
    rsel_last res;
    res.key = ~(uint64_t) 0; // that of no score
    res.n   = n;
    res.all = false;
    if (n <= 0) {
        res.n = 0;
        return res;
    }

    const int32_t n_places = rsel_n_places(a, h);

    uint64_t known = 0;
    for (int32_t shift = n_bits - RSEL_WIDTH_MAX; shift >= 0; shift -= RSEL_WIDTH_MAX) {
        sh.counts[id.tid] = 0;
        simt_barrier();
        for (int32_t i = a.first + id.tid; i < n_places; i += RSEL_N_THREADS) {
            const rsel_place p = rsel_place_of(a, h, keys, marks, i);
            if (p.n > 0 && p.key >> shift >> RSEL_WIDTH_MAX == known) {
                simt_atomic_add(sh.counts, (int32_t) (p.key >> shift & (RSEL_N_DIGITS - 1)), p.n);
            }
        }
        simt_barrier();

        // from the largest digit on
        const int32_t digit = RSEL_N_DIGITS - 1 - id.tid;
        const int32_t own   = sh.counts[digit];

        int32_t total;
        const int32_t before = rsel_sum_before(own, sh, id, total);
        if (shift == n_bits - RSEL_WIDTH_MAX && total <= n) {
            res.all = true;
            return res;
        }
        if (before < res.n && res.n <= before + own) {
            sh.found[0] = digit;
            sh.found[1] = res.n - before;
        }
        simt_barrier();
        known = known << RSEL_WIDTH_MAX | (uint32_t) sh.found[0];
        res.n = sh.found[1];
    }
    res.key = known;
    return res;
}
