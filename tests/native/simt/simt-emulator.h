// Runs SIMT kernels on the host and watches them: blocks of threads with shared memory and barriers, shuffles inside warps.
//
// Every thread of a block is a fiber; it runs until it meets a barrier, a shuffle or its end. A kernel fails with a message for
//   - an access to device memory outside of what was registered, or not aligned to its size
//   - an access outside of the block's memory, or a read of what nobody wrote
//   - two accesses to the same bytes of shared or device memory by two threads without a barrier between, one of them a write
//   - a barrier or a shuffle that not all threads of the block or warp come to
// Order: fibers of a block take turns in an order that a seed shuffles at every barrier, blocks run one after another.
//
// One header, long as it is: a test includes it and is done.

#pragma once

#include <algorithm>
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
#include <type_traits>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

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
// fibers
//

#if defined(__x86_64__) || defined(__aarch64__)

extern "C" void simt_switch(void ** from, void * to);

#if defined(__APPLE__)
#define SIMT_SYMBOL(name) "_" name
#else
#define SIMT_SYMBOL(name) name
#endif

// keeps what a call must keep, changes stacks
#if defined(__x86_64__)
asm(".text\n" SIMT_SYMBOL("simt_switch") ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
static constexpr int N_SAVED = 6; // and the return address
#else
asm(".text\n.p2align 2\n" SIMT_SYMBOL("simt_switch") ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#endif

struct fiber_context {
    void * sp = nullptr;

    void start(char * stack, size_t size, void (*entry)()) {
        auto * top = (void **) ((uintptr_t) (stack + size) & ~(uintptr_t) 15);
#if defined(__x86_64__)
        *--top = nullptr; // where entry would return to, and the alignment that a call leaves
        *--top = (void *) entry;
        top -= N_SAVED;
        std::fill(top, top + N_SAVED, nullptr);
#else
        top -= 20;
        std::fill(top, top + 20, nullptr);
        top[11] = (void *) entry; // x30
#endif
        sp = top;
    }

    static void switch_to(fiber_context & from, fiber_context & to) { simt_switch(&from.sp, to.sp); }
};

#else

struct fiber_context {
    ucontext_t context;

    void start(char * stack, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp   = stack;
        context.uc_stack.ss_size = size;
        context.uc_link          = nullptr;
        makecontext(&context, entry, 0);
    }

    static void switch_to(fiber_context & from, fiber_context & to) { swapcontext(&from.context, &to.context); }
};

#endif

//
// memory
//

// last accesses to two bytes of shared memory, or four of device memory. Epochs are numbers of barriers that lie between; threads
// are numbered, 0 is none
struct trace {
    int64_t writer      = 0;
    int64_t reader      = 0; // MANY: several
    int32_t write_epoch = -1;
    int32_t read_epoch  = -1;

    static constexpr int64_t MANY = -1;

    // the thread whose access this one races with, or 0
    int64_t access(int64_t self, int32_t epoch, bool writes) {
        const int64_t other_writer = write_epoch == epoch && writer != self ? writer : 0;
        const int64_t other_reader = read_epoch  == epoch && reader != self ? reader : 0;
        if (other_writer || (writes && other_reader)) {
            return other_writer ? other_writer : other_reader;
        }
        if (writes) {
            writer      = self;
            write_epoch = epoch;
        } else {
            reader     = read_epoch == epoch && reader != self ? MANY : self;
            read_epoch = epoch;
        }
        return 0;
    }
};

enum class wait { none, block, warp, done };

struct thread {
    fiber_context           context;
    std::unique_ptr<char[]> stack;

    int32_t id;
    wait    waits = wait::none;
    int     line  = 0;
    float   value = 0.0f; // of a shuffle, before and after
    int32_t mask  = 0; // what its exchange is told apart by
    int32_t source = 0; // lane whose value it asks for
};

// memory of the device
struct region {
    char     * data;
    size_t     size;
    std::string name;

    std::vector<trace> traces;
};

class machine {
public:
    // threads of blocks are numbered from 0; seed of the order in which they run
    explicit machine(uint32_t seed = 0) : rng(seed) {}

    void add(const void * data, size_t size, const std::string & name) { regions[(uintptr_t) data] = { (char *) data, size, name, std::vector<trace>(size/4 + 1) }; }
    void remove(const void * data) { regions.erase((uintptr_t) data); }
    void clear() { regions.clear(); }

    size_t shared_limit = SIZE_MAX; // bytes of a block

    // what was launched before has ended, for what is launched from here on
    void device_barrier() { device_epoch += !skip_device_barriers; }

    // faults for tests of the tests
    bool   skip_device_barriers = false;
    size_t n_barriers_skipped = 0;
    std::function<bool(int line)> skip_barrier;

    void launch(int n_blocks, int n_threads, const std::function<void()> & kernel) {
        if (n_threads % WARP != 0) {
            fail("%d threads are no whole warps of %d", n_threads, WARP);
        }
        n_launches++;
        for (block = 0; block < n_blocks; ++block) {
            run_block(n_threads, kernel);
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
            traces.resize(shared.size()/2);
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
        yield(wait::block, line);
    }

    // all lanes of a warp come here
    void converge(int line) { shuffle_xor(0.0f, 0, line); }

    float shuffle_xor(float x, int mask, int line) {
        return exchange(x, current->id%WARP ^ mask, mask, line);
    }

    float shuffle(float x, int i, int n, int lane0, int line) {
        if (i < 0 || i >= n || lane0 != current->id%WARP/n*n) {
            fail("thread %d of block %d asks for lane %d of %d from lane %d on", current->id, block, i, n, lane0);
        }
        return exchange(x, lane0 + i, WARP, line);
    }

    bool any(bool x, int line) {
        for (int m = 1; m < WARP; m *= 2) {
            x = shuffle_xor(x, m, line) != 0.0f || x;
        }
        return x;
    }

    char * shared_access(size_t offset, size_t size, size_t begin, size_t end, bool writes) {
        if (offset < begin || offset > end || size > end - offset) {
            fail("thread %d of block %d %s byte %zd of an array of %zu in shared memory", current->id, block, writes ? "writes" : "reads",
                (ptrdiff_t) (offset - begin), end - begin);
        }
        for (size_t i = offset; i < offset + size; ++i) {
            if (!writes && !written[i]) {
                fail("thread %d of block %d reads byte %zu of shared memory, which nobody wrote", current->id, block, offset - begin);
            }
            written[i] = 1;
        }
        for (size_t i = offset/2; i <= (offset + size - 1)/2; ++i) {
            const int64_t other = traces[i].access(((int64_t) block << 16 | current->id) + 1, block_epoch, writes);
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

    void global_access(region * r, const char * p, size_t size, bool writes) {
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
        const int64_t self = (((int64_t) n_launches << 40) | ((int64_t) block << 16) | current->id) + 1;
        for (size_t i = (p - r->data)/4; i <= (p - r->data + size - 1)/4; ++i) {
            const int64_t other = r->traces[i].access(self, device_epoch, writes);
            if (other) {
                fail("race: thread %d of block %d %s byte %zu of %s, which %s touched", current->id, block, writes ? "writes" : "reads",
                    4*i, r->name.c_str(), thread_name(other).c_str());
            }
        }
    }

private:
    static constexpr size_t STACK = 64*1024;

    std::map<uintptr_t, region> regions;
    std::mt19937                rng;

    int32_t                              block = 0;
    std::vector<std::unique_ptr<thread>> threads;
    thread                             * current = nullptr;
    fiber_context                        scheduler;
    const std::function<void()>        * kernel = nullptr;
    std::string                          error;

    int32_t block_epoch  = 0;
    int32_t device_epoch = 0;
    int32_t n_launches   = 0;

    std::map<int, size_t> arrays;
    std::vector<char>     shared;
    std::vector<uint8_t>  written;
    std::vector<trace>    traces;

    void yield(wait waits, int line) {
        current->waits = waits;
        current->line  = line;
        fiber_context::switch_to(current->context, scheduler);
    }

    // all lanes of a warp come here with the same mask
    float exchange(float x, int lane, int mask, int line) {
        current->value  = x;
        current->mask   = mask;
        current->source = lane;
        yield(wait::warp, line);
        return current->value;
    }

    static void enter();

    void run_block(int n_threads, const std::function<void()> & fn);

    bool release_warps(int n_threads) {
        bool any = false;
        for (int w = 0; w < n_threads/WARP; ++w) {
            const auto first = threads.begin() + w*WARP;
            const auto last  = first + WARP;

            const auto is_waiting = [&](const auto & t) { return t->waits == wait::warp && t->line == (*first)->line && t->mask == (*first)->mask; };
            if (!std::all_of(first, last, is_waiting)) {
                continue;
            }
            float value[WARP];
            for (int i = 0; i < WARP; ++i) {
                value[i] = first[first[i]->source]->value;
            }
            for (int i = 0; i < WARP; ++i) {
                first[i]->value = value[i];
                first[i]->waits = wait::none;
            }
            any = true;
        }
        return any;
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

    static std::string thread_name(int64_t number) {
        return number == trace::MANY ? "several threads" :
            "thread " + std::to_string((number - 1) & 0xFFFF) + " of block " + std::to_string((number - 1) >> 16 & 0xFFFFFF);
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
        threads.back()->stack.reset(new char[STACK]);
    }
    kernel      = &fn;
    block_epoch = 0;
    arrays.clear();
    shared.clear();
    written.clear();
    traces.clear();
    error.clear();

    std::vector<int> order(n_threads);
    std::iota(order.begin(), order.end(), 0);
    for (const int i : order) {
        threads[i]->waits = wait::none;
        threads[i]->context.start(threads[i]->stack.get(), STACK, enter);
    }

    std::shuffle(order.begin(), order.end(), rng);
    for (int n_done = 0; n_done < n_threads && error.empty();) {
        bool any = false;
        for (const int i : order) {
            if (threads[i]->waits != wait::none) {
                continue;
            }
            current = threads[i].get();
            fiber_context::switch_to(scheduler, current->context);
            any = true;
            n_done += current->waits == wait::done;
            if (!error.empty()) {
                break;
            }
        }
        if (error.empty() && release_warps(n_threads)) {
            any = true;
        } else if (error.empty() && release_block(n_threads)) {
            any = true;
            std::shuffle(order.begin(), order.end(), rng);
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
    if (!error.empty()) {
        throw failure(error);
    }
}

//
// pointers
//

// a value in device memory
template <typename T>
class global_ref {
public:
    global_ref(region * r, T * p) : r(r), p(p) {}

    operator std::remove_const_t<T>() const {
        current_machine()->global_access(r, (const char *) p, sizeof(T), false);
        return *p;
    }

    const global_ref & operator=(std::remove_const_t<T> x) const {
        current_machine()->global_access(r, (const char *) p, sizeof(T), true);
        *p = x;
        return *this;
    }

private:
    region * r;
    T      * p;
};

template <typename T>
class global_ptr {
public:
    global_ptr() = default;
    global_ptr(region * r, T * p) : r(r), p(p) {}

    template <typename U, typename = std::enable_if_t<std::is_same_v<T, const U>>>
    global_ptr(const global_ptr<U> & other) : r(other.r), p(other.p) {}

    global_ref<T> operator[](int64_t i) const { return { r, p + i }; }
    global_ptr    operator+ (int64_t i) const { return { r, p + i }; }

    region * r = nullptr;
    T      * p = nullptr;
};

template <typename T>
global_ptr<T> enter_pointer(T * p) {
    return { current_machine()->find((const void *) p), p };
}

template <typename T, typename U>
global_ptr<T> cast(const global_ptr<U> & p) {
    return { p.r, reinterpret_cast<T *>(p.p) };
}

template <typename T>
T load(const global_ptr<const char> & p) {
    current_machine()->global_access(p.r, p.p, sizeof(T), false);
    T res;
    memcpy(&res, p.p, sizeof(T));
    return res;
}

template <typename T>
class shared_ref {
public:
    shared_ref(size_t at, size_t begin, size_t end) : at(at), begin(begin), end(end) {}

    operator T() const {
        T res;
        memcpy(&res, current_machine()->shared_access(at, sizeof(T), begin, end, false), sizeof(T));
        return res;
    }

    const shared_ref & operator=(T x) const {
        memcpy(current_machine()->shared_access(at, sizeof(T), begin, end, true), &x, sizeof(T));
        return *this;
    }

    const shared_ref & operator=(const shared_ref & other) const { return *this = (T) other; }

private:
    size_t at, begin, end;
};

// into memory of the block, by offset: the memory may move while threads ask for more
template <typename T>
class shared_ptr {
public:
    shared_ptr(size_t at, size_t begin, size_t end) : at(at), begin(begin), end(end) {}

    shared_ref<T> operator[](int64_t i) const { return { at + i*sizeof(T), begin, end }; }

    // a matrix: rows of whole 16 bytes from a place where loads of 32 may begin
    void check_matrix(size_t ld) const {
        if ((at - begin)%32 != 0 || ld*sizeof(T) % 16 != 0) {
            fail("a matrix at byte %zu with rows of %zu bytes is not aligned", at - begin, ld*sizeof(T));
        }
    }

    // n elements at once, valid until somebody writes them
    const T * read(size_t n) const { return (const T *) current_machine()->shared_access(at, n*sizeof(T), begin, end, false); }

    shared_ptr    operator+ (int64_t i) const { return { at + i*sizeof(T), begin, end }; }

private:
    size_t at, begin, end;
};

template <typename T>
shared_ptr<T> shared_array(int line, size_t n) {
    const size_t at = current_machine()->shared_array(line, n*sizeof(T));
    return { at, at, at + n*sizeof(T) };
}

} // namespace simt
