#pragma once

// the hosts of the kernels in the emulator; each is compiled with headers of its own

#include "ggml.h"

#include <cstddef>

namespace simt {
class machine;
}

struct simt_device {
    const char * name;
    bool   (*supports)(const ggml_tensor * op);
    size_t (*extra)   (const ggml_tensor * op); // bytes behind the result
    void   (*compute) (simt::machine & machine, ggml_tensor * op);
};

extern int simt_cuda_n_sm; // multiprocessors of the CUDA device
extern int simt_cuda_cc;   // its compute capability: 700 has products of matrices through memory alone

simt_device simt_cuda();  // GGML_OP_RAGGED_SELECT, too
simt_device simt_metal();
