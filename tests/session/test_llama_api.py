"""Every way of using ``llama_cpp.Llama`` works with a policy on; what cannot work is refused with a reason."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from windowkv_edge import Llama, UnsupportedCallError, UnsupportedModelError, WindowKV

POLICY = {"kv_policy": "windowkv", "kv_budget": 64}


@pytest.fixture
def llm(session: Callable[..., Llama]) -> Llama:
    return session(**POLICY)


@pytest.fixture
def text(document: str) -> str:
    return document[:1200]  # about 300 tokens, over the budget


def test_no_method_is_forgotten() -> None:
    """A new public method upstream has to get a test here."""
    public = {name for name, _ in inspect.getmembers(llama_cpp.Llama, callable) if not name.startswith("_")}
    tested = {
        "close", "create_chat_completion", "create_chat_completion_openai_v1", "create_completion", "create_embedding",
        "detokenize", "embed", "eval", "from_pretrained", "generate", "load_state", "logits_to_logprobs",
        "longest_token_prefix", "n_ctx", "n_embd", "n_vocab", "pooling_type", "reset", "sample", "save_state",
        "set_cache", "set_seed", "token_bos", "token_eos", "token_nl", "tokenize", "tokenizer",
    }  # fmt: skip
    assert public == tested


def test_completion(llm: Llama, text: str) -> None:
    out = llm.create_completion(text, max_tokens=8, temperature=0.0)
    assert out["usage"]["prompt_tokens"] > 64 and out["usage"]["completion_tokens"] == 8
    assert llm.kv_stats().n_compactions == 1
    assert llm(text, max_tokens=8, temperature=0.0)["choices"][0]["text"] == out["choices"][0]["text"]


def test_streaming(llm: Llama, text: str) -> None:
    want = llm.create_completion(text, max_tokens=12, temperature=0.0)["choices"][0]["text"]
    got = [c["choices"][0]["text"] for c in llm.create_completion(text, max_tokens=12, temperature=0.0, stream=True)]
    assert "".join(got) == want and len(got) > 2
    # an abandoned stream leaves a usable session
    stream = llm.create_completion(text, max_tokens=12, temperature=0.0, stream=True)
    next(stream)
    stream.close()
    assert llm.create_completion(text, max_tokens=12, temperature=0.0)["choices"][0]["text"] == want


def test_chat_and_stream(llm: Llama, text: str) -> None:
    messages = [{"role": "user", "content": text + "\nWhere does this take place?"}]
    want = llm.create_chat_completion(messages, max_tokens=12, temperature=0.0)["choices"][0]["message"]["content"]
    parts = llm.create_chat_completion(messages, max_tokens=12, temperature=0.0, stream=True)
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == want


def test_grammar(llm: Llama, text: str) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    out = llm.create_completion(text + "\nIs this a text?", max_tokens=4, grammar=grammar, temperature=0.0)
    assert out["choices"][0]["text"] in ("yes", "no")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    messages = [{"role": "user", "content": text + "\nGive me a number as JSON."}]
    reply = llm.create_chat_completion(
        messages, max_tokens=24, temperature=0.0, response_format={"type": "json_object", "schema": schema}
    )["choices"][0]["message"]["content"]
    assert isinstance(json.loads(reply)["n"], int)


def test_logprobs(session: Callable[..., Llama], text: str) -> None:
    llm = session(logits_all=True, **POLICY)
    out = llm.create_completion(text, max_tokens=4, temperature=0.0, logprobs=3)["choices"][0]["logprobs"]
    assert len(out["tokens"]) == 4 and all(len(top) >= 3 for top in out["top_logprobs"])
    assert all(p <= 0 for p in out["token_logprobs"])
    assert llm.kv_stats().n_compactions == 1


def test_sampling_settings(llm: Llama, text: str) -> None:
    for kwargs in (
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1},
        {"temperature": 0.8, "mirostat_mode": 2, "seed": 1},
        {"temperature": 0.7, "repeat_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 1},
    ):
        first = llm.create_completion(text, max_tokens=8, **kwargs)["choices"][0]["text"]
        assert llm.create_completion(text, max_tokens=8, **kwargs)["choices"][0]["text"] == first
    llm.set_seed(7)
    assert llm.create_completion(text, max_tokens=4, temperature=1.0)["choices"][0]["text"]
    banned = llm.tokenize(b" the", add_bos=False)[0]
    bias = llm.create_completion(text, max_tokens=8, temperature=0.0, logit_bias={str(banned): -100.0})
    assert banned not in llm.tokenize(bias["choices"][0]["text"].encode(), add_bos=False)


def test_stop_echo_suffix(llm: Llama, text: str) -> None:
    out = llm.create_completion(text, max_tokens=32, temperature=0.0, stop=["\n", "."])["choices"][0]
    assert "\n" not in out["text"] and "." not in out["text"]
    echo = llm.create_completion(text, max_tokens=4, temperature=0.0, echo=True)["choices"][0]["text"]
    assert echo.startswith(text)


def test_generate_eval_sample_reset(llm: Llama, text: str) -> None:
    tokens = llm.tokenize(text.encode())
    generated = []
    for token in llm.generate(tokens, temp=0.0):
        generated.append(token)
        if len(generated) == 6:
            break
    assert llm.n_tokens == len(tokens) + 5

    llm.reset()
    assert llm.n_tokens == 0 and llm.kv_stats().n_past == 0
    llm.eval(tokens)
    again = []
    for _ in range(6):
        again.append(llm.sample(temp=0.0))
        llm.eval(again[-1:])
    assert again == generated
    assert llm.eval_tokens[-1] == again[-1]


def test_stopping_criteria_and_logits_processor(llm: Llama, text: str) -> None:
    stop = llama_cpp.StoppingCriteriaList([lambda ids, logits: len(ids) > 310])
    force = llm.tokenize(b" x", add_bos=False)[0]

    def processor(ids: Any, logits: np.ndarray) -> np.ndarray:
        logits[:] = -1e9
        logits[force] = 0
        return logits

    out = llm.create_completion(
        text, max_tokens=50, temperature=0.0, stopping_criteria=stop,
        logits_processor=llama_cpp.LogitsProcessorList([processor]),
    )  # fmt: skip
    assert set(out["choices"][0]["text"].split()) <= {"x"}
    assert llm.n_tokens <= 312


def test_prompt_lookup_drafts(session: Callable[..., Llama], text: str) -> None:
    """Rejected drafts are trimmed, drafts never trigger a compaction, and every token is the one that decoding token by
    token would choose, but for rounding: batches of other sizes round differently, and two of three texts gave the same
    answer, the third 38 of 40 tokens with 0.09 between the logits."""
    repeated = text + "\n" + text[:600]
    llm = session(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=6), **POLICY)
    prompt = llm.tokenize(repeated.encode())
    answer = [token for token, _ in zip(llm.generate(prompt, temp=0.0), range(40), strict=False)]
    assert llm.kv_stats().n_compactions == 1
    assert llm.kv_positions(0, 0)[-1] == llm.kv_stats().n_past - 1

    single = session(**POLICY)
    steps = single.generate(prompt, temp=0.0)
    best = 0
    for i, token in enumerate(answer):
        if i == 0:
            assert next(steps) == token
            steps.close()
        else:
            single.eval(answer[i - 1 : i])
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(single.ctx, -1), shape=(single.n_vocab(),))
        assert row[token] >= row.max() - 0.5
        best += int(row.argmax() == token)
    assert best >= 37
    assert single.kv_stats().n_compactions == 1


def test_tokenizer_and_properties(llm: Llama) -> None:
    tokens = llm.tokenize(b"Hello world")
    assert llm.detokenize(tokens) == b"Hello world"
    assert llm.n_ctx() == 1024 and llm.n_embd() == 576 and llm.n_vocab() == 49152
    assert llm.token_eos() != llm.token_nl() and isinstance(llm.token_bos(), int)
    assert llm.pooling_type() == llama_cpp.LLAMA_POOLING_TYPE_NONE
    assert llm.tokenizer() is not None
    assert Llama.longest_token_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert Llama.logits_to_logprobs(np.zeros(4, dtype=np.single)).tolist() == pytest.approx([-np.log(4)] * 4)


def test_openai_v1(llm: Llama) -> None:
    pytest.importorskip("openai", reason="create_chat_completion_openai_v1 needs the openai package")
    reply = llm.create_chat_completion_openai_v1([{"role": "user", "content": "Hi"}], max_tokens=2)
    assert reply.choices[0].message.content


def test_from_pretrained(smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub client is replaced, as there is no hub here; our arguments have to arrive."""
    import huggingface_hub

    class FakeFS:
        def ls(self, repo: str, recursive: bool = True) -> list[dict[str, str]]:
            return [{"name": f"{repo}/{smollm2.name}"}]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FakeFS)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **kwargs: str(smollm2))
    monkeypatch.setattr(huggingface_hub.utils, "validate_repo_id", lambda repo: None)
    llm = Llama.from_pretrained(
        "some/repo", filename="*.gguf", local_dir=str(smollm2.parent), n_ctx=512, verbose=False,
        kv_policy=WindowKV(omega=4), kv_budget=0.3,
    )  # fmt: skip
    assert llm.kv_policy == WindowKV(omega=4) and llm.kv_budget == 0.3
    llm.close()


