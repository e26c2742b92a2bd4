// What our host code for Metal uses of ggml-metal-device.h, for the emulator. Kernels are functions, what is encoded runs at once.

#pragma once

#include "simt-emulator.h"

#include "ggml.h"

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>

typedef std::array<void *, 8>                   simt_slots; // arguments of a kernel
typedef std::function<void(const simt_slots &)> simt_kernel;
typedef std::array<int32_t, 2>                  simt_constants; // of a pipeline, by their index

struct ggml_metal_buffer_id {
    void * metal;
    size_t offs;
};

struct ggml_metal_library {
    static std::map<std::string, simt_kernel> & kernels() {
        static std::map<std::string, simt_kernel> res;
        return res;
    }

    // of the pipeline that runs
    static simt_constants & constants() {
        static simt_constants res;
        return res;
    }
};

struct ggml_metal_pipeline {
    const simt_kernel & kernel;
    simt_constants      constants;
};

struct ggml_metal_pipeline_with_params {
    std::shared_ptr<ggml_metal_pipeline> pipeline;
};

struct ggml_metal_encoder {
    simt::machine & machine;
    simt_slots      slots = {};
    std::shared_ptr<ggml_metal_pipeline> pipeline = nullptr;
    std::array<std::array<char, 256>, 8> bytes = {};
};

typedef struct ggml_metal_library * ggml_metal_library_t;
typedef struct ggml_metal_encoder * ggml_metal_encoder_t;
typedef struct ggml_metal_buffer  * ggml_metal_buffer_t;
typedef simt_constants            * ggml_metal_cv_t;

inline ggml_metal_cv_t ggml_metal_cv_init() { return new simt_constants{ -1, -1 }; }

inline void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }

inline void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t i) { cv->at(i) = value; }

inline ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t, const char *) {
    return { nullptr }; // nothing is cached
}

inline ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(
        ggml_metal_library_t, const char * base, const char *, ggml_metal_cv_t cv) {
    const auto it = ggml_metal_library::kernels().find(base);
    if (it == ggml_metal_library::kernels().end()) {
        simt::fail("there is no kernel %s", base);
    }
    return { std::make_shared<ggml_metal_pipeline>(ggml_metal_pipeline{ it->second, cv ? *cv : simt_constants{ -1, -1 } }) };
}

// host memory: the tensor's own
inline ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    return { t->data, 0 };
}

inline void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->pipeline = pipeline.pipeline;
    enc->slots    = {};
}

inline void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int i) {
    if (size > enc->bytes.at(i).size()) {
        simt::fail("%zu bytes of constants", size);
    }
    memcpy(enc->bytes[i].data(), data, size);
    enc->slots.at(i) = enc->bytes[i].data();
}

inline void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int i) {
    enc->slots.at(i) = (char *) buffer.metal + buffer.offs;
}

inline void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int n0, int n1, int n2, int n_threads, int, int) {
    if (n1 != 1 || n2 != 1) {
        simt::fail("the emulator has grids of one dimension");
    }
    ggml_metal_library::constants() = enc->pipeline->constants;
    enc->machine.launch(n0, n_threads, [&] { enc->pipeline->kernel(enc->slots); });
}

// without it, kernels of an encoder may run at the same time
inline void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) {
    enc->machine.device_barrier();
}
