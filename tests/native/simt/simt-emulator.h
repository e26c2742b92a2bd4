// Runs SIMT kernels on the host and watches them: blocks of threads with shared memory and barriers, shuffles inside warps.
//
// Every thread of a block is a fiber; it runs until it meets a barrier, a shuffle or its end. A kernel fails with a message for
//   - an access to device memory outside of what was registered, or not aligned to its size
//   - an access outside of the block's memory, or a read of what nobody wrote
//   - two accesses to the same bytes of shared or device memory by two threads without a barrier between, one of them a write
//   - a barrier or a shuffle that not all threads of the block or warp come to
//   - a read of what is copied asynchronously before the thread that copies has waited for it; for other threads the end of that wait is
//     the write
// It counts what a launch costs, see launch_cost.
//
// Order: a warp runs until all of its lanes wait for the block or end. A seed shuffles warps and lanes at every barrier; blocks run one
// after another.

#pragma once

#include "simt-fiber.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

static constexpr int WARP = 32;

struct failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char * format, ...) {
    char buf[512];
    va_list args;
    va_start(args, format);
    vsnprintf(buf, sizeof(buf), format, args);
    va_end(args);
    throw failure(buf);
}

//
// memory
//

// last accesses to two bytes of shared memory, or four of device memory. Epochs are numbers of barriers that lie between; threads
// are numbered, 0 is none
struct trace {
    uint32_t writer       = 0;
    uint32_t reader       = 0; // MANY: several
    uint32_t updater      = 0; // of atomic accesses, which do not race with one another; MANY: several
    int32_t  write_epoch  = -1;
    int32_t  read_epoch   = -1;
    int32_t  update_epoch = -1;
    uint32_t fetched_by   = 0; // the last block that read it

    static constexpr uint32_t MANY = UINT32_MAX;

    // the thread whose access this one races with, or 0
    uint32_t access(uint32_t self, int32_t epoch, bool writes, bool atomic) {
        const uint32_t other_updater = update_epoch == epoch && updater != self && !atomic ? updater : 0;
        const uint32_t other_writer  = write_epoch  == epoch && writer  != self ? writer : other_updater;
        const uint32_t other_reader  = read_epoch   == epoch && reader  != self ? reader : 0;
        if (other_writer || (writes && other_reader)) {
            return other_writer ? other_writer : other_reader;
        }
        if (atomic) {
            updater      = update_epoch == epoch && updater != self ? MANY : self;
            update_epoch = epoch;
        } else if (writes) {
            writer      = self;
            write_epoch = epoch;
        } else {
            reader     = read_epoch == epoch && reader != self ? MANY : self;
            read_epoch = epoch;
        }
        return 0;
    }
};

using words = std::array<uint32_t, 6>;

enum class wait { none, block, warp, done };

struct thread {
    fiber_context           context;
    std::unique_ptr<char[]> stack;

    int32_t  id;
    wait     waits  = wait::none;
    int      line   = 0;
    uint32_t value  = 0; // bits of what is shuffled, before and after
    int32_t  mask   = 0; // what its exchange is told apart by
    int32_t  source = 0; // lane whose value it asks for

    words told{}; // to all lanes of its warp

    // asynchronous copies, oldest first: where they begin in shared memory, and how many of them every commit ended
    std::vector<size_t> copies;
    std::vector<size_t> commits;

    // of its kernel so far, see launch_cost
    int32_t n_rounds   = 0;
    int32_t n_loads    = 0;
    int32_t n_barriers = 0;
    bool    used       = true; // it has used a value since its last load
};

// What makes a launch slow on a device, where a load takes hundreds of cycles and those behind it wait only if they need its value.
// Of the slowest thread, and of all blocks together.
struct launch_cost {
    int32_t n_blocks   = 0;
    int32_t n_rounds   = 0; // times that a thread waits for device memory: loads without a use of a value between them are one round
    int32_t n_loads    = 0; // from device memory
    int32_t n_barriers = 0; // of the block

    std::map<std::string, int64_t> bytes_read;    // of a region, in whole words; by every block that reads them once more
    std::map<std::string, int64_t> bytes_written; // every time
};

// as many as there are words, made where one is touched: few of them are
class traces_of {
public:
    explicit traces_of(size_t n_words = 0) : parts((n_words + N - 1)/N) {}

