"""``kv_limit``: what a session holds at any moment, of prompts and answers of any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from kinds import WRITERS, logits
from scripted import OTHERS, TOKENS, Script, answer, once

from windowkv_edge import POLICIES, HeadScores, KVPolicy, Llama, _native, get_policy
from windowkv_edge.limit import Limit
from windowkv_edge.policies.headkv import ByImportance

Open = Callable[..., Llama]

LIMIT, BATCH = 160, 32
LONG = np.random.default_rng(3).integers(0, tiny_model.N_VOCAB, 1500).tolist()


def n_held(llm: Llama) -> float:
    return float(llm.kv_stats().cells.mean())


def watch_cells(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Cells held after every batch."""
    seen: list[float] = []
    decode = llm._ctx.decode

    def call(batch: Any) -> None:
        decode(batch)
        seen.append(float(_native.Context(llm.ctx).cells().mean()))

    monkeypatch.setattr(llm._ctx, "decode", call)
    return seen


#
# tokens that are only observed
#


@pytest.mark.parametrize("name", WRITERS)
def test_observing_leaves_no_trace(models: dict[str, Path], opened: Open, name: str) -> None:
    """What follows is what would have followed, bit for bit, with windows and recurrent states."""
    results = []
    for observe in (False, True):
        llm = opened(models[name], kv_policy="full", n_batch=BATCH)
        llm.eval(TOKENS[:200])
        if observe:
            kv = llm._kv
            assert kv is not None
            with kv.observing():
                for i in range(0, 96, BATCH):
                    llm._batch.set_batch(batch=OTHERS[i : i + BATCH], n_past=llm.n_tokens + i, logits_all=False)
                    llm._ctx.decode(llm._batch)
            assert kv.stats().n_past == 200
        rows = []
        for token in TOKENS[200:210]:
            llm.eval([token])
            rows.append(logits(llm))
        results.append(np.array(rows))
        llm.close()
    assert np.array_equal(*results)


def test_the_observed_choose(models: dict[str, Path], opened: Open) -> None:
    """A compaction behind observed tokens has their scores; the next batch forgets them."""
    llm = opened(models["llama"], kv_policy="snapkv", n_batch=BATCH)
    kv = llm._kv
    assert kv is not None
    llm.eval(TOKENS[:100])
    llm.eval(OTHERS[:8])
    want = [own[:100] for own in kv.scores(0, 1)]
    llm.n_tokens = 100
    llm._sync_positions()
    with kv.observing():
        llm._batch.set_batch(batch=OTHERS[:8], n_past=100, logits_all=False)
        llm._ctx.decode(llm._batch)
    got = kv.scores(0, 1)
    for g, w in zip(got, want, strict=True):
        # the shares that both query heads pay these cells differ a little
        np.testing.assert_allclose(g / g.sum(), w / w.sum(), rtol=0.1, atol=1e-4)
    llm.eval(TOKENS[100:108])
    assert not np.allclose(kv.scores(0, 1)[0][:100], got[0], rtol=1e-2)


def test_saved_behind_observed_tokens(models: dict[str, Path], opened: Open) -> None:
    """A state that was saved between observing and compacting goes on like the session."""
    kept = []
    for saves in (False, True):
        llm = opened(models["llama"], kv_policy="snapkv", n_batch=BATCH)
        kv = llm._kv
        assert kv is not None
        llm.eval(TOKENS[:100])
        with kv.observing():
            llm._batch.set_batch(batch=OTHERS[:8], n_past=100, logits_all=False)
            llm._ctx.decode(llm._batch)
        if saves:
            state = llm.save_state()
            llm.reset()
            llm.load_state(state)
        llm.kv_compact(48)
        kept.append([llm.kv_positions(il, ih).tolist() for il in range(3) for ih in range(2)])
    assert kept[0] == kept[1]


def test_one_observed_token_ends_no_prompt(models: dict[str, Path], opened: Open) -> None:
    """The call that compacts what others decoded is about what stays."""
    llm = opened(models["llama"], kv_policy="snapkv", kv_budget=48, n_batch=BATCH)
    kv = llm._kv
    assert kv is not None
    for i in range(0, 96, BATCH):
        llm._batch.set_batch(batch=TOKENS[i : i + BATCH], n_past=i, logits_all=False)
        llm._ctx.decode(llm._batch)
    with kv.observing():
        llm._batch.set_batch(batch=OTHERS[:1], n_past=96, logits_all=False)
        llm._ctx.decode(llm._batch)
    assert llm.kv_stats().n_compactions == 0 and kv.stats().n_past == 96
    llm._batch.set_batch(batch=TOKENS[96:97], n_past=96, logits_all=False)
    llm._ctx.decode(llm._batch)  # now it is over
    assert llm.kv_stats().n_compactions == 1 and n_held(llm) == 49