def test_pickle(llm: Llama) -> None:
    clone = pickle.loads(pickle.dumps(llm))
    assert clone.kv_policy == llm.kv_policy and clone.kv_budget == 64
    clone.close()


def test_close_twice(session: Callable[..., Llama]) -> None:
    llm = session(**POLICY)
    llm.close()
    llm.close()
    with pytest.raises(UnsupportedCallError):
        llm.kv_positions(0, 0)
    with pytest.raises(UnsupportedCallError, match="was closed"):
        llm.kv_stats()
    llm.reset()


def test_sessions_side_by_side(session: Callable[..., Llama], text: str) -> None:
    plain, policy = session(flash_attn=True), session(**POLICY)
    want = plain(text, max_tokens=6, temperature=0.0)["choices"][0]["text"]
    policy(text, max_tokens=6, temperature=0.0)
    plain.reset()
    assert plain(text, max_tokens=6, temperature=0.0)["choices"][0]["text"] == want
    assert plain.kv_stats().policy == "stock" and policy.kv_stats().policy == "windowkv"


#
# refusals
#


def test_saved_states_work_without_a_policy(session: Callable[..., Llama], text: str) -> None:
    llm = session()
    llm.eval(llm.tokenize(text.encode()))
    state = llm.save_state()
    llm.reset()
    llm.load_state(state)
    assert llm.n_tokens > 0


