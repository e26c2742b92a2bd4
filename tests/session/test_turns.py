"""Prompts that follow each other: what is evaluated of them, and when a compaction is due. Counts, no times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from scripted import OTHERS, TOKENS, Script, answer, decode, evaluate, once, positions

from windowkv_edge import Llama, SnapKV

Open = Callable[..., Llama]


def counted(llm: Llama) -> list[int]:
    """Gets the size of every batch that the session decodes from now on."""
    res: list[int] = []
    own = llm._ctx.decode
    llm._ctx.decode = lambda batch: (res.append(batch.n_tokens()), own(batch))[1]  # type: ignore[method-assign]
    return res


def prompts(llm: Llama) -> tuple[int, int, str]:
    own = llm.kv_stats()
    return own.n_evaluated_last, own.n_reused_last, own.miss


#
# when a compaction is due
#


def ask(llm: Llama, n_questions: int, n_tokens: int = 10) -> list[float]:
    """Short questions behind 400 tokens, each behind the answers to those before; the cells held when an answer began."""
    history, held = list(TOKENS), []
    for i in range(n_questions):
        history += OTHERS[i * n_tokens : (i + 1) * n_tokens]
        stream = llm.generate(history, temp=0.0)
        history.append(next(stream))
        held.append(float(llm.kv_stats().cells.mean()))
        history += [next(stream) for _ in range(4)]
        stream.close()
    return held


@pytest.mark.parametrize("budget", [0.2, 80])
def test_thirty_short_questions(tiny: Path, opened: Open, budget: float | int) -> None:
    """No more is evaluated than stock does; a compaction comes when half of the budget came on top, and in between the
    cells only grow."""
    llm, stock = opened(tiny, kv_policy="snapkv", kv_budget=budget), opened(tiny, flash_attn=True)
    held = ask(llm, 30)
    ask(stock, 30)
    own, want = llm.kv_stats(), stock.kv_stats()
    assert (own.n_evaluated, own.n_reused) == (want.n_evaluated, want.n_reused) == (410 + 29 * 11, want.n_reused)
    # a turn is 15 tokens; half of 20 % of 410 positions is 41 cells, and 30 % of what comes is granted
    assert own.n_compactions == (5 if isinstance(budget, float) else 10)
    n_past = [410 + 15 * i for i in range(30)]
    granted = [budget if isinstance(budget, int) else int(budget * n) for n in n_past]
    assert all(now <= 1.5 * most for now, most in zip(held, granted, strict=True))
    fell = [i for i in range(1, 30) if held[i] <= held[i - 1]]
    assert len(fell) == own.n_compactions - 1 and all(held[i] == granted[i] for i in (0, *fell))


def test_every_turn_if_asked_for(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.2, kv_growth=1)
    held = ask(llm, 30)
    assert llm.kv_stats().n_compactions == 30
    assert held == [int(0.2 * (410 + 15 * i)) for i in range(30)]


def test_a_new_document_is_compacted(tiny: Path, opened: Open) -> None:
    """Half as many positions again, though the cells stay below one and a half budgets."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.75)
    first = answer(llm, TOKENS, 2)
    answer(llm, [*TOKENS, *first[:1], *OTHERS[:199]])  # 600 positions
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 500).all()
    answer(llm, [*TOKENS, *first[:1], *OTHERS[:200]])
    assert llm.kv_stats().n_compactions == 2 and (llm.kv_stats().cells == 450).all()