def test_observing_is_checked(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="snapkv")
    kv = llm._kv
    assert kv is not None
    llm.eval(TOKENS[:100])
    with kv.observing():
        with pytest.raises(ValueError, match="end that first"), kv.observing():
            pass
        for call in (lambda: llm.kv_compact(32), lambda: llm.kv_compact(400), kv.snapshot_save, kv.prompt_done):
            with pytest.raises(ValueError, match="only observed"):
                call()
    with kv.observing():
        llm.reset()
    assert len(answer(llm, TOKENS[:100], 3)) == 3


#
# prompts
#


def policy_of(name: str) -> KVPolicy:
    """With what a model without head scores and tokenizer lacks."""
    if name == "script":
        return Script(action=lambda: None)
    policy = get_policy(name)
    if isinstance(policy, ByImportance) and name != "auto":
        rng = np.random.default_rng(0)
        return replace(policy, importance=HeadScores({kind: rng.random((3, 4)) for kind in ("r", "r2")}))
    return replace(policy, task="localization") if policy.needs_task else policy


@pytest.mark.parametrize("name", [*(name for name in POLICIES if name != "full"), "script"])
def test_a_prompt_stays_within_the_limit(
    models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    llm = opened(models["llama"], kv_policy=policy_of(name), kv_limit=LIMIT, n_batch=BATCH)
    seen = watch_cells(llm, monkeypatch)
    out = answer(llm, LONG[:700], 40)
    assert len(out) == 40
    assert max(seen) <= LIMIT + BATCH
    assert n_held(llm) <= LIMIT
    assert llm.n_tokens == 739


@pytest.mark.parametrize(
    ("held", "left", "want"),
    [
        (0, 7400, (512, None)),
        (896, 7400, (512, None)),
        (897, 7400, (128, None)),  # a quarter of a batch, which is an eighth of the limit as well
        (1280, 7400, (128, None)),
        (1281, 7400, (128, 1280)),  # 1024 + 512, less 128, less 128 for a compaction
        (1408, 100, (100, 1308)),
        (1300, 5, (5, None)),
    ],
)
def test_steps_of_a_long_prompt(held: int, left: int, want: tuple[int, int | None]) -> None:
    """By hand, for 1,024 cells, batches of 512 and 32 observers."""
    assert Limit.next_step(1024, 512, held, left, 32) == want


def test_steps_where_a_batch_is_small_or_observers_are_many() -> None:
    assert Limit.next_step(4096, 512, 4096, 9000, 32) == (512, 3712)  # no more than a batch at once
    assert Limit.next_step(1024, 512, 2000, 9000, 200) == (128, 1208)  # the observers need more than a compaction
    assert Limit.next_step(1024, 512, 2000, 128, 200) == (128, 1280)  # none behind the last tokens
    assert Limit.next_step(1024, 512, 2000, 9000, 0, 64) == (64, 1280)  # two steps in an eighth of 1,344
    assert Limit.next_step(1024, 16, 2000, 9000, 0) == (16, 842)  # 938, and room for six more steps
    assert Limit.next_step(1024, 512, 2000, 5, 0) == (5, 1403)  # nothing comes behind them
    assert Limit.next_step(1024, 512, 2000, 5, 100, goes_on=True) == (5, 1233)  # 1403, and 34 more pieces of 5
    assert Limit.next_step(1, 1, 2, 3, 0) == (1, 1)


def test_a_batch_holds_cells_while_a_prompt_is_read(
    tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a part of its room; the rest stays until the prompt's end."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, n_batch=4 * BATCH)
    seen = watch_cells(llm, monkeypatch)
    answer(llm, LONG[:700], 1)
    full = seen[next(i for i, n in enumerate(seen) if n > LIMIT) :]
    assert len(full) > 2 * (700 - LIMIT - 4 * BATCH) / BATCH  # a step each, and its observers
    assert min(full) > LIMIT + BATCH and max(full) <= LIMIT + 4 * BATCH
    assert n_held(llm) <= LIMIT


def test_pieces_leave_room_for_who_observes(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the prompt that goes on behind what was evaluated by hand."""
    for n in range(150, 200, 7):
        llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
        seen = watch_cells(llm, monkeypatch)
        llm.eval(LONG[:n])
        answer(llm, LONG[: n + 10], 1)
        assert max(seen) <= LIMIT + BATCH, n


def test_a_batch_of_nothing(tiny: Path, opened: Open) -> None:
    """What nobody should set does not hang; llama-cpp-python says what it does not like."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    llm.n_batch = 0
    with pytest.raises(ValueError, match="range"):
        llm.eval(TOKENS[:20])
    assert llm.n_tokens == 0


@pytest.mark.parametrize("model", WRITERS)
def test_windows_and_recurrent_layers_bound_themselves(
    models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    llm = opened(models[model], kv_policy="auto", kv_limit=LIMIT, n_batch=BATCH)
    seen = watch_cells(llm, monkeypatch)
    assert len(answer(llm, LONG[:700], 300)) == 300
    assert max(seen) <= LIMIT + BATCH
    assert max(seen[-299:]) <= LIMIT


def test_the_peak_in_bytes(tmp_path: Path, opened: Open) -> None:
    """30 layers, as the copy that moves cells holds one layer twice; before the first compaction stock's attention reads
    pieces of 256 cells, which the limit and a batch are a multiple of."""
    model = tiny_model.write_llama(tmp_path / "deep.gguf", n_layer=30, head_dim=64)
    stats = opened(model, kv_policy="snapkv")._kv.stats()  # type: ignore[union-attr]
    beside = int(stats.bytes_live) - int(stats.bytes_pool)
    n_bytes = int(stats.bytes_cell) * (512 - BATCH) + beside
    llm = opened(model, kv_policy="snapkv", kv_limit=f"{n_bytes}B", n_batch=BATCH)
    answer(llm, LONG, 50)
    got = llm.kv_stats()
    assert 0.8 * n_bytes < got.bytes_live <= n_bytes
    assert got.bytes_peak <= 1.05 * (n_bytes + BATCH * int(stats.bytes_cell))
    assert got.n_past == len(LONG) + 49


def test_a_prompt_that_fits_is_exact(models: dict[str, Path], opened: Open) -> None:
    stock, llm = (
        opened(models["llama"], flash_attn=True, n_batch=BATCH),
        opened(models["llama"], kv_policy="snapkv", kv_limit=300, n_batch=BATCH),
    )
    assert answer(stock, TOKENS[:200], 20) == answer(llm, TOKENS[:200], 20)
    assert llm.kv_stats().n_compactions == 0


def test_exact_prompts_shrink_afterwards(models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token is that of the full cache."""
    stock, llm = (
        opened(models["llama"], flash_attn=True, n_batch=BATCH),
        opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, kv_prefill="exact", n_batch=BATCH),
    )
    seen = watch_cells(llm, monkeypatch)
    assert answer(stock, LONG[:700], 1) == answer(llm, LONG[:700], 1)
    assert max(seen) == 700
    assert n_held(llm) <= LIMIT
    assert len(answer(llm, LONG[:700], 100)) == 100
    assert n_held(llm) <= LIMIT


def test_a_budget_below_the_limit(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, kv_budget=70, n_batch=BATCH)
    answer(llm, LONG[:700], 1)
    assert n_held(llm) == 70


def test_pieces_stay_within_the_limit(models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    seen = watch_cells(llm, monkeypatch)
    for i in range(0, 700, 100):
        llm.eval(LONG[i : i + 100])
    llm.sample(temp=0.0)
    assert max(seen) <= LIMIT + BATCH
    assert n_held(llm) <= LIMIT
    assert llm.kv_stats().n_past == 700


def test_what_is_asked_chooses(models: dict[str, Path], opened: Open) -> None:
    """Two questions keep other cells of the same document, in all of its parts."""
    kept = []
    for question in (TOKENS[:16], OTHERS[:16]):
        llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
        answer(llm, LONG[:700] + question, 1)
        kept.append(set(llm.kv_positions(0, 0).tolist()))
    early = [{at for at in own if at < 300} for own in kept]
    assert early[0] and early[1] and early[0] != early[1]


def test_one_token_behind_pieces(models: dict[str, Path], opened: Open) -> None:
    """What is asked is a single token then; it ends nothing while it is only observed."""
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    llm.eval(LONG[:190])
    assert len(answer(llm, LONG[:191], 5)) == 5
    assert n_held(llm) <= LIMIT


def test_pieces_may_be_exact(models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, kv_prefill="exact", n_batch=BATCH)
    seen = watch_cells(llm, monkeypatch)
    llm.eval(LONG[:400])
    llm.sample(temp=0.0)
    assert max(seen) == 400
    assert n_held(llm) <= LIMIT


@pytest.mark.parametrize("budget", [120, 0.15])
def test_the_budget_holds_behind_a_bounded_prompt(models: dict[str, Path], opened: Open, budget: float) -> None:
    """Compactions while it was read do not stand for the one at its end."""
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, kv_budget=budget, n_batch=BATCH)
    answer(llm, LONG[:700], 1)
    assert n_held(llm) == (120 if budget == 120 else 105)


def test_nothing_is_compacted_for_nothing(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, kv_budget=70, n_batch=BATCH)
    llm.eval(LONG[:190])
    n = llm.kv_stats().n_compactions
    llm.eval([])
    assert llm.kv_stats().n_compactions == n
    answer(llm, LONG[:190], 1)
    assert n_held(llm) == 70


def test_small_batches_do_not_compact_each(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, n_batch=4)
    answer(llm, LONG[:500], 1)
    assert 0 < llm.kv_stats().n_compactions <= (500 - LIMIT) / 12 + 2


def test_another_policy_has_to_fit(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="streamingllm", kv_limit=20, n_batch=BATCH)
    for other in ("snapkv", "full"):
        with pytest.raises(ValueError, match="kv_limit"):
            llm.kv_policy = other
        assert llm.kv_policy is not None and llm.kv_policy.name == "streamingllm"
    assert len(answer(llm, LONG[:100], 30)) == 30
    assert n_held(llm) <= 20


def test_pins_leave_room(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    with pytest.raises(ValueError, match="kv_limit=160 leaves"):
        llm.kv_pin(0, LIMIT - 32)
    llm.kv_pin(0, 50)
    answer(llm, LONG[:400], 100)
    assert llm.kv_positions(0, 0).tolist()[:50] == list(range(50))
    assert n_held(llm) <= LIMIT


def test_what_fails_while_a_prompt_is_read(models: dict[str, Path], opened: Open, tmp_path: Path) -> None:
    """The session stays usable, can be saved, and knows nothing of what was only observed."""
    llm = opened(models["llama"], kv_policy=Script(action=once(RuntimeError("no"))), kv_limit=LIMIT, n_batch=BATCH)
    with pytest.raises(RuntimeError, match="no"):
        answer(llm, LONG[:400], 1)
    kv = llm._kv
    assert kv is not None and kv.queries(0, 0)[0].max() < llm.n_tokens
    llm.kv_save(tmp_path / "half.session")
    llm.reset()
    llm.kv_load(tmp_path / "half.session")
    assert len(answer(llm, LONG[:400], 20)) == 20
    assert n_held(llm) <= LIMIT


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"kv_limit": "12 apples"}, ValueError, "expected bytes such as 512MiB"),
        ({"kv_limit": "MiB"}, ValueError, "expected bytes"),
        ({"kv_limit": 0.5}, TypeError, "expected a number of cells per head"),
        ({"kv_limit": True}, TypeError, "expected a number of cells"),
        ({"kv_limit": 0}, ValueError, "at least 1"),
        ({"kv_limit": 20}, ValueError, "holds 20 cells per head, expected at least"),
        ({"kv_limit": "1KiB"}, ValueError, "holds 0 cells per head"),
        ({"kv_prefill": "fast", "kv_limit": 512}, ValueError, "expected one of exact, bounded, auto"),
        ({"kv_limit": 512, "kv_policy": None}, ValueError, "without kv_policy"),
        ({"kv_limit": 512, "kv_policy": "full"}, ValueError, "keeps every cell"),
    ],
)
def test_bad_limits_are_refused(
    models: dict[str, Path], opened: Open, given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        opened(models["llama"], **{"kv_policy": "snapkv", **given})
