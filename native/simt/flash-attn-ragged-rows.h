// Rows of pools: FATTN_DIMS elements of one as a lane loads and unpacks them.

// what one lane has of a row. d: where its part begins, a multiple of FATTN_DIMS, if all parts were consecutive elements
struct fattn_dims {
    float x[FATTN_DIMS];
};

//
// A format has
//   place place_of(head, d, type)   where the part of the first row of a head begins
//   raw load(place, row, type)      the part as it lies in memory; row: bytes from the first row of the head to this one
//   fattn_dims unpack(raw, d, type) the same in F32, without the scale of its block
//   float scale(raw, d, type)       that scale, 1 where there are no blocks
//   int32_t element(d, i, type)     which element of the row the i-th one of the part is
//   simt_u32x4 halves(raw, d)       the part as F16, with its scale: of formats for flash-attn-ragged-mma.h, which has rows of F16 as
//                                   they are (IS_F16)
// so that loads can be far ahead of their use. type is FATTN_*, and of use to fattn_row_any alone
//

struct fattn_row_f32 {
    struct raw {
        simt_u32x4 a, b;
    };

    typedef SIMT_GLOBAL(const char) place;

    static SIMT_FUNC place place_of(SIMT_GLOBAL(const char) head, int d, int) {
        return head + 4*d;
    }

    static SIMT_FUNC raw load(place at, uint32_t row, int) {
        raw r;
        r.a = simt_load_u32x4(at + row);
        r.b = simt_load_u32x4(at + row + 16);
        return r;
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int, int) {
        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = simt_bits_to_f32(simt_get(r.a, i));
            res.x[i + 4] = simt_bits_to_f32(simt_get(r.b, i));
        }
        return res;
    }

    static SIMT_FUNC float scale(raw, int, int) {
        return 1.0f;
    }

    static SIMT_FUNC int32_t element(int32_t d, int i, int) {
        return d + i;
    }
};

struct fattn_row_f16 {
    enum { IS_F16 = true };

    struct raw {
        simt_u32x4 a;
    };

    typedef SIMT_GLOBAL(const char) place;

    static SIMT_FUNC place place_of(SIMT_GLOBAL(const char) head, int d, int) {
        return head + 2*d;
    }

    static SIMT_FUNC raw load(place at, uint32_t row, int) {
        raw r;
        r.a = simt_load_u32x4(at + row);
        return r;
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int, int) {
        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            const simt_f32x2 x = simt_unpack_f16(simt_get(r.a, i));
            res.x[2*i]     = x.x;
            res.x[2*i + 1] = x.y;
        }
        return res;
    }

    static SIMT_FUNC float scale(raw, int, int) {
        return 1.0f;
    }

    static SIMT_FUNC int32_t element(int32_t d, int i, int) {
        return d + i;
    }
};

struct fattn_row_bf16 {
    typedef fattn_row_f16::raw   raw;
    typedef fattn_row_f16::place place;

    static SIMT_FUNC place place_of(SIMT_GLOBAL(const char) head, int d, int) {
        return fattn_row_f16::place_of(head, d, FATTN_F16);
    }

    static SIMT_FUNC raw load(place at, uint32_t row, int) {
        return fattn_row_f16::load(at, row, FATTN_F16);
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int, int) {
        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            const uint32_t x = simt_get(r.a, i);
            res.x[2*i]     = simt_bits_to_f32(x << 16);
            res.x[2*i + 1] = simt_bits_to_f32(x & 0xFFFF0000u);
        }
        return res;
    }

    static SIMT_FUNC float scale(raw, int, int) {
        return 1.0f;
    }

    static SIMT_FUNC int32_t element(int32_t d, int i, int) {
        return d + i;
    }
};

//
// Quantised rows. A block has 2 bytes of scale and 32 or 16 of values, so that blocks lie at even addresses and every second one of
// a row at a multiple of four. A lane reads whole words all the same. Of two blocks, {scale, values} each:
//
//   the first one   {s0 s1 v0 v1} {v2 v3 v4 v5} ... {vx vy s0 s1}: the parts begin at v2. To the last one belong v0 and v1, which
//                   are in the word with the scale that every lane reads
//   the second one  {vx vy s0 s1} {v0 v1 v2 v3} ...
//
// Rows must lie at multiples of four bytes, and have an even number of blocks
//

