// Pointers of kernels in the emulator: every access tells the machine.

#pragma once

#include "simt-emulator.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace simt {

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

    // atomically
    template <typename F>
    void update(F fn) const {
        current_machine()->global_access(r, (const char *) p, sizeof(T), true, true);
        *p = fn(*p);
    }

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

    // atomically
    template <typename F>
    void update(F fn) const {
        T x;
        char * p = current_machine()->shared_access(at, sizeof(T), begin, end, true, true);
        memcpy(&x, p, sizeof(T));
        x = fn(x);
        memcpy(p, &x, sizeof(T));
    }
    size_t at, begin, end;
};

template <typename T, typename U>
shared_ptr<T> shared_cast(const shared_ptr<U> & p) {
    return { p.at, p.begin, p.end };
}

// 16 bytes as they lie there
template <typename T>
void check_aligned(const shared_ptr<T> & p, size_t size) {
    if ((p.at - p.begin) % size != 0) {
        fail("%zu bytes of shared memory at byte %zu are not aligned", size, p.at - p.begin);
    }
}

template <typename T>
shared_ptr<T> shared_array(int line, size_t n) {
    const size_t at = current_machine()->shared_array(line, n*sizeof(T));
    return { at, at, at + n*sizeof(T) };
}

} // namespace simt