def test_embeddings_are_refused(llm: Llama, session: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match="embedding=True cannot be combined"):
        session(embedding=True, **POLICY)
    with pytest.raises(RuntimeError, match="embedding=True"):
        llm.embed("text")
    with pytest.raises(RuntimeError, match="embedding=True"):
        llm.create_embedding("text")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kv_policy": "windowk"}, ValueError, "expected one of auto, full, streamingllm, snapkv, pyramidkv, adakv"),
        ({"kv_policy": 3}, TypeError, "expected None, a name or a KVPolicy object"),
        ({"kv_policy": "windowkv", "kv_budget": 0.0}, ValueError, "fraction over 0"),
        ({"kv_policy": "windowkv", "kv_budget": 1.2}, ValueError, "up to 1.0"),
        ({"kv_policy": "windowkv", "kv_budget": 0}, ValueError, "at least 1"),
        ({"kv_policy": "windowkv", "kv_budget": True}, TypeError, "kv_budget is True"),
        ({"kv_policy": "windowkv", "kv_budget": "12%"}, TypeError, "fraction of the prompt"),
        ({"kv_budget": 0.1}, ValueError, "without kv_policy has no effect"),
        ({"kv_policy": "windowkv", "kv_min_prompt": -1}, ValueError, "kv_min_prompt"),
        ({"kv_policy": "windowkv", "swa_full": True}, ValueError, "swa_full=True cannot be combined"),
        ({"kv_policy": "windowkv", "vocab_only": True}, ValueError, "vocab_only=True cannot be combined"),
        ({"kv_policy": "windowkv", "type_k": 6}, UnsupportedModelError, "cells of type q5_0 are not supported, expected f32"),
        ({"kv_policy": "windowkv", "type_v": 3}, UnsupportedModelError, "cells of type q4_1 are not supported"),
    ],
)
def test_bad_arguments(
    kwargs: dict[str, Any], error: type[Exception], message: str, session: Callable[..., Llama]
) -> None:
    with pytest.raises(error, match=message):
        session(**kwargs)


def test_a_refused_model_consumes_the_request(tmp_path: Path, session: Callable[..., Llama]) -> None:
    model = tiny_model.write_lfm2(tmp_path / "windows.gguf", window=64)
    with pytest.raises(UnsupportedModelError, match="lfm2 model with recurrent layers beside sliding-window attention"):
        Llama(str(model), kv_policy="windowkv", n_ctx=512, verbose=False)
    # the next session on this thread is an ordinary one
    assert session().kv_stats().policy == "stock"
    llm = Llama(str(model), n_ctx=512, verbose=False)
    assert llm.kv_stats().policy == "stock" and llm.kv_stats().layers == ()
    assert "MiB in window and recurrent layers" in str(llm.kv_stats())
    llm.close()


def test_what_needs_a_policy_says_so(session: Callable[..., Llama]) -> None:
    llm = session()
    for call in (llm.kv_compact, lambda: llm.kv_positions(0, 0), lambda: setattr(llm, "kv_policy", "snapkv")):
        with pytest.raises(UnsupportedCallError, match="needs a session with a policy"):
            call()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        # llama_cpp with stock libraries comes first
        ("import os; os.environ['LLAMA_CPP_LIB_PATH'] = {stock!r}; import llama_cpp; import windowkv_edge", "was imported before"),
        ("import importlib.metadata as m; v = m.version\n"
         "m.version = lambda n: '0.3.1' if n == 'llama-cpp-python' else v(n); import windowkv_edge", "llama-cpp-python 0.3.1 is installed, expected 0.3.36"),
        ("import sys, types; s = types.ModuleType('windowkv_edge._stamp'); s.STAMP = 'other'\n"
         "sys.modules['windowkv_edge._stamp'] = s; import windowkv_edge", "build stamp"),
    ],
    ids=["imported-before", "version", "stamp"],
)  # fmt: skip
def test_mismatched_libraries(code: str, message: str, native_tests: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code.format(stock=str(native_tests / "stock"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode != 0
    assert "LibraryMismatchError" in run.stderr and message in run.stderr


def test_the_environment_is_left_alone() -> None:
    code = "import os, windowkv_edge, llama_cpp; assert 'LLAMA_CPP_LIB_PATH' not in os.environ; print(llama_cpp.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "0.3.36", run.stderr