static SIMT_FUNC bool fattn_block_is_first(int32_t d) {
    return d/32%2 == 0;
}

struct fattn_block_place {
    SIMT_GLOBAL(const char) scale;  // the word with it
    SIMT_GLOBAL(const char) values; // the first word of the part
};

// size: bytes of a block
static SIMT_FUNC fattn_block_place fattn_block_place_of(SIMT_GLOBAL(const char) head, int32_t d, int32_t size) {
    fattn_block_place res;
    res.scale  = head + d/32*size/4*4;
    res.values = res.scale + (4 + d%32*(size - 2)/32);
    return res;
}

static SIMT_FUNC float fattn_scale_of_word(uint32_t x, int32_t d) {
    return simt_unpack_f16(fattn_block_is_first(d) ? x : x >> 16).x;
}

// the scale twice, as F16
static SIMT_FUNC uint32_t fattn_scale_f16x2(uint32_t x, int32_t d) {
    return (fattn_block_is_first(d) ? x & 0xFFFF : x >> 16)*0x10001u;
}

// a part whose values are the bytes of lo and hi, zero standing for 0: two F16 in each word. 0x6400 is 1024, of whose F16 the last bit
// is 1
static SIMT_FUNC simt_u32x4 fattn_bytes_to_halves(uint32_t lo, uint32_t hi, uint32_t zero, uint32_t scale) {
    const uint32_t z = (0x6400u + zero)*0x10001u;
    return simt_pack(
        simt_scale_f16x2(simt_bytes_f16x2(lo, 0), z, scale), simt_scale_f16x2(simt_bytes_f16x2(lo, 1), z, scale),
        simt_scale_f16x2(simt_bytes_f16x2(hi, 0), z, scale), simt_scale_f16x2(simt_bytes_f16x2(hi, 1), z, scale));
}

// the last word of a part's values; scale: the word with the scale
static SIMT_FUNC uint32_t fattn_last_word(uint32_t x, uint32_t scale, int32_t d) {
    const uint32_t mask = fattn_block_is_first(d) && d%32 == 32 - FATTN_DIMS ? 0xFFFF0000u : 0;
    return (x & ~mask) | (scale & mask);
}

// block_q8_0, 34 bytes: the scale in F16, 32 values of int8
struct fattn_row_q8_0 {
    enum { IS_F16 = false };

    struct raw {
        uint32_t a, b; // 4 values each, from the low byte on
        uint32_t scale;
    };

    typedef fattn_block_place place;

    static SIMT_FUNC place place_of(SIMT_GLOBAL(const char) head, int d, int) {
        return fattn_block_place_of(head, d, 34);
    }

    template <typename T> // uint32_t, or 64 bits that were multiplied as such
    static SIMT_FUNC raw load(place at, T row, int) {
        raw r;
        r.scale = simt_load_u32(at.scale + row);
        r.a     = simt_load_u32(at.values + row);
        r.b     = simt_load_u32(at.values + row + 4);
        return r;
    }

    static SIMT_FUNC uint32_t low (raw r, int32_t)   { return r.a; }
    static SIMT_FUNC uint32_t high(raw r, int32_t d) { return fattn_last_word(r.b, r.scale, d); }

    static SIMT_FUNC fattn_dims unpack(raw r, int d, int) {
        const uint32_t a = low (r, d);
        const uint32_t b = high(r, d);

        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = simt_byte_f32(a ^ 0x80808080u, i) - (SIMT_BYTE_F32_ZERO + 128.0f);
            res.x[i + 4] = simt_byte_f32(b ^ 0x80808080u, i) - (SIMT_BYTE_F32_ZERO + 128.0f);
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int d, int) {
        return fattn_scale_of_word(r.scale, d);
    }

    static SIMT_FUNC simt_u32x4 halves(raw r, int32_t d) {
        return fattn_bytes_to_halves(low(r, d) ^ 0x80808080u, high(r, d) ^ 0x80808080u, 128, fattn_scale_f16x2(r.scale, d));
    }

