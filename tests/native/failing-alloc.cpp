// The allocator of a process (LD_PRELOAD) in which one allocation of libllama or ggml fails: the n-th after alloc_arm(n). It keeps the
// stacks of all of them, tells what is still allocated, and where the process crashed.
//
// An allocation is theirs if the first frame that does not belong to the C or C++ runtime lies in one of their libraries.

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

extern "C" {
void * __libc_malloc(size_t);
void * __libc_calloc(size_t, size_t);
void * __libc_realloc(void *, size_t);
void * __libc_memalign(size_t, size_t);
void   __libc_free(void *);
}

namespace {

constexpr int    DEPTH   = 40;
constexpr size_t STACKS  = size_t(1) << 17; // of the allocations since alloc_arm()
constexpr size_t ENTRIES = size_t(1) << 17; // of what is allocated
constexpr size_t CRASHES = 64;              // of processes at the same time

struct stack {
    int64_t n_bytes;
    int64_t depth;
    void *  frames[DEPTH]; // the innermost first, up to what called the libraries
};

// shared with the parent of a process that crashes
struct crash {
    int64_t signal;
    int64_t depth;
    void *  frames[DEPTH];
};

struct entry {
    void *  ptr; // nullptr: never used
    int32_t i;   // of its stack, -1: freed
};

struct range { uintptr_t begin, end; };

constexpr size_t N_RANGES = 64;

range  theirs [N_RANGES];
size_t n_theirs;
range  runtime[N_RANGES];
size_t n_runtime;

stack * stacks; // of a process, reserved and not used where nothing happens
entry * entries;
crash * crashes;
crash * own_crash; // of this process

int64_t n_counted;     // allocations since alloc_arm()
int64_t n_fail;        // the one that fails, 0 = none
bool    armed;         // they are counted
bool    tracking;      // and what they allocate is
int     n_frames = DEPTH; // that are asked for

std::atomic_flag  lock = ATOMIC_FLAG_INIT;
thread_local bool inside __attribute__((tls_model("initial-exec")));

struct guard {
    guard()  { inside = true; while (lock.test_and_set(std::memory_order_acquire)) {} }
    ~guard() { lock.clear(std::memory_order_release); inside = false; }
};

bool within(const range * ranges, size_t n, const void * addr) {
    for (size_t i = 0; i < n; ++i) {
        if (uintptr_t(addr) >= ranges[i].begin && uintptr_t(addr) < ranges[i].end) {
            return true;
        }
    }
    return false;
}

int add_library(dl_phdr_info * info, size_t, void *) {
    const char * slash = strrchr(info->dlpi_name, '/');
    const char * name  = slash ? slash + 1 : info->dlpi_name;

    const auto is = [&](const char * prefix) { return strncmp(name, prefix, strlen(prefix)) == 0; };

    const bool own = is("libllama") || is("libggml");
    if (!own && !is("libstdc++") && !is("libc.") && !is("libgcc_s") && !is("failing-alloc")) {
        return 0;
    }
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto & header = info->dlpi_phdr[i];
        if (header.p_type == PT_LOAD && (header.p_flags & PF_X)) {
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            (own ? theirs[n_theirs++] : runtime[n_runtime++]) = { begin, begin + header.p_memsz };
        }
    }
    return 0;
}

template <typename T>
T * reserve(size_t n, int flags) {
    void * res = mmap(nullptr, n*sizeof(T), PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (res == MAP_FAILED) {
        abort();
    }
    return static_cast<T *>(res);
}

entry & find(void * ptr, bool add) {
    size_t i = (uintptr_t(ptr) >> 4)*0x9e3779b97f4a7c15u % ENTRIES;
    while (entries[i].ptr && entries[i].ptr != ptr) {
        i = (i + 1) % ENTRIES;
    }
    if (add) {
        entries[i].ptr = ptr;
    }
    return entries[i];
}

void forget(void * ptr) {
    if (tracking && ptr && !inside) {
        guard g;
        find(ptr, false).i = -1;
    }
}

// alloc() unless it has to fail
template <typename F>
void * counted(size_t n_bytes, F alloc) {
    if (!tracking || inside) {
        return alloc();
    }
    guard g;

    void * frames[DEPTH];
    int    depth = 0;
    int    first = 0;
    for (int n = n_frames;; n = DEPTH) {
        depth = backtrace(frames, n);
        first = 0;
        while (first < depth && within(runtime, n_runtime, frames[first])) {
            ++first;
        }
        if (first < depth || n == DEPTH) {
            break;
        }
    }
    if (first == depth || !within(theirs, n_theirs, frames[first])) {
        return alloc();
    }

    if (n_counted == int64_t(STACKS)) {
        abort();
    }
    stack & cur = stacks[n_counted++];
    cur.n_bytes = n_bytes;
    for (cur.depth = 0; first < depth && (within(theirs, n_theirs, frames[first]) || within(runtime, n_runtime, frames[first])); ++first) {
        cur.frames[cur.depth++] = frames[first];
    }
    if (armed && n_counted == n_fail) {
        errno = ENOMEM;
        return nullptr;
    }

    void * res = alloc();
    if (res) {
        find(res, true).i = n_counted - 1;
    }
    return res;
}

void on_crash(int number) {
    tracking          = false;
    own_crash->signal = number;
    own_crash->depth  = backtrace(own_crash->frames, DEPTH);
    _exit(128 + number);
}

} // namespace

