// what host code for Metal asks a buffer for; the emulator's tensors lie in host memory, whatever their buffer says

#pragma once

#include "ggml-backend.h"

struct ggml_backend_buffer {
    void * context;
};