    static SIMT_FUNC int32_t element(int32_t d, int i, int) {
        return d/32*32 + (d + i + (fattn_block_is_first(d) ? 2 : 0))%32;
    }
};

// block_q4_0, 18 bytes: the scale in F16, 16 bytes with elements i (low half) and i + 16 (high half), 8 stands for zero. A part is
// four bytes: four elements, and those that are 16 further on
struct fattn_row_q4_0 {
    enum { IS_F16 = false };

    struct raw {
        uint32_t a;
        uint32_t scale;
    };

    typedef fattn_block_place place;

    static SIMT_FUNC place place_of(SIMT_GLOBAL(const char) head, int d, int) {
        return fattn_block_place_of(head, d, 18);
    }

    template <typename T> // uint32_t, or 64 bits that were multiplied as such
    static SIMT_FUNC raw load(place at, T row, int) {
        raw r;
        r.scale = simt_load_u32(at.scale + row);
        r.a     = simt_load_u32(at.values + row);
        return r;
    }

    // 0 to 15 in every byte
    static SIMT_FUNC uint32_t low (raw r, int32_t d) { return fattn_last_word(r.a, r.scale, d)      & 0x0F0F0F0Fu; }
    static SIMT_FUNC uint32_t high(raw r, int32_t d) { return fattn_last_word(r.a, r.scale, d) >> 4 & 0x0F0F0F0Fu; }

    static SIMT_FUNC fattn_dims unpack(raw r, int d, int) {
        const uint32_t a = low (r, d);
        const uint32_t b = high(r, d);

        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = simt_byte_f32(a, i) - (SIMT_BYTE_F32_ZERO + 8.0f);
            res.x[i + 4] = simt_byte_f32(b, i) - (SIMT_BYTE_F32_ZERO + 8.0f);
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int d, int) {
        return fattn_scale_of_word(r.scale, d);
    }

    static SIMT_FUNC simt_u32x4 halves(raw r, int32_t d) {
        return fattn_bytes_to_halves(low(r, d), high(r, d), 8, fattn_scale_f16x2(r.scale, d));
    }

    static SIMT_FUNC int32_t element(int32_t d, int i, int) {
        return d/32*32 + (d%32/2 + i%4 + (fattn_block_is_first(d) ? 2 : 0))%16 + (i < 4 ? 0 : 16);
    }
};

// The same blocks in rows at even addresses, read two bytes at a time: heads of 96 elements and the like
struct fattn_row_align2 {
    struct raw {
        uint32_t a, b;
        uint32_t scale;
    };

    static SIMT_FUNC uint32_t load_u32(SIMT_GLOBAL(const char) p) {
        return (uint32_t) simt_load_u16(p) | (uint32_t) simt_load_u16(p + 2) << 16;
    }

    static SIMT_FUNC fattn_block_place place_of(SIMT_GLOBAL(const char) head, int d, int type) {
        fattn_block_place res;
        res.scale  = head + d/32*(type == FATTN_Q8_0_ALIGN2 ? 34 : 18);
        res.values = res.scale + (2 + (type == FATTN_Q8_0_ALIGN2 ? d%32 : d%16));
        return res;
    }

    static SIMT_FUNC raw load(fattn_block_place at, uint32_t row, int) {
        raw r;
        r.scale = simt_load_u16(at.scale + row);
        r.a     = load_u32(at.values + row);
        r.b     = load_u32(at.values + row + 4);
        return r;
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int d, int type) {
        const int shift = d%32 < 16 ? 0 : 4;

        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            if (type == FATTN_Q8_0_ALIGN2) {
                res.x[i]     = float((int8_t) (r.a >> 8*i));
                res.x[i + 4] = float((int8_t) (r.b >> 8*i));
            } else {
                res.x[i]     = float((int32_t) (r.a >> (8*i + shift) & 0xF) - 8);
                res.x[i + 4] = float((int32_t) (r.b >> (8*i + shift) & 0xF) - 8);
            }
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int, int) {
        return simt_unpack_f16(r.scale).x;
    }
};

// A format that is known when the kernel runs: for pools of keys and values whose types differ, and for Metal, whose compiler knows
// the type as a function constant. raw: a and b hold 32 bytes of F32, a alone 16 bytes of F16 and BF16, or {values, values, scale, 0}
struct fattn_row_any {
    struct raw {
        simt_u32x4 a, b;
    };