def test_a_changed_budget_is_due(tiny: Path, opened: Open) -> None:
    """At the next prompt, however little it adds; one that is asked again is compacted once."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=100)
    first = answer(llm, TOKENS, 2)
    llm.kv_budget = 90
    answer(llm, [*TOKENS, *first[:1], *OTHERS[:5]])
    assert llm.kv_stats().n_compactions == 2 and (llm.kv_stats().cells == 90).all()
    answer(llm, [*TOKENS, *first[:1], *OTHERS[:10]])
    assert llm.kv_stats().n_compactions == 2 and (llm.kv_stats().cells == 95).all()


def test_a_held_stream_changes_nothing(tiny: Path, opened: Open) -> None:
    """When later prompts are compacted: neither suspended, nor resumed, nor abandoned."""
    found = []
    for hold in (False, True):
        llm = opened(tiny, kv_policy="snapkv", kv_budget=60)
        if hold:
            stream = llm.generate(OTHERS[:300], temp=0.0)
            next(stream)
            llm.reset()
        rows = []
        for part in (TOKENS[:200], TOKENS[200:]):
            llm.eval(part)
            rows.append(llm.kv_stats().cells.tolist())
        token = llm.sample(temp=0.0)
        rows.append(llm.kv_stats().cells.tolist())
        rows.append(answer(llm, [*TOKENS, token, *OTHERS[:5]], 3))
        rows.append(positions(llm))
        if hold:
            stream.close()
        rows.append(answer(llm, OTHERS, 3))
        rows.append(positions(llm))
        found.append(rows)
    assert found[0] == found[1] and found[0][2] == [[60, 60]] * 3

    stream = llm.generate(TOKENS, temp=0.0)
    next(stream)
    llm.reset()
    llm.eval(OTHERS)
    next(stream)  # its token is a single one behind this prompt
    assert (llm.kv_stats().cells == 61).all()


#
# prompts in pieces
#


@pytest.mark.parametrize("end", ["sample", "token", "below", "generate", "kv_compact"])
def test_pieces_are_one_prompt(tiny: Path, opened: Open, end: str) -> None:
    llm, whole = (opened(tiny, kv_policy="snapkv", kv_budget=60, n_batch=100) for _ in range(2))
    evaluate(whole, TOKENS)
    for i in range(0, 400, 100):
        llm.eval(TOKENS[i : i + 100])
        assert llm.kv_stats().n_compactions == 0 and (llm.kv_stats().cells == i + 100).all()
    assert prompts(llm) == (400, 0, "")
    if end == "sample":
        assert llm.sample(temp=0.0) == whole.sample(temp=0.0)
    elif end == "token":
        llm.eval([5])
    elif end == "below":
        decode(llm, [5])
    elif end == "generate":
        assert answer(llm, TOKENS) == [whole.sample(temp=0.0)]
        assert prompts(llm) == (400, 0, "")
    else:
        llm.kv_compact()
    assert llm.kv_stats().n_compactions == 1
    assert [own[:60] for own in positions(llm)] == positions(whole)
    llm.sample(temp=0.0)
    assert llm.kv_stats().n_compactions == 1


@pytest.mark.parametrize("end", ["token", "kv_compact", "limit", "below"])
@pytest.mark.parametrize("policy", ["snapkv", "auto", Script(action=lambda: None)], ids=["snapkv", "auto", "python"])
def test_tokens_that_observed_are_taken_back(tiny: Path, opened: Open, policy: Any, end: str) -> None:
    """All of them: those in front of them observe, once more."""
    llm = opened(tiny, kv_policy=policy, kv_budget=60, n_batch=100)
    llm.eval(TOKENS)
    llm.n_tokens = 150  # of every 100 tokens the last ones observe, and those of the last two batches are held
    if end == "below":  # nothing can be evaluated in there
        assert llm._ctx.kv_cache_seq_rm(-1, 150, -1)
        decode(llm, [5])
        assert (llm.kv_stats().cells == 151).all()
        return
    if end == "token":
        llm.eval([5])
        assert llm.kv_stats().cells.mean() == 61
    elif end == "limit":
        llm.kv_limit = 120
        llm.eval([5])
        assert llm.kv_stats().cells.mean() <= 120
    else:
        llm.kv_compact()
        assert llm.kv_stats().cells.mean() == 60
        llm.eval([5])
    assert llm.n_tokens == llm.kv_stats().n_past == 151
    assert all(149 in own for own in positions(llm))  # the newest ones stay
    answer(llm, [*TOKENS[:150], 5, *OTHERS[:5]], 3)


def test_a_last_batch_of_one_token(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=60, n_batch=133)
    llm.eval(TOKENS)  # 3 x 133 + 1
    assert (llm.kv_stats().cells == 400).all()
    llm.eval(OTHERS[:134])
    assert (llm.kv_stats().cells == 534).all()
    llm.sample(temp=0.0)
    assert (llm.kv_stats().cells == 60).all()


def test_a_failed_selection_at_the_end_of_pieces(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy=Script(action=once(ZeroDivisionError())), kv_budget=60)
    llm.eval(TOKENS)
    with pytest.raises(ZeroDivisionError):
        llm.sample(temp=0.0)
    assert (llm.kv_stats().cells == 400).all()
    llm.sample(temp=0.0)  # the prompt has ended, whole
    llm.eval([5])
    assert (llm.kv_stats().cells == 401).all()
    evaluate(llm, OTHERS[:2])
    assert (llm.kv_stats().cells == 60).all()


#
# the same prompt again, and what continues it
#


@pytest.mark.parametrize("kwargs", [{}, {"logits_all": True}], ids=["last", "all"])
@pytest.mark.parametrize("policy", ["snapkv", "auto"])
def test_the_same_prompt_again(tiny: Path, opened: Open, policy: str, kwargs: Any) -> None:
    """Nothing of it is evaluated, and the answer is the first one."""
    llm = opened(tiny, kv_policy=policy, kv_budget=60, **kwargs)
    first, kept = answer(llm, TOKENS, 40), positions(llm)
    batches = counted(llm)
    for n in (40, 1, 7, 40):
        batches.clear()
        assert answer(llm, TOKENS, n) == first[:n]
        assert batches == [1] * (n - 1) and prompts(llm) == (0, 400, "")
    assert llm.kv_stats().n_compactions == 1 and positions(llm) == kept
    llm.n_tokens = 400  # as some set it back by hand
    assert answer(llm, TOKENS, 40) == first

    batches.clear()
    assert answer(llm, [*TOKENS, *first[:5]], 10) == first[5:15]  # an answer that goes on
    assert batches == [1] * 10 and prompts(llm) == (1, 404, "")
    batches.clear()
    answer(llm, [*TOKENS, *first[:9], *OTHERS[:20]], 3)  # the next turn
    assert batches == [20, 1, 1] and prompts(llm) == (20, 409, "")
    assert answer(llm, TOKENS, 40) == first  # and back
    assert llm.kv_stats().n_compactions == 1


def test_the_same_prompt_at_the_end_of_a_conversation(tiny: Path, opened: Open) -> None:
    """Whether a later prompt is compacted or not."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=60)
    history = [*TOKENS, *answer(llm, TOKENS, 5)]
    batches = counted(llm)
    for n in (10, 30):
        history += OTHERS[:n]
        first = answer(llm, history, 8)
        batches.clear()
        assert answer(llm, history, 8) == first and sum(batches) == 7
        history += first
    assert llm.kv_stats().n_compactions == 2
    assert answer(llm, TOKENS) == history[400:401] and prompts(llm) == (0, 400, "")  # the first one, from a checkpoint


