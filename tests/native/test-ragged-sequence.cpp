// Tests of the sequence: what can be removed, batches that do not fit or fail, snapshots.

#include "test-ragged.h"

#include <vector>

static void test_sequence_rules(llama_model * model) {
    auto ctx = make(model, 8);
    llama_memory_t mem = llama_get_memory(ctx.get());

    CHECK(llama_memory_can_shift(mem));
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    const auto want = [&] {
        CHECK(decode(ctx.get(), prompt(5, 7), 300) == 0);
        return logits(ctx.get());
    }();

    // behind the end: nothing to do
    CHECK(llama_memory_seq_rm(mem, 0, 305, -1));
    CHECK(stats(ctx.get()).n_past == 305);

    // a tail, then other tokens, then the first ones again: stale rows are never read
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
    CHECK(decode(ctx.get(), prompt(40, 9), 300) == 0);
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
    CHECK(decode(ctx.get(), prompt(5, 7), 300) == 0);
    CHECK(logits(ctx.get()) == want);

    CHECK(llama_memory_seq_rm(mem, 0, 20, 20)); // empty
    CHECK(llama_memory_seq_rm(mem, 3, 0, -1));  // no such sequence
    CHECK(stats(ctx.get()).n_past == 305);

    // shifting up, dividing, copying: refused
    llama_memory_seq_add(mem, 0, 10, -1, 5);
    llama_memory_seq_div(mem, 0, 10, -1, 2);
    llama_memory_seq_cp (mem, 0, 1, -1, -1);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 304);
    CHECK(llama_memory_seq_pos_max(mem, 1) == -1);

    // below the compaction boundary: refused; from it on: the tail
    const auto policy = windowkv();
    CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
    CHECK(decode(ctx.get(), prompt(10, 3), 305) == 0);
    CHECK(!llama_memory_seq_rm(mem, 0, 304, -1));
    CHECK(stats(ctx.get()).n_past == 315);
    CHECK(llama_memory_seq_rm(mem, 0, 305, -1));
    CHECK(stats(ctx.get()).n_past == 305);
    CHECK(positions(ctx.get(), 0, 0).size() == 40);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 304);

    // keep the only sequence, then clear: memory is back, and a new prompt starts over
    llama_memory_seq_keep(mem, 0);
    CHECK(stats(ctx.get()).n_past == 305);
    CHECK(llama_memory_seq_rm(mem, -1, 0, -1));
    CHECK(stats(ctx.get()).n_past == 0);
    CHECK(stats(ctx.get()).bytes_pool == 0);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(decode(ctx.get(), prompt(5, 7), 300) == 0);
    CHECK(logits(ctx.get()) == want);

    llama_memory_clear(mem, true);
    CHECK(stats(ctx.get()).n_past == 0);
    CHECK(llama_memory_seq_rm(mem, 0, 0, -1));
}

static void test_batches_that_do_not_fit(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(10), 0) == 0);

    CHECK(decode(ctx.get(), prompt(3), 12) == -1); // leaves a gap: upstream's own check
    CHECK(decode(ctx.get(), prompt(3), 5)  == -1); // overwrites
    CHECK(stats(ctx.get()).n_past == 10);

    CHECK(decode(ctx.get(), prompt(512), 10)  == 0);
    CHECK(decode(ctx.get(), prompt(512), 522) != 0); // over n_ctx
    CHECK(last_error_has("no room for 512 more"));
    CHECK(stats(ctx.get()).n_past == 522);
    CHECK(decode(ctx.get(), prompt(502), 522) == 0);
    CHECK(decode(ctx.get(), prompt(1), 1024)  != 0);
}

static void test_aborted_ubatch_leaves_no_trace(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(200), 0) == 0);
    CHECK(decode(ctx.get(), prompt(1, 5), 200) == 0);
    const auto want = logits(ctx.get());
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 200, -1));

    int n_calls = 0;
    llama_set_abort_callback(ctx.get(), [](void * data) { return ++*(int *) data > 30; }, &n_calls);
    CHECK(decode(ctx.get(), prompt(300, 2), 200) == 2);
    llama_set_abort_callback(ctx.get(), nullptr, nullptr);

    CHECK(stats(ctx.get()).n_past % 128 == 200 % 128); // whole ubatches stay, the aborted one is gone
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 200, -1));
    CHECK(decode(ctx.get(), prompt(1, 5), 200) == 0);
    CHECK(logits(ctx.get()) == want);
}

static void test_snapshot(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(wkv_snapshot_restore(ctx.get()) == WKV_ERR_COMPUTE);

    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_snapshot_save(ctx.get()) == WKV_OK);

    const auto policy = windowkv();
    std::vector<float> want;
    for (int i = 0; i < 3; ++i) {
        CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
        CHECK(decode(ctx.get(), prompt(20, 4), 300) == 0);
        const auto got = logits(ctx.get());
        CHECK(want.empty() || want == got);
        want = got;
        CHECK(wkv_snapshot_restore(ctx.get()) == WKV_OK);
        CHECK(stats(ctx.get()).n_past == 300);
        CHECK(positions(ctx.get(), 0, 0).size() == 300);
    }
    CHECK(wkv_snapshot_drop(ctx.get()) == WKV_OK);
    CHECK(wkv_snapshot_restore(ctx.get()) == WKV_ERR_COMPUTE);
}

void test_sequence(llama_model * model) {
    test_sequence_rules(model);
    test_batches_that_do_not_fit(model);
    if (!on_device) {
        test_aborted_ubatch_leaves_no_trace(model); // GPUs do not ask whether to abort
    }
    test_snapshot(model);
}
