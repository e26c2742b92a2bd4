#include "llama-kv-ragged-state.h"

#include "llama-kv-ragged-state-parts.h"

#include <memory>

using namespace llama_kv_ragged_state;

static constexpr uint32_t MAGIC   = 0x736b7677; // "wvks" in memory
static constexpr uint32_t VERSION = 3;

enum part : uint32_t {
    PART_CELLS     = 1,
    PART_WINDOWS   = 2,
    PART_RECURRENT = 4,
};

static uint32_t parts(const llama_kv_cache * swa, const llama_memory_recurrent * recr, llama_state_seq_flags flags) {
    const uint32_t beside = (swa ? PART_WINDOWS : 0) | (recr ? PART_RECURRENT : 0);

    // a cache without windows and recurrent states is all there is, and upstream writes it then
    return beside && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) ? beside : PART_CELLS | beside;
}

static void check_idle(const llama_kv_cache_ragged & kv) {
    if (kv.is_observing()) {
        llama_kv_ragged_refuse("tokens that are only observed are in the cache, states are saved and loaded without them");
    }
}

static void check_call(const llama_kv_cache & kv, const llama_memory_recurrent * recr, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id < -1 || seq_id > 0) {
        llama_kv_ragged_refuse_unsupported(format("the state of sequence %d is asked for, expected 0: a cache with a policy holds one",
                seq_id));
    }
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        llama_kv_ragged_refuse_unsupported("states that stay in device memory (LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) are not supported with a "
                "policy: its pools move; leave the flag out");
    }
    if (flags & ~uint32_t(LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)) {
        llama_kv_ragged_refuse_unsupported(format("the flags of a state are %u, expected 0 or LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY", flags));
    }
    if (kv.has_cell_ext()) {
        llama_kv_ragged_refuse_unsupported("states of models whose cells hold more than a position are not supported with a policy");
    }
    if (recr && recr->size != 1) {
        llama_kv_ragged_refuse_unsupported(format("the memory holds %u recurrent states, expected 1", recr->size));
    }
}

static llama_pos n_pos_of(const llama_kv_cache & swa)          { return swa.seq_pos_max(0) + 1; }
static llama_pos n_pos_of(const llama_memory_recurrent & recr) { return recr.seq_pos_max(0) + 1; }

// the cell metadata of positions that follow each other from 0 on
static llama_kv_cells make_metadata(const llama_kv_cache & kv, uint32_t n_pos) {
    llama_kv_cells res;
    res.resize(kv.get_size());
    for (uint32_t i = 0; i < n_pos; ++i) {
        res.pos_set(i, i);
        res.seq_add(i, 0);
    }
    return res;
}

// what a call of llama.h only writes to the log is the message of the last failure as well
template <typename F>
static void explained(F fn) {
    llama_kv_ragged_set_error("");
    try {
        fn();
    } catch (const std::exception & err) {
        if (llama_kv_ragged_get_error()[0] == '\0') {
            llama_kv_ragged_set_error(llama_kv_ragged_reason(err));
        }
        throw;
    }
}

static void check_aligned(const char * what, llama_pos n_pos, llama_pos expected) {
    if (n_pos != expected) {
        llama_kv_ragged_refuse(format("%s end before position %d and the cells of all positions before %d: remove what is behind before "
                    "the state is saved", what, n_pos, expected));
    }
}

