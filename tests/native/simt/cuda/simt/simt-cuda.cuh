// native/simt/simt-cuda.cuh for the emulator

#pragma once

#include "common.cuh"
#include "simt-primitives.h"

template <typename... params_t, typename... args_t>
static void simt_launch(void (*kernel)(params_t...), int n_blocks, int n_threads, cudaStream_t stream, args_t... args) {
    stream->device_barrier(); // launches of a stream follow each other
    stream->launch(n_blocks, n_threads, [&] { kernel(args...); });
}
