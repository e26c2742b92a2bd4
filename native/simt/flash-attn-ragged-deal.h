// Sums over the lanes of a group, dealt out to these lanes.

template <typename T, int n>
struct fattn_values {
    T x[n];
};

// n sums over the lanes whose numbers differ in the bits m, 2*m and so on below m_end: in every step a lane keeps one half of its values
// and gives the other half away
template <typename T, int n, int m, int m_end>
struct fattn_deal {
    enum { HALF = n > 1 ? n/2 : 1 };

    typedef fattn_deal<T, HALF, 2*m, m_end> next;

    enum { N = next::N }; // sums that a lane ends up with

    static SIMT_FUNC fattn_values<T, N> sums(fattn_values<T, n> x, int32_t lane) {
        const bool high = (lane & m) != 0;

        fattn_values<T, HALF> res;
        SIMT_UNROLL
        for (int i = 0; i < HALF; ++i) {
            const T lo = x.x[i];
            const T hi = x.x[n - HALF + i];
            res.x[i] = n > 1 ? (high ? hi : lo) + simt_shuffle_xor(high ? lo : hi, m) : lo + simt_shuffle_xor(lo, m);
        }
        return next::sums(res, lane);
    }

    // the first one of a lane's sums, and the first lane that has a sum
    static SIMT_FUNC int32_t first(int32_t lane) { return (n > 1 && (lane & m) != 0 ? HALF : 0) + next::first(lane); }
    static SIMT_FUNC int32_t owner(int32_t i)    { return (n > 1 && i >= HALF ? m : 0) + next::owner(n > 1 ? i % HALF : i); }
};

template <typename T, int n, int m_end>
struct fattn_deal<T, n, m_end, m_end> {
    enum { N = n };

    static SIMT_FUNC fattn_values<T, n> sums(fattn_values<T, n> x, int32_t) { return x; }

    static SIMT_FUNC int32_t first(int32_t) { return 0; }
    static SIMT_FUNC int32_t owner(int32_t) { return 0; }
};