    trace & operator[](size_t i) {
        auto & part = parts[i/N];
        if (!part) {
            part = std::make_unique<std::array<trace, N>>();
        }
        return (*part)[i%N];
    }

private:
    static constexpr size_t N = 256;

    std::vector<std::unique_ptr<std::array<trace, N>>> parts;
};

// memory of the device
struct region {
    char     * data;
    size_t     size;
    std::string name;

    traces_of traces;

    int64_t bytes_read    = 0; // by the launch that runs
    int64_t bytes_written = 0;
};

class machine {
public:
    // threads of blocks are numbered from 0; seed of the order in which they run
    explicit machine(uint32_t seed = 0) : rng(seed) {}

    ~machine() {
        for (auto & own : threads) {
            free_stacks().push_back(std::move(own->stack));
        }
    }

    machine(const machine &) = delete;
    machine & operator=(const machine &) = delete;

    void add(const void * data, size_t size, const std::string & name) { regions[(uintptr_t) data] = { (char *) data, size, name, traces_of(size/4 + 1) }; }
    void remove(const void * data) { regions.erase((uintptr_t) data); }
    void clear() { regions.clear(); }

    size_t shared_limit = SIZE_MAX; // bytes of a block

    // what was launched before has ended, for what is launched from here on
    void device_barrier() { device_epoch += !skip_device_barriers; }

    // faults for tests of the tests
    bool   skip_device_barriers = false;
    size_t n_barriers_skipped = 0;
    std::function<bool(int line)> skip_barrier;

    std::vector<launch_cost> costs; // of all launches

    // the thread uses what it loaded before
    void use() { current->used = true; }

    void launch(int n_blocks, int n_threads, const std::function<void()> & kernel) {
        if (n_threads % WARP != 0) {
            fail("%d threads are no whole warps of %d", n_threads, WARP);
        }
        if (n_threads > MAX_THREADS || n_blocks > MAX_BLOCKS) {
            fail("%d blocks of %d threads, the emulator numbers %d of %d", n_blocks, n_threads, MAX_BLOCKS, MAX_THREADS);
        }
        n_launches++;
        costs.push_back({});
        costs.back().n_blocks = n_blocks;
        for (block = 0; block < n_blocks; ++block) {
            run_block(n_threads, kernel);
        }
        for (auto & [_, r] : regions) {
            costs.back().bytes_read   [r.name] = r.bytes_read;
            costs.back().bytes_written[r.name] = r.bytes_written;
            r.bytes_read    = 0;
            r.bytes_written = 0;
        }
    }

    //
    // what a thread asks for
    //

    int32_t block_id()  const { return block; }
    int32_t thread_id() const { return current->id; }

    // memory of the block: the same for all threads that ask at the same place, in bytes from its start
    size_t shared_array(int line, size_t size) {
        auto [it, is_new] = arrays.try_emplace(line, shared.size());
        if (is_new) {
            shared.resize(shared.size() + (size + 15)/16*16);
            written.resize(shared.size(), 0);
            traces.resize(std::max(traces.size(), shared.size()/2));
            if (shared.size() > shared_limit) {
                fail("%zu bytes of shared memory, a block has %zu", shared.size(), shared_limit);
            }
        }
        return it->second;
    }

    void barrier(int line) {
        if (skip_barrier && skip_barrier(line)) {
            n_barriers_skipped++;
            return;
        }
        current->n_barriers++;
        use();
        yield(wait::block, line);
    }

    // all lanes of a warp come here
    void converge(int line) { shuffle_xor(0.0f, 0, line); }

    template <typename T>
    T shuffle_xor(T x, int mask, int line) {
        return exchange(x, current->id%WARP ^ mask, mask, line);
    }

    template <typename T>
    T shuffle(T x, int i, int n, int lane0, int line) {
        if (i < 0 || i >= n || lane0 != current->id%WARP/n*n) {
            fail("thread %d of block %d asks for lane %d of %d from lane %d on", current->id, block, i, n, lane0);
        }
        return exchange(x, lane0 + i, WARP, line);
    }

    // what all lanes of the warp tell, by lane; valid until they come here again
    const words * collect(const words & told, int line) {
        current->told = told;
        current->mask  = COLLECT;
        use();
        yield(wait::warp, line);
        return collected[current->id/WARP].data();
    }