bool llama_kv_ragged_state_write(
        const llama_kv_cache         * kv,
        const llama_kv_cache         * swa,
        const llama_memory_recurrent * recr,
              llama_io_write_i       & io,
              llama_seq_id             seq_id,
              llama_state_seq_flags    flags) {
    const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return false;
    }
    explained([&] {
        check_idle(*ragged);
        check_call(*kv, recr, seq_id, flags);
        ragged->check_closed();
        if (swa && swa->get_has_shift()) {
            llama_kv_ragged_refuse("the positions of windows moved, and their keys follow with the next batch: evaluate a token before the "
                    "state is saved, or shift with wkv_shift()");
        }

        const uint32_t own = parts(swa, recr, flags);

        const llama_pos n_pos = own & PART_CELLS ? llama_pos(ragged->get_seq().n_pos) : swa ? n_pos_of(*swa) : n_pos_of(*recr);
        if (swa) {
            check_aligned("windows", n_pos_of(*swa), n_pos);
        }
        if (recr) {
            check_aligned("recurrent states", n_pos_of(*recr), n_pos);
        }

        put<uint32_t>(io, MAGIC);
        put<uint32_t>(io, VERSION);
        put<uint32_t>(io, own);
        put<uint32_t>(io, n_pos);
        if (own & PART_CELLS) {
            write_cells(io, *ragged);
        }
        if (swa) {
            write_windows(io, *swa);
        }
        if (recr) {
            write_recurrent(io, *recr);
        }
        put<uint32_t>(io, MAGIC);
    });
    return true;
}

// how many positions a state holds, if it is one that this memory can take
static uint32_t read_header(llama_io_read_i & io, const llama_kv_cache_ragged & kv, uint32_t own) {
    const auto & seq = kv.get_seq();

    if (get<uint32_t>(io) != MAGIC) {
        refuse("it was not saved by a context with a policy");
    }
    get_same<uint32_t>(io, VERSION, "the version of its format");

    const uint32_t got = get<uint32_t>(io);
    if (got != own) {
        refuse(format("its parts are %u, expected %u (1: cells of all positions, 2: windows, 4: recurrent states)", got, own));
    }
    if (own & PART_CELLS) {
        return get_within<uint32_t>(io, 0, kv.get_size(), "the number of positions (n_ctx)");
    }

    // the cells of all positions stay, and are to be removed from there on
    const uint32_t n_pos = get<uint32_t>(io);
    if (n_pos < seq.boundary || n_pos > seq.n_pos) {
        refuse(format("it holds windows or recurrent states behind position %u alone, and of the %u positions in the cache those below %u "
                    "were compacted and cannot be removed one by one", n_pos, seq.n_pos, seq.boundary));
    }
    return n_pos;
}

static void read_state(
        llama_kv_cache_ragged  & kv,
        llama_kv_cache         * swa,
        llama_memory_recurrent * recr,
        llama_io_read_i        & io,
        uint32_t                 own) {
    const uint32_t n_pos = read_header(io, kv, own);

    std::unique_ptr<llama_kv_ragged_seq> cells;
    llama_kv_cells                       metadata;
    if (own & PART_CELLS) {
        cells    = std::make_unique<llama_kv_ragged_seq>(read_cells(io, kv, n_pos));
        metadata = make_metadata(kv, n_pos);
    }

    // windows and recurrent states are read to the host: what the memory holds of them has no second place
    llama_kv_ragged_claim claim(kv.get_seq().get_meter());

    read_window window;
    if (swa) {
        window = read_windows(io, *swa, n_pos);
    }
    read_recurrent states;
    if (recr) {
        states = read_states(io, *recr, n_pos);
    }
    for (const auto * data : { &window.data, &states.data }) {
        for (const auto & rows : *data) {
            claim.add(rows.data.size());
        }
    }
    if (get<uint32_t>(io) != MAGIC) {
        refuse("its end is missing");
    }

    // nothing fails from here on
    if (cells) {
        access::set(kv, std::move(metadata), n_pos % kv.get_size());
        kv.replace(std::move(*cells));
    }
    if (swa) {
        commit(*swa, std::move(window));
    }
    if (recr) {
        commit(*recr, std::move(states));
    }
}

bool llama_kv_ragged_state_read(
              llama_kv_cache         * kv,
              llama_kv_cache         * swa,
              llama_memory_recurrent * recr,
              llama_io_read_i        & io,
              llama_seq_id             seq_id,
              llama_state_seq_flags    flags) {
    auto * ragged = dynamic_cast<llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return false;
    }
    explained([&] {
        check_idle(*ragged);
        if (ragged->is_busy()) {
            llama_kv_ragged_refuse("a selection is running, no state can be loaded until it has returned");
        }
        check_call(*kv, recr, seq_id, flags);
        read_state(*ragged, swa, recr, io, parts(swa, recr, flags));
    });
    return true;
}
