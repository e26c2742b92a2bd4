#pragma once

// A device for tests of the runtime where there is no GPU; ggml_backend_load() loads it.
//
// TEST_DEVICE_COUNT in the environment is the number of devices, 1 or 2, the default is 1; TEST_DEVICE_KERNEL says what computes
// GGML_OP_FLASH_ATTN_RAGGED: "cpu", the default; "cuda" or "metal", the GPU's kernel in the emulator; "none", the op is not supported.
// GGML_OP_RAGGED_SELECT is supported with "cuda" alone.
// TEST_DEVICE_NO_SINKS names an attention operation that is supported without sinks only, such as FLASH_ATTN_RAGGED; TEST_DEVICE_LACKS
// an operation that is not supported at all.
//
// As on Vulkan, what FLASH_ATTN_EXT reads has to begin where a tensor may begin: its graph fails otherwise.

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct test_device_stats {
    // since the last reset
    int64_t n_set;       // writes from the host
    int64_t bytes_set;
    int64_t n_get;       // reads to the host
    int64_t bytes_get;
    int64_t n_sync;      // times that the host waited
    int64_t n_graphs;
    int64_t n_graphs_new; // of these, those that a CUDA graph would have to be captured for: nodes, shapes or addresses changed
    int64_t n_ragged;    // computed nodes of GGML_OP_FLASH_ATTN_RAGGED
    int64_t n_devices;   // devices that computed some
    int64_t n_select;    // computed nodes of GGML_OP_RAGGED_SELECT
    int64_t n_failed;    // buffers that test_device_fail_buffer() let fail

    // buffers that exist, and the most that did
    int64_t bytes_live;
    int64_t bytes_peak;
};

void test_device_get_stats(struct test_device_stats * stats);

// buffers beyond this many bytes in all fail, 0 = no limit
void test_device_set_limit(int64_t bytes);

// of the buffers to come this one fails, counted from 0; -1 = none
void test_device_fail_buffer(int64_t i);

// of the graphs to come this one fails, counted from 0; -1 = none
void test_device_fail_graph(int64_t i);

// counts start at zero again, the peak at what exists
void test_device_reset(void);

#ifdef __cplusplus
}
#endif
