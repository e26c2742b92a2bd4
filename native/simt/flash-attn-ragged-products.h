// Products of a lane's parts of queries and keys.
//
// A query is read once and keys are many, so that queries take the form that suits the keys. A format of keys has
//   query                     a part of a query
//   key                       a part of a key
//   query to_query(x, inv)    x: the part in F32; inv: 1/unit, see fattn_query_unit(), 0 where there is none
//   key to_key(raw, d, type)
//   sum dot(query, key)       a number, without the unit of the query and the scale of the key's block
// UNITS: whether queries have units

template <typename row_t>
struct fattn_products_floats {
    enum { UNITS = false };

    typedef fattn_dims query;
    typedef fattn_dims key;
    typedef float      sum;

    static SIMT_FUNC query to_query(fattn_dims x, float) {
        return x;
    }

    static SIMT_FUNC key to_key(typename row_t::raw r, int32_t d, int32_t type) {
        return row_t::unpack(r, d, type);
    }

    static SIMT_FUNC sum dot(query x, key y) {
        float res = 0.0f;
        SIMT_UNROLL
        for (int i = 0; i < FATTN_DIMS; ++i) {
            res += x.x[i]*y.x[i];
        }
        return res;
    }
};

//
// Quantised keys: products of int16 and int8, two in one instruction, so that keys stay as they are. Queries become whole numbers of
// units up to FATTN_QUERY_MAX, which is as exact as F16; 8 bits would move weights by a percent. Sums over a
// block, 32 products, stay below 2^28
//

#define FATTN_QUERY_MAX 32767.0f

// Of a query whose largest element has these bits, without the sign: 0 for a query of zeros. Infinity and NaN, which no whole number
// stands for, make it NaN, and so all scores of the row. By bits, as compilers may assume that there is no such float
static SIMT_FUNC float fattn_query_unit(uint32_t bits) {
    const float max = simt_bits_to_f32(bits);
    return simt_bits_to_f32(bits >= 0x7F800000u ? 0x7FC00000u : simt_f32_to_bits(max > 1e-30f ? max/FATTN_QUERY_MAX : 0.0f));
}

struct fattn_ints {
    uint32_t x[FATTN_DIMS/2]; // two int16 each
    int32_t  sum;
};

struct fattn_bytes {
    uint32_t x[FATTN_DIMS/4];
};

// zeros without a unit, whatever x is
static SIMT_FUNC fattn_ints fattn_to_ints(fattn_dims x, float inv) {
    fattn_ints res;
    res.sum = 0;
    SIMT_UNROLL
    for (int i = 0; i < FATTN_DIMS/2; ++i) {
        const float lo = inv > 0.0f ? x.x[2*i]*inv     : 0.0f;
        const float hi = inv > 0.0f ? x.x[2*i + 1]*inv : 0.0f;

        const int32_t n_lo = (int32_t) (lo < 0.0f ? lo - 0.5f : lo + 0.5f);
        const int32_t n_hi = (int32_t) (hi < 0.0f ? hi - 0.5f : hi + 0.5f);

        res.x[i] = ((uint32_t) n_lo & 0xFFFF) | (uint32_t) n_hi << 16;
        res.sum += n_lo + n_hi;
    }
    return res;
}

// zero: what stands for 0 in the bytes of such a row
template <typename row_t, int zero>
struct fattn_products_ints {
    enum { UNITS = true };

    typedef fattn_ints  query;
    typedef fattn_bytes key;
    typedef int32_t     sum;

    static SIMT_FUNC query to_query(fattn_dims x, float inv) {
        return fattn_to_ints(x, inv);
    }

    static SIMT_FUNC key to_key(typename row_t::raw r, int32_t d, int32_t) {
        key res;
        res.x[0] = row_t::low (r, d);
        res.x[1] = row_t::high(r, d);
        return res;
    }

    static SIMT_FUNC sum dot(query x, key y) {
        sum res = -zero*x.sum;
        SIMT_UNROLL
        for (int i = 0; i < FATTN_DIMS/4; ++i) {
            res = simt_dp2a_lo(x.x[2*i],     y.x[i], res);
            res = simt_dp2a_hi(x.x[2*i + 1], y.x[i], res);
        }
        return res;
    }
};

//
// the products for a format of keys
//

template <typename row_t>
struct fattn_products_of {
    typedef fattn_products_floats<row_t> type;
};

template <>
struct fattn_products_of<fattn_row_q8_0> {
    typedef fattn_products_ints<fattn_row_q8_0, 0> type;
};

template <>
struct fattn_products_of<fattn_row_q4_0> {
    typedef fattn_products_ints<fattn_row_q4_0, 8> type;
};