    // size bytes to a place in shared memory; they are there when copy_wait() has seen to them
    void copy_async(size_t to, size_t begin, size_t end, region * r, const char * from, size_t size) {
        if (to % size != 0) {
            fail("thread %d of block %d copies %zu bytes to byte %zu of shared memory", current->id, block, size, to - begin);
        }
        global_access(r, from, size, false);
        memcpy(shared_access(to, size, begin, end, true), from, size);
        std::fill_n(written.begin() + to, size, ON_ITS_WAY);
        current->copies.push_back(to);
        copy_size = size;
    }

    void copy_commit() { current->commits.push_back(current->copies.size()); }

    // for all but the last n commits
    void copy_wait(size_t n) {
        use();
        auto & copies  = current->copies;
        auto & commits = current->commits;
        if (commits.size() <= n) {
            return;
        }
        const size_t n_done = commits[commits.size() - 1 - n];
        for (size_t i = 0; i < n_done; ++i) {
            std::fill_n(written.begin() + copies[i], copy_size, 1);
            shared_access(copies[i], copy_size, 0, shared.size(), true);
        }
        copies.erase(copies.begin(), copies.begin() + n_done);
        commits.erase(commits.begin(), commits.end() - n);
        for (auto & commit : commits) {
            commit -= n_done;
        }
    }

    bool any(bool x, int line) {
        int32_t res = x;
        for (int m = 1; m < WARP; m *= 2) {
            res |= shuffle_xor(res, m, line);
        }
        return res;
    }

    // atomic: reads and writes in one
    char * shared_access(size_t offset, size_t size, size_t begin, size_t end, bool writes, bool atomic = false) {
        if (offset < begin || offset > end || size > end - offset) {
            fail("thread %d of block %d %s byte %zd of an array of %zu in shared memory", current->id, block, writes ? "writes" : "reads",
                (ptrdiff_t) (offset - begin), end - begin);
        }
        static constexpr uint64_t ALL_WRITTEN = 0x0101010101010101;
        const bool is_plain = size <= sizeof(ALL_WRITTEN) && memcmp(&written[offset], &ALL_WRITTEN, size) == 0;
        for (size_t i = offset; i < offset + size && !is_plain; ++i) {
            if ((!writes || atomic) && !written[i]) {
                fail("thread %d of block %d reads byte %zu of shared memory, which nobody wrote", current->id, block, offset - begin);
            }
            if (written[i] == ON_ITS_WAY) {
                fail("thread %d of block %d %s byte %zu of shared memory, to which a copy is on its way", current->id, block,
                    writes ? "writes" : "reads", offset - begin);
            }
            written[i] = 1;
        }
        const uint32_t number = thread_number();
        for (size_t i = offset/2; i <= (offset + size - 1)/2; ++i) {
            const uint32_t other = traces[i].access(number, block_epoch, writes, atomic);
            if (other) {
                fail("race: thread %d of block %d %s byte %zu of shared memory, which %s touched since the last barrier", current->id,
                    block, writes ? "writes" : "reads", offset - begin, thread_name(other).c_str());
            }
        }
        return shared.data() + offset;
    }

    // the region that holds a pointer, for its bounds; one past the end belongs to it
    region * find(const void * p) {
        auto it = regions.upper_bound((uintptr_t) p);
        if (it == regions.begin()) {
            return nullptr;
        }
        --it;
        return (char *) p <= it->second.data + it->second.size ? &it->second : nullptr;
    }

    void global_access(region * r, const char * p, size_t size, bool writes, bool atomic = false) {
        if (!r) {
            fail("thread %d of block %d uses a pointer that is not one into device memory", current->id, block);
        }
        if (p < r->data || p + size > r->data + r->size) {
            fail("thread %d of block %d %s byte %zd of %s, which has %zu", current->id, block, writes ? "writes" : "reads",
                p - r->data, r->name.c_str(), r->size);
        }
        if ((uintptr_t) p % size != 0) {
            fail("thread %d of block %d: %zu bytes of %s at byte %zd are not aligned", current->id, block, size, r->name.c_str(), p - r->data);
        }
        const uint32_t number = thread_number();
        for (size_t i = (p - r->data)/4; i <= (p - r->data + size - 1)/4; ++i) {
            const uint32_t other = r->traces[i].access(number, device_epoch, writes, atomic);
            if (other) {
                fail("race: thread %d of block %d %s byte %zu of %s, which %s touched", current->id, block, writes ? "writes" : "reads",
                    4*i, r->name.c_str(), thread_name(other).c_str());
            }
        }
        if (writes) {
            r->bytes_written += size;
        } else {
            count_load(*r, (p - r->data)/4, (p - r->data + size - 1)/4);
        }
    }

private:
    static constexpr size_t  STACK      = 256*1024;
    static constexpr uint8_t ON_ITS_WAY = 2;
    static constexpr int     COLLECT    = -1; // the mask of collect()

