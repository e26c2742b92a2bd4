// Keys: whole numbers that are the larger the better a score is. Of 32 bits those of a cell, of 64 those of a window. Scores are never
// compared or computed with as floats: with fast mathematics those under 2^-126 would be taken for zero.

// order of a float as a whole number; the two zeros are one
static SIMT_FUNC uint32_t rsel_key(uint32_t bits) {
    if ((bits & 0x7FFFFFFFu) == 0) {
        return 0x80000000u;
    }
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static SIMT_FUNC bool rsel_is_finite(uint32_t bits) {
    return (bits & 0x7F800000u) != 0x7F800000u;
}

// the score of a key; exact, what is below 2^-126 too
static SIMT_FUNC double rsel_score(uint32_t key) {
    const uint32_t bits     = key >> 31 ? key & 0x7FFFFFFFu : ~key;
    const uint32_t exponent = bits >> 23 & 0xFF;
    const uint32_t fraction = bits & 0x7FFFFFu;

    const double x = exponent == 0 ? (double) (int32_t) fraction*1.401298464324817e-45
                                   : simt_bits_to_f64((uint64_t) (exponent + 896) << 52 | (uint64_t) fraction << 29);
    return bits >> 31 ? -x : x;
}

// order of a double; no sum of scores is the negative zero, as it starts with the other
static SIMT_FUNC uint64_t rsel_key_f64(double x) {
    const uint64_t bits = simt_f64_to_bits(x);
    return bits >> 63 ? ~bits : bits | (uint64_t) 1 << 63;
}

// Key of the n cells from a place on: the mean of the top_p best, summed from the best downwards. Each turn finds the next smaller score,
// and how many cells have it.
static SIMT_FUNC uint64_t rsel_key_window(rsel_args a, SIMT_GLOBAL(const uint32_t) keys, int32_t n) {
    const int32_t n_best = simt_min(n, a.top_p);

    double   sum  = 0.0;
    uint32_t last = 0;
    for (int32_t left = n_best; left > 0;) {
        uint32_t best   = 0;
        int32_t  n_have = 0;
        for (int32_t i = 0; i < n; ++i) {
            const uint32_t key = keys[i];
            if (left < n_best && key >= last) {
                continue;
            }
            const bool is_best = n_have == 0 || key > best;

            n_have = is_best ? 1 : n_have + (key == best);
            best   = is_best ? key : best;
        }
        const int32_t n_add = simt_min(n_have, left);
        for (int32_t i = 0; i < n_add; ++i) {
            sum += rsel_score(best);
        }
        left -= n_add;
        last  = best;
    }
    return rsel_key_f64(sum/(double) n_best);
}

// row of the table of heads
struct rsel_head {
    int32_t  keys, n_keys, words, n_cells, n_take, tail;
    uint64_t known;
};

static SIMT_FUNC rsel_head rsel_head_of(SIMT_GLOBAL(const int32_t) heads, int32_t ih) {
    SIMT_GLOBAL(const int32_t) p = heads + ih*RSEL_N_HEAD;

    rsel_head res;
    res.keys    = p[RSEL_HEAD_KEYS];
    res.n_keys  = p[RSEL_HEAD_N_KEYS];
    res.words   = p[RSEL_HEAD_WORDS];
    res.n_cells = p[RSEL_HEAD_N_CELLS];
    res.n_take  = p[RSEL_HEAD_N_TAKE];
    res.tail    = p[RSEL_HEAD_TAIL];
    res.known   = (uint64_t) (uint32_t) p[RSEL_HEAD_KNOWN + 1] << 32 | (uint32_t) p[RSEL_HEAD_KNOWN];
    return res;
}

static SIMT_FUNC int32_t rsel_n_places(rsel_args a, rsel_head h) {
    return a.places == RSEL_WINDOWS ? (h.n_keys + a.omega - 1)/a.omega : h.n_keys;
}

struct rsel_place {
    uint64_t key;
    int32_t  n; // cells
};

static SIMT_FUNC rsel_place rsel_place_of(
        rsel_args a, rsel_head h, SIMT_GLOBAL(const uint32_t) keys, SIMT_GLOBAL(const uint32_t) marks, int32_t i) {
    rsel_place res;
    if (a.places == RSEL_WINDOWS) {
        const int32_t i0 = i*a.omega;

        res.n   = simt_min(a.omega, h.n_keys - i0);
        res.key = rsel_key_window(a, keys + h.keys + i0, res.n);
        return res;
    }
    res.n = 1;
    if (a.places == RSEL_REST) {
        const uint32_t word = marks[h.words + i/32];
        res.n = 1 - (word >> i%32 & 1);
    }
    res.key = (uint32_t) keys[h.keys + i];
    return res;
}
