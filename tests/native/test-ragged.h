#pragma once

// What the tests of the ragged cache share: contexts, batches, policies, and what the cache holds.

#include "llama.h"
#include "windowkv.h"

#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

extern int  n_failed;
extern bool on_device; // a GPU holds layers
extern bool no_ragged; // and has no attention over heads of different lengths, nor head by head

#define CHECK(cond)                                                            \
    do {                                                                       \
        if (!(cond)) {                                                         \
            fprintf(stderr, "%s:%d: %s failed\n", __FILE__, __LINE__, #cond);  \
            n_failed++;                                                        \
        }                                                                      \
    } while (0)

struct context_deleter {
    void operator()(llama_context * ctx) { llama_free(ctx); }
};
using context_ptr = std::unique_ptr<llama_context, context_deleter>;

llama_context_params default_params();

// window: queries that the cache observes; 0: stock's cache
context_ptr make(llama_model * model, int window, llama_context_params params = default_params());

std::vector<llama_token> prompt(int n, int seed = 1);

int decode(llama_context * ctx, std::vector<llama_token> tokens, int p0);

std::vector<float> logits(llama_context * ctx);

wkv_stats stats(llama_context * ctx);

std::vector<int32_t> positions(llama_context * ctx, int layer, int head);

std::vector<float> rows(llama_context * ctx, int layer, int head, int which);

std::vector<int32_t> observed(llama_context * ctx); // positions of the queries

std::vector<float> scores(llama_context * ctx, int window_size); // of layer 0

wkv_policy windowkv();
wkv_policy snapkv();
wkv_policy pyramidkv();
wkv_policy adakv();

// windows inside budgets that fall from head to head
wkv_policy windowkv_headkv(const std::vector<double> & importance);

bool last_error_has(const char * text);

// the tests, by what they are about
void test_cells    (llama_model * model);
void test_sequence (llama_model * model);
void test_prompt   (llama_model * model);
void test_selection(llama_model * model);
void test_shift    (llama_model * model);
void test_state    (llama_model * model);