    // a thread has a number: some bits of its launch, its block, its place
    static constexpr int MAX_THREADS = 1 << 10;
    static constexpr int MAX_BLOCKS  = 1 << 16;

    uint32_t thread_number() const { return (uint32_t(n_launches) << 26 | uint32_t(block) << 10 | uint32_t(current->id)) + 1; }

    std::map<uintptr_t, region> regions;
    std::mt19937                rng;

    int32_t                              block = 0;
    std::vector<std::unique_ptr<thread>> threads;
    thread                             * current = nullptr;
    fiber_context                        scheduler;
    const std::function<void()>        * kernel = nullptr;
    std::string                          error;

    int32_t block_epoch  = 0; // of all blocks: what another block did to its shared memory lies behind a barrier
    int32_t device_epoch = 0;
    int32_t n_launches   = 0;

    std::map<int, size_t> arrays;
    std::vector<char>     shared;
    std::vector<uint8_t>  written;
    std::vector<trace>    traces;
    size_t                copy_size = 0;

    std::vector<std::array<words, WARP>> collected; // by warp

    void count_load(region & r, size_t first, size_t last) {
        current->n_loads++;
        current->n_rounds += current->used;
        current->used = false;

        const uint32_t self = (uint32_t(n_launches) << 16 | block) + 1;
        for (size_t i = first; i <= last; ++i) {
            auto & own = r.traces[i];
            if (own.fetched_by != self) {
                own.fetched_by = self;
                r.bytes_read += 4;
            }
        }
    }

    void count_threads(int n_threads) {
        launch_cost & cost = costs.back();
        for (int i = 0; i < n_threads; ++i) {
            cost.n_rounds   = std::max(cost.n_rounds,   threads[i]->n_rounds);
            cost.n_loads    = std::max(cost.n_loads,    threads[i]->n_loads);
            cost.n_barriers = std::max(cost.n_barriers, threads[i]->n_barriers);
        }
    }

    // of machines that are gone, for the next ones
    static std::vector<std::unique_ptr<char[]>> & free_stacks() {
        static thread_local std::vector<std::unique_ptr<char[]>> res;
        return res;
    }

    static std::unique_ptr<char[]> take_stack() {
        auto & stacks = free_stacks();
        if (stacks.empty()) {
            return std::unique_ptr<char[]>(new char[STACK]);
        }
        auto res = std::move(stacks.back());
        stacks.pop_back();
        return res;
    }

    void yield(wait waits, int line) {
        current->waits = waits;
        current->line  = line;
        fiber_context::switch_to(current->context, scheduler);
    }

    // all lanes of a warp come here with the same mask
    template <typename T>
    T exchange(T x, int lane, int mask, int line) {
        static_assert(sizeof(T) == sizeof(current->value));
        memcpy(&current->value, &x, sizeof(x));
        current->mask   = mask;
        current->source = lane;
        use();
        yield(wait::warp, line);
        memcpy(&x, &current->value, sizeof(x));
        return x;
    }

    static void enter();

    void run_block(int n_threads, const std::function<void()> & fn);

    bool release_warp(int w) {
        const auto first = threads.begin() + w*WARP;
        const auto last  = first + WARP;

        const auto is_waiting = [&](const auto & t) { return t->waits == wait::warp && t->line == (*first)->line && t->mask == (*first)->mask; };
        if (!std::all_of(first, last, is_waiting)) {
            return false;
        }
        if (first[0]->mask == COLLECT) {
            collected.resize(std::max<size_t>(collected.size(), w + 1));
            for (int i = 0; i < WARP; ++i) {
                collected[w][i] = first[i]->told;
                first[i]->waits = wait::none;
            }
            return true;
        }
        uint32_t value[WARP];
        for (int i = 0; i < WARP; ++i) {
            value[i] = first[first[i]->source]->value;
        }
        for (int i = 0; i < WARP; ++i) {
            first[i]->value = value[i];
            first[i]->waits = wait::none;
        }
        return true;
    }

