// Rows of pools: FATTN_DIMS elements of one as a lane loads and unpacks them.

// elements d to d + FATTN_DIMS - 1 of a row, d is a multiple of FATTN_DIMS
struct fattn_dims {
    float x[FATTN_DIMS];
};

//
// A format has
//   raw load(head, row, d, type)   elements from d on as they lie in memory; row: bytes from the first row of the head to this one
//   fattn_dims unpack(raw, d, type) these in F32, without the scale of their block
//   float scale(raw, type)         that scale, 1 where there are no blocks
// so that loads can be far ahead of their use. type is FATTN_*, and of use to fattn_row_any alone
//

struct fattn_row_f32 {
    struct raw {
        simt_u32x4 a, b;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        raw r;
        r.a = simt_load_u32x4(head + (row + 4*d));
        r.b = simt_load_u32x4(head + (row + 4*d) + 16);
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

    static SIMT_FUNC float scale(raw, int) {
        return 1.0f;
    }
};

struct fattn_row_f16 {
    struct raw {
        simt_u32x4 a;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        raw r;
        r.a = simt_load_u32x4(head + (row + 2*d));
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

    static SIMT_FUNC float scale(raw, int) {
        return 1.0f;
    }
};

struct fattn_row_bf16 {
    typedef fattn_row_f16::raw raw;

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        return fattn_row_f16::load(head, row, d, 0);
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

    static SIMT_FUNC float scale(raw, int) {
        return 1.0f;
    }
};

// Four bytes in two loads: blocks of quantised rows lie at even addresses, not at multiples of four
static SIMT_FUNC uint32_t fattn_load_u32(SIMT_GLOBAL(const char) p) {
    return (uint32_t) simt_load_u16(p) | (uint32_t) simt_load_u16(p + 2) << 16;
}

// block_q8_0, 34 bytes: the scale in F16, 32 values of int8
struct fattn_row_q8_0 {
    struct raw {
        uint32_t a, b;
        uint32_t scale;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        const uint32_t block = row + 34*(d/32);

        SIMT_GLOBAL(const char) values = head + (block + d%32);

        raw r;
        r.scale = simt_load_u16(head + block);
        r.a     = fattn_load_u32(values + 2);
        r.b     = fattn_load_u32(values + 6);
        return r;
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int, int) {
        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = float((int8_t) (r.a >> 8*i));
            res.x[i + 4] = float((int8_t) (r.b >> 8*i));
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int) {
        return simt_unpack_f16(r.scale).x;
    }
};

// block_q4_0, 18 bytes: the scale in F16, 16 bytes with elements i (low half) and i + 16 (high half), 8 stands for zero
struct fattn_row_q4_0 {
    typedef fattn_row_q8_0::raw raw;

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        const uint32_t block = row + 18*(d/32);

        SIMT_GLOBAL(const char) values = head + (block + d%16);

        raw r;
        r.scale = simt_load_u16(head + block);
        r.a     = fattn_load_u32(values + 2);
        r.b     = fattn_load_u32(values + 6);
        return r;
    }

    static SIMT_FUNC fattn_dims unpack(raw r, int d, int) {
        const int shift = d%32 < 16 ? 0 : 4;

        fattn_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = float((int32_t) (r.a >> (8*i + shift) & 0xF) - 8);
            res.x[i + 4] = float((int32_t) (r.b >> (8*i + shift) & 0xF) - 8);
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int) {
        return simt_unpack_f16(r.scale).x;
    }
};

// A format that is known when the kernel runs: for pools of keys and values whose types differ, and for Metal, whose compiler knows
// the type as a function constant. raw: a and b hold 32 bytes of F32, a alone 16 bytes of F16 and BF16, or {values, values, scale, 0}
struct fattn_row_any {
    struct raw {
        simt_u32x4 a, b;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int type) {
        raw r;
        if (type == FATTN_F32) {
            const fattn_row_f32::raw x = fattn_row_f32::load(head, row, d, type);
            r.a = x.a;
            r.b = x.b;
        } else if (type == FATTN_F16 || type == FATTN_BF16) {
            r.a = fattn_row_f16::load(head, row, d, type).a;
            r.b = r.a;
        } else {
            const fattn_row_q8_0::raw x = type == FATTN_Q8_0 ? fattn_row_q8_0::load(head, row, d, type) : fattn_row_q4_0::load(head, row, d, type);
            r.a = simt_pack(x.a, x.b, x.scale, 0);
            r.b = r.a;
        }
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
        fattn_row_q8_0::raw x;
        x.a     = simt_get(r.a, 0);
        x.b     = simt_get(r.a, 1);
        x.scale = simt_get(r.a, 2);
        return type == FATTN_Q8_0 ? fattn_row_q8_0::unpack(x, d, type) : fattn_row_q4_0::unpack(x, d, type);
    }

    static SIMT_FUNC float scale(raw r, int type) {
        return type == FATTN_Q8_0 || type == FATTN_Q4_0 ? simt_unpack_f16(simt_get(r.a, 2)).x : 1.0f;
    }
};
