#pragma once

struct llama_batch;
struct llama_batch_ext;
struct llama_context;

// lctx.decode(batch). With a ragged cache no exception leaves it: memory that runs out is -2, anything else -3, the message of the last
// failure names it, and the memory is cleared
int llama_kv_ragged_decode(llama_context & lctx, const llama_batch & batch);
int llama_kv_ragged_decode(llama_context & lctx, const llama_batch_ext & batch);