    static SIMT_FUNC fattn_row_q8_0::raw q8_0(raw r) {
        fattn_row_q8_0::raw res;
        res.a     = simt_get(r.a, 0);
        res.b     = simt_get(r.a, 1);
        res.scale = simt_get(r.a, 2);
        return res;
    }

    static SIMT_FUNC fattn_row_q4_0::raw q4_0(raw r) {
        fattn_row_q4_0::raw res;
        res.a     = simt_get(r.a, 0);
        res.scale = simt_get(r.a, 2);
        return res;
    }

    static SIMT_FUNC fattn_row_align2::raw align2(raw r) {
        fattn_row_align2::raw res;
        res.a     = simt_get(r.a, 0);
        res.b     = simt_get(r.a, 1);
        res.scale = simt_get(r.a, 2);
        return res;
    }

    // rows without blocks have values alone
    typedef fattn_block_place place;

    static SIMT_FUNC place place_of(SIMT_GLOBAL(const char) head, int d, int type) {
        if (type == FATTN_Q8_0 || type == FATTN_Q4_0) {
            return fattn_block_place_of(head, d, type == FATTN_Q8_0 ? 34 : 18);
        }
        if (type == FATTN_Q8_0_ALIGN2 || type == FATTN_Q4_0_ALIGN2) {
            return fattn_row_align2::place_of(head, d, type);
        }
        place res;
        res.values = type == FATTN_F32 ? fattn_row_f32::place_of(head, d, type) : fattn_row_f16::place_of(head, d, type);
        res.scale  = res.values;
        return res;
    }

    static SIMT_FUNC raw load(place at, uint32_t row, int type) {
        raw r;
        if (type == FATTN_F32) {
            const fattn_row_f32::raw x = fattn_row_f32::load(at.values, row, type);
            r.a = x.a;
            r.b = x.b;
            return r;
        }
        if (type == FATTN_F16 || type == FATTN_BF16) {
            r.a = fattn_row_f16::load(at.values, row, type).a;
        } else if (type == FATTN_Q8_0) {
            const fattn_row_q8_0::raw x = fattn_row_q8_0::load(at, row, type);
            r.a = simt_pack(x.a, x.b, x.scale, 0);
        } else if (type == FATTN_Q4_0) {
            const fattn_row_q4_0::raw x = fattn_row_q4_0::load(at, row, type);
            r.a = simt_pack(x.a, x.a, x.scale, 0);
        } else {
            const fattn_row_align2::raw x = fattn_row_align2::load(at, row, type);
            r.a = simt_pack(x.a, x.b, x.scale, 0);
        }
        r.b = r.a;
        return r;
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int d, int type) {
        if (type == FATTN_F32) {
            fattn_row_f32::raw x;
            x.a = r.a;
            x.b = r.b;
            return fattn_row_f32::unpack(x, d, type);
        }
        if (type == FATTN_F16 || type == FATTN_BF16) {
            fattn_row_f16::raw x;
            x.a = r.a;
            return type == FATTN_F16 ? fattn_row_f16::unpack(x, d, type) : fattn_row_bf16::unpack(x, d, type);
        }
        return type == FATTN_Q8_0 ? fattn_row_q8_0::unpack(q8_0(r), d, type) :
               type == FATTN_Q4_0 ? fattn_row_q4_0::unpack(q4_0(r), d, type) : fattn_row_align2::unpack(align2(r), d, type);
    }

    static SIMT_FUNC float scale(raw r, int d, int type) {
        if (type == FATTN_F32 || type == FATTN_F16 || type == FATTN_BF16) {
            return 1.0f;
        }
        return type == FATTN_Q8_0 || type == FATTN_Q4_0 ? fattn_scale_of_word(simt_get(r.a, 2), d) : simt_unpack_f16(simt_get(r.a, 2)).x;
    }

    static SIMT_FUNC int32_t element(int32_t d, int i, int type) {
        return type == FATTN_Q8_0 ? fattn_row_q8_0::element(d, i, type) : type == FATTN_Q4_0 ? fattn_row_q4_0::element(d, i, type) : d + i;
    }
};