def test_what_cannot_be_reused_is_said(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=60)
    answer(llm, TOKENS, 20)
    assert prompts(llm) == (400, 0, "")

    edited = [*TOKENS[:350], *OTHERS[:60]]
    want = answer(opened(tiny, kv_policy="snapkv", kv_budget=60), edited, 20)
    assert answer(llm, edited, 20) == want
    remedy = 'kv_checkpoints="1MiB" would have kept {} tokens of it'
    why = "the prompt differs at token 350 of 410, and positions below 400 were compacted; "
    assert prompts(llm) == (410, 0, why + remedy.format(350))
    answer(llm, edited[:300])
    why = "the prompt ends at token 300 of 300, and positions below 410 were compacted; "
    assert prompts(llm) == (300, 0, why + remedy.format(299))
    llm.kv_budget = 50
    answer(llm, edited[:300])
    why = "kv_budget or kv_query was changed since the first 300 positions were compacted; "
    assert prompts(llm) == (300, 0, why + remedy.format(299))
    assert (llm.kv_stats().cells == 50).all()
    answer(llm, OTHERS[100:200])  # shares nothing
    assert prompts(llm) == (100, 0, "")
    own = llm.kv_stats()
    assert (own.n_evaluated, own.n_reused) == (400 + 410 + 300 + 300 + 100, 0)
    answer(llm, OTHERS[100:210])
    assert llm.kv_stats().n_reused == 100 and "100 of 110 tokens of the last prompt reused" in str(llm.kv_stats())
    list(zip(range(2), llm.generate(OTHERS[:10], reset=False)))
    assert prompts(llm) == (10, 0, "")
    llm.eval(OTHERS[:7])
    answer(llm, TOKENS[:20])  # not what was evaluated by hand
    assert prompts(llm)[:2] == (20, 0)


def test_pieces_of_another_prompt_do_not_count(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=60)
    answer(llm, TOKENS)
    llm.eval(OTHERS[:50])
    answer(llm, TOKENS)
    assert prompts(llm) == (0, 400, "")


def test_a_refused_piece_is_none(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=60, kv_growth=1)
    answer(llm, TOKENS, 3)
    before = prompts(llm), llm.kv_stats().n_compactions
    with pytest.raises(ValueError, match="expected an id"):
        llm.eval([5, 10**9])
    assert prompts(llm) == before[0]
    llm.eval([5])
    assert llm.kv_stats().n_compactions == before[1]


