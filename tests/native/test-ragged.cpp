// The ragged cache through its public interfaces, and its scores by themselves, run under the sanitizers on a tiny model with random weights.
//
//   test-ragged MODEL.gguf [LAYERS_ON_THE_GPU [uniform|state]]
//
// uniform: the GPU has no attention over heads of different lengths, and lacks what attending head by head takes.
// state: only what is about saved states, for models with windows or recurrent states.
// GGML_BACKEND_PATH names a library with one more backend.

#include "test-ragged.h"

#include "ggml-backend.h"

#include <cstdio>
#include <cstdlib>
#include <string>

int  n_failed  = 0;
bool on_device = false;
bool no_ragged = false;

int main(int argc, char ** argv) {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // who ends this has the lines so far

    const std::string mode = argc == 4 ? argv[3] : "";
    if (argc < 2 || argc > 4 || (argc == 4 && mode != "uniform" && mode != "state")) {
        fprintf(stderr, "usage: %s MODEL.gguf [LAYERS_ON_THE_GPU [uniform|state]]\n", argv[0]);
        return 2;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    ggml_backend_load_all();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = argc > 2 ? atoi(argv[2]) : 0;

    on_device = params.n_gpu_layers > 0;
    if (on_device && !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU)) {
        fprintf(stderr, "there is no GPU for %d layers\n", params.n_gpu_layers);
        return 2;
    }

    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        fprintf(stderr, "cannot load %s\n", argv[1]);
        return 2;
    }

    no_ragged = mode == "uniform";

    if (mode != "state") {
        test_cells(model);
        test_sequence(model);
        test_prompt(model);
        test_selection(model);
        test_shift(model);
    }
    test_state(model);

    llama_model_free(model);
    llama_backend_free();

    printf("%s\n", n_failed ? "failed" : "ok");
    return n_failed ? 1 : 0;
}