extern "C" {

void * malloc(size_t n) {
    return counted(n, [&] { return __libc_malloc(n); });
}

void * calloc(size_t n, size_t size) {
    return counted(n*size, [&] { return __libc_calloc(n, size); });
}

void * realloc(void * ptr, size_t n) {
    // a block that moves is one that was freed; one whose growing fails stays
    const int32_t before = tracking && ptr && !inside ? find(ptr, false).i : -1;
    forget(ptr);
    void * res = counted(n, [&] { return __libc_realloc(ptr, n); });
    if (!res && n > 0 && before >= 0) {
        guard g;
        find(ptr, true).i = before;
    }
    return res;
}

void * memalign(size_t align, size_t n) {
    return counted(n, [&] { return __libc_memalign(align, n); });
}

void * aligned_alloc(size_t align, size_t n) {
    return memalign(align, n);
}

int posix_memalign(void ** res, size_t align, size_t n) {
    void * ptr = memalign(align, n);
    if (!ptr) {
        return ENOMEM;
    }
    *res = ptr;
    return 0;
}

void free(void * ptr) {
    forget(ptr);
    __libc_free(ptr);
}

// count and keep stacks from now on, and let the n-th allocation fail; 0 = none
void alloc_arm(int64_t n) {
    if (!stacks) {
        stacks     = reserve<stack>(STACKS,  MAP_PRIVATE);
        entries    = reserve<entry>(ENTRIES, MAP_PRIVATE);
        n_theirs   = n_runtime = 0;
        dl_iterate_phdr(add_library, nullptr);

        void * frames[1];
        backtrace(frames, 1); // it loads a library at its first call
    }
    n_counted = 0;
    n_fail    = n;
    armed     = true;
    tracking  = true;
}

// Frames of a stack that are kept from now on, those of the runtime included: what takes long is to find them. As many more are looked
// at as it takes to tell whose an allocation is.
void alloc_depth(int32_t n) {
    n_frames = n < 1 || n > DEPTH ? DEPTH : n;
}

// nothing fails any more; what is allocated and freed is still tracked. Returns the allocations since alloc_arm()
int64_t alloc_disarm(void) {
    armed = false;
    return n_counted;
}

// the allocations since alloc_arm(), in their order
const struct stack * alloc_stacks(void) {
    return stacks;
}

// indices into alloc_stacks() of what was allocated since alloc_arm() and not freed; returns their number
int64_t alloc_live(int32_t * indices, int64_t n_max) {
    int64_t n = 0;
    for (size_t i = 0; i < ENTRIES; ++i) {
        if (entries[i].ptr && entries[i].i >= 0) {
            if (n < n_max) {
                indices[n] = entries[i].i;
            }
            ++n;
        }
    }
    return n;
}

// CRASHES places for what alloc_catch_crashes() writes, to be asked for before processes are forked
struct crash * alloc_crashes(void) {
    if (!crashes) {
        crashes = reserve<crash>(CRASHES, MAP_SHARED);
    }
    return crashes;
}

// from now on a crash of this process is written down at a place, and ends it at once
void alloc_catch_crashes(int32_t place) {
    own_crash = &crashes[place];
    *own_crash = {};
    for (int number : { SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL }) {
        signal(number, on_crash);
    }
}

// the function at a return address, "" if no exported one; until the next call
const char * alloc_name(void * addr) {
    static char * demangled;
    static size_t size;

    Dl_info info;
    // it may lie behind a function that never returns
    if (!dladdr(static_cast<char *>(addr) - 1, &info) || !info.dli_sname) {
        return "";
    }
    char * res = abi::__cxa_demangle(info.dli_sname, demangled, &size, nullptr);
    return res ? demangled = res : info.dli_sname;
}

} // extern "C"