def test_a_changed_budget_that_was_applied(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=80)
    answer(llm, TOKENS, 3)
    llm.kv_budget = 70
    llm.kv_compact()
    n = llm.kv_stats().n_compactions
    answer(llm, [*llm.input_ids[: llm.n_tokens].tolist(), *OTHERS[:5]])
    assert llm.kv_stats().n_compactions == n


def test_stock_counts_too(tiny: Path, opened: Open) -> None:
    llm = opened(tiny)
    answer(llm, TOKENS, 5)
    answer(llm, TOKENS, 5)
    assert prompts(llm) == (1, 399, "")
    llm.eval(OTHERS[:7])
    llm.eval(OTHERS[:8])
    assert prompts(llm) == (15, 0, "") and llm.kv_stats().n_evaluated == 416


def test_recurrent_layers_read_it_again(tmp_path: Path, opened: Open) -> None:
    llm = opened(tiny_model.write_lfm2(tmp_path / "lfm2.gguf"), kv_policy="snapkv", kv_budget=60, kv_checkpoints=None)
    first = answer(llm, TOKENS, 20)
    assert answer(llm, TOKENS, 20) == first
    why = "the prompt ends at token 400 of 400, and the window or recurrent layers moved on to 419 and cannot go back that far"
    own = prompts(llm)
    assert own[:2] == (400, 0) and own[2].startswith(f"{why}; kv_checkpoints=")


def test_kept_logits_go_with_the_cells(tiny: Path, opened: Open) -> None:
    """Another prompt of as many tokens, and a compaction in which nobody knew the logits."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=60)
    want = [answer(llm, own, 10) for own in (TOKENS, OTHERS)]
    assert [answer(llm, own, 10) for own in (TOKENS, TOKENS, OTHERS, OTHERS)] == [want[0], want[0], want[1], want[1]]
    llm.reset()
    assert answer(llm, OTHERS, 10) == want[1] and prompts(llm) == (400, 0, "")
    llm.kv_policy = SnapKV(window_size=8)
    answer(llm, OTHERS)
    assert prompts(llm) == (400, 0, "")

    llm.reset()
    llm.eval(TOKENS)
    answer(llm, [*TOKENS, *OTHERS[:30]], 20)
    llm.reset()
    llm.kv_budget = 1.0
    first = answer(llm, TOKENS, 20)
    llm.n_tokens = 400
    llm.kv_compact(300)  # the last logits are those of the answer
    assert answer(llm, TOKENS) == first[:1] and prompts(llm) == (0, 400, "")


def test_stock_handlers_render_the_history(session: Open, document: str) -> None:
    """A chat of three turns: every one evaluates what is new, the last one again nothing that stock would not."""
    llm, stock = session(kv_policy="auto", kv_budget=0.25), session(flash_attn=True)
    found = []
    for own in (llm, stock):
        messages: list[Any] = [{"role": "system", "content": "Answer in one sentence."}]
        rows = []
        for question in (document[:1500] + "\n\nWhat is this about?", "Who wrote it?", "When?"):
            messages.append({"role": "user", "content": question})
            for _ in range(2):  # regenerated
                reply: Any = own.create_chat_completion(messages, max_tokens=8, temperature=0.0)
                rows.append((reply["usage"]["prompt_tokens"], *prompts(own)))
                assert rows[-1][0] == rows[-1][1] + rows[-1][2] and rows[-1][3] == ""
            messages.append({"role": "assistant", "content": "It is a handbook."})
        found.append(rows)
    (n_first, *_), (_, again, *_), *later = found[0]
    assert n_first > 300 and again == 0 and llm.kv_stats().n_compactions == 1
    stocks = [row[1] for row in found[1][2:]]
    assert [row[1] for row in later] == [stocks[0], 0, stocks[2], 0] and max(row[1] for row in later) < 40


@pytest.mark.parametrize("bad", [0.99, float("nan"), float("inf"), True, "2", None])
def test_growth_that_is_none(tiny: Path, opened: Open, bad: Any) -> None:
    with pytest.raises(ValueError, match="kv_growth is .*, expected a finite number of at least 1"):
        opened(tiny, kv_policy="snapkv", kv_growth=bad)
    assert opened(tiny, kv_policy="snapkv", kv_growth=np.float32(2))._kv_when.growth == 2.0