    // every lane until it waits; whether one ran
    bool run_lanes(int w, const std::vector<int> & lanes, int & n_done) {
        bool res = false;
        for (const int lane : lanes) {
            thread & own = *threads[w*WARP + lane];
            if (own.waits == wait::none) {
                current = &own;
                fiber_context::switch_to(scheduler, own.context);
                res = true;
                n_done += own.waits == wait::done;
                if (!error.empty()) {
                    break;
                }
            }
        }
        return res;
    }

    bool release_block(int n_threads) {
        const auto first = threads.begin();
        const auto last  = threads.begin() + n_threads;
        if (!std::all_of(first, last, [&](const auto & t) { return t->waits == wait::block && t->line == threads[0]->line; })) {
            return false;
        }
        block_epoch++;
        std::for_each(first, last, [](const auto & t) { t->waits = wait::none; });
        return true;
    }

    static std::string thread_name(uint32_t number) {
        return number == trace::MANY ? "several threads" :
            "thread " + std::to_string((number - 1)%MAX_THREADS) + " of block " + std::to_string((number - 1)/MAX_THREADS%MAX_BLOCKS);
    }

    friend machine *& current_machine();
};

inline machine *& current_machine() {
    static thread_local machine * res = nullptr;
    return res;
}

inline void machine::enter() {
    machine & m = *current_machine();
    try {
        (*m.kernel)();
    } catch (const std::exception & e) {
        m.error = e.what();
    }
    m.current->waits = wait::done;
    for (;;) {
        fiber_context::switch_to(m.current->context, m.scheduler);
    }
}

inline void machine::run_block(int n_threads, const std::function<void()> & fn) {
    machine * outer = current_machine();
    current_machine() = this;

    while ((int) threads.size() < n_threads) {
        threads.push_back(std::make_unique<thread>());
        threads.back()->id = threads.size() - 1;
        threads.back()->stack = take_stack();
    }
    kernel = &fn;
    block_epoch++;
    arrays.clear();
    shared.clear();
    written.clear();
    error.clear();

    for (int i = 0; i < n_threads; ++i) {
        threads[i]->waits      = wait::none;
        threads[i]->n_rounds   = 0;
        threads[i]->n_loads    = 0;
        threads[i]->n_barriers = 0;
        threads[i]->used       = true;
        threads[i]->copies.clear();
        threads[i]->commits.clear();
        threads[i]->context.start(threads[i]->stack.get(), STACK, enter);
    }

    std::vector<int> warps(n_threads/WARP);
    std::vector<int> lanes(WARP);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);

    const auto shuffle = [&] {
        std::shuffle(warps.begin(), warps.end(), rng);
        std::shuffle(lanes.begin(), lanes.end(), rng);
    };

    shuffle();
    for (int n_done = 0; n_done < n_threads && error.empty();) {
        bool any = false;
        for (size_t i = 0; i < warps.size() && error.empty(); ++i) {
            do {
                any = run_lanes(warps[i], lanes, n_done) || any;
            } while (error.empty() && release_warp(warps[i]));
        }
        if (error.empty() && release_block(n_threads)) {
            any = true;
            shuffle();
        }
        if (!any && error.empty() && n_done < n_threads) {
            const auto stuck = std::find_if(threads.begin(), threads.begin() + n_threads, [](const auto & t) { return t->waits != wait::done; });
            char buf[256];
            snprintf(buf, sizeof(buf), "divergence: thread %d of block %d waits in line %d for threads that never come there",
                (*stuck)->id, block, (*stuck)->line);
            error = buf;
        }
    }
    current_machine() = outer;
    for (int i = 0; i < n_threads && error.empty(); ++i) {
        if (!threads[i]->copies.empty()) {
            error = "thread " + std::to_string(i) + " of block " + std::to_string(block) + " ends with copies on their way";
        }
    }
    if (!error.empty()) {
        throw failure(error);
    }
    count_threads(n_threads);
}

} // namespace simt
