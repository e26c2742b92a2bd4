// What our .cu files use of ggml-cuda's common.cuh, for the emulator.

#pragma once

#include "simt-emulator.h"

#include "ggml-impl.h"
#include "ggml.h"

#include <cstring>
#include <vector>

typedef simt::machine * cudaStream_t;

extern int simt_cuda_n_sm; // multiprocessors of the device
extern int simt_cuda_cc;   // its compute capability

static constexpr int GGML_CUDA_CC_VOLTA  = 700;
static constexpr int GGML_CUDA_CC_TURING = 750;
static constexpr int GGML_CUDA_CC_AMPERE = 800;

#define GGML_CUDA_CC_IS_NVIDIA(cc) ((cc) > 0)

struct ggml_cuda_device_info {
    struct {
        int cc;
        int nsm;
        int warp_size;
        size_t smpbo;
    } devices[1];
};

inline ggml_cuda_device_info ggml_cuda_info() {
    return { { { simt_cuda_cc, simt_cuda_n_sm, 32, 227*1024 } } }; // memory of a block as an H100 has it
}

inline int ggml_cuda_highest_compiled_arch(int cc) {
    return cc;
}

// memory of the device, full of NaN
struct ggml_cuda_pool {
    simt::machine & machine;

    void * alloc(size_t size, size_t * actual_size) {
        char * res = new char[size];
        memset(res, 0xFF, size);
        machine.add(res, size, "scratch");
        *actual_size = size;
        return res;
    }

    void free(void * p, size_t) {
        machine.remove(p);
        delete[] (char *) p;
    }
};

template <typename T>
struct ggml_cuda_pool_alloc {
    explicit ggml_cuda_pool_alloc(ggml_cuda_pool & pool) : pool(pool) {}
    ggml_cuda_pool_alloc(ggml_cuda_pool & pool, size_t n) : pool(pool) { alloc(n); }
    ~ggml_cuda_pool_alloc() {
        if (p) {
            pool.free(p, size);
        }
    }
    ggml_cuda_pool_alloc(const ggml_cuda_pool_alloc &) = delete;

    T * alloc(size_t n) { return p = (T *) pool.alloc(n*sizeof(T), &size); }
    T * get() { return p; }

    ggml_cuda_pool & pool;
    T              * p    = nullptr;
    size_t           size = 0;
};

struct ggml_backend_cuda_context {
    explicit ggml_backend_cuda_context(simt::machine & machine) : memory{ machine } {}

    int            device = 0;
    ggml_cuda_pool memory;

    ggml_cuda_pool & pool() { return memory; }
    cudaStream_t     stream() { return &memory.machine; }
};
