"""windowkv-edge eval: branches are fresh runs, and prompts hold what they ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_model

from windowkv_edge import AdaKV, Auto, KVPolicy, Llama, SnapKV, WindowKV
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import (
    Branches,
    Case,
    EvalError,
    Style,
    conversations,
    hay_tokens,
    needle_cases,
    prose,
    ruler_cases,
    turns_cases,
)
from windowkv_edge.eval import needle as needles
from windowkv_edge.eval import ruler as rulers
from windowkv_edge.eval.metrics import score


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    res = Model(smollm2)
    yield res
    res.close()


#
# branches
#


def fresh(llm: Llama, prompt: list[int], follow: list[int], budget: int) -> np.ndarray:
    """Logits of a session of its own after every token, the first one of the full cache."""

    def logits() -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()

    llm.kv_budget = 10_000
    llm.eval(prompt)
    rows = [logits()]
    llm.kv_compact(budget)
    for token in follow:
        llm.eval([token])
        rows.append(logits())
    return np.array(rows)


@pytest.mark.parametrize("cells", ["f16", "q8_0"])
@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_branches_are_fresh_runs(
    request: pytest.FixtureRequest, which: str, cells: str, document: str, opened: Callable[..., Llama]
) -> None:
    """Bit for bit, in any order, again after another prompt, with more queries observed than a policy asks for, and for models
    whose other layers keep a window, in f16 whatever cells the policy prefers."""
    path = request.getfixturevalue(which)
    model = Model(path)
    policies: list[KVPolicy] = [WindowKV(), AdaKV(window_size=16)] if cells == "f16" else [Auto(), Auto(token_window_size=20)]
    own = Branches(model, 700, 48, cells)
    assert own.cells == cells
    tokens = model.tokenize(document)
    prompts = tokens[:600], [*tokens[:570], *tokens[2000:2080]]  # they share a whole batch of 512
    try:
        branched: dict[tuple[int, int], np.ndarray] = {}
        for i in (0, 1, 0):
            own.prefill(prompts[i])
            for j in (1, 0):
                own.compact(policies[j], 90)
                rows = [own.first]
                for token in tokens[3000:3006]:
                    own.session.decode([token])
                    rows.append(own.session.logits())
                assert np.array_equal(branched.setdefault((i, j), np.array(rows)), np.array(rows))
        for j, policy in enumerate(policies):
            llm = opened(path, kv_policy=policy, n_ctx=700)
            for i in (0, 1):
                llm.reset()
                want = fresh(llm, prompts[i], tokens[3000:3006], 90)
                assert np.array_equal(branched[i, j], want), (policy.name, i)
    finally:
        own.close()
        model.close()


@pytest.mark.parametrize("kind", ["write_llama", "write_lfm2", "write_granite_hybrid", "write_gpt_oss"])
def test_branches_of_hybrid_models(tmp_path: Path, kind: str, opened: Callable[..., Llama]) -> None:
    """The recurrent state goes back as well, to what a fresh session has."""
    path = getattr(tiny_model, kind)(tmp_path / "model.gguf")
    model = Model(path)
    own = Branches(model, 400, 8)
    tokens = np.random.default_rng(5).integers(0, tiny_model.N_VOCAB, 330).tolist()
    try:
        own.prefill(tokens[:300])
        found = []
        for _ in range(3):
            own.compact(SnapKV(window_size=8), 40)
            rows = []
            for token in tokens[300:]:
                own.session.decode([token])
                rows.append(own.session.logits())
            found.append(np.array(rows))
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
        llm = opened(path, kv_policy=SnapKV(window_size=8), n_ctx=400)
        assert np.array_equal(fresh(llm, tokens[:300], tokens[300:], 40)[1:], found[0])
    finally:
        own.close()
        model.close()


def test_neighbours_share_their_prefill(model: Model, document: str) -> None:
    own = Branches(model, 1700, 32)
    tokens = model.tokenize(document)
    try:
        own.prefill(tokens[:1600])
        own.prefill([*tokens[:1500], *tokens[2000:2100]])
        assert own.n_evaluated == 1600 + 1600 - 1024  # whole batches of 512
        own.prefill(own.prompt)
        assert own.n_evaluated == 1600 + 1600 - 1024
    finally:
        own.close()


#
# texts and prompts
#


def test_prose_does_not_repeat_itself() -> None:
    text = prose(200_000, seed=1)
    assert text == prose(200_000, seed=1) != prose(200_000, seed=2)
    paragraphs = text.split("\n")
    assert len(set(paragraphs)) == len(paragraphs)
    sentences = re.split(r"(?<=[.])\s", text.replace("\n", " "))
    assert len(set(sentences)) > 0.9 * len(sentences)
    assert not re.search(r"[0-9{}?]|secret|number", text)


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles(model: Model, kind: str) -> None:
    """The answer stands in the text and not in the question, every fact once, different ones by index and seed."""
    made = [needles.make_needle(kind, i, seed) for seed in (0, 1) for i in range(8)]
    assert kind != "word" or all(" " in needle.answers[0] for needle in made)  # the first token is the full cache's
    assert len({needle.sentences for needle in made}) >= 14
    for needle in made:
        for answer in needle.answers:
            assert any(answer in sentence for sentence in needle.sentences)
            assert answer not in needle.question and answer not in needle.lead
    hay = hay_tokens(model, None, 1000, 0)
    style = Style(model)
    for case in needle_cases(style, hay, [1000], [0.1, 0.9], [kind], 2, 0):
        text = model.detokenize(case.prompt)
        needle = needles.make_needle(kind, case.index, 0)
        assert all(text.count(f"\n{sentence}\n") == 1 for sentence in needle.sentences)
        assert text.endswith(f"\n\nQuestion: {needle.question}\nAnswer: {needle.lead}")
        at = len(model.tokenize(text[: text.index(needle.sentences[0])]))
        assert case.depth is not None and abs(at - 1000 * case.depth) < 80


@pytest.mark.parametrize("task", rulers.TASKS)
def test_ruler(model: Model, task: str) -> None:
    """Prompts fill their length and no more, and hold what they ask for."""
    hay = hay_tokens(model, None, 2048, 0)
    cases = list(ruler_cases(Style(model), hay, [1024, 2048], [task], 3, 0))
    again = list(ruler_cases(Style(model), hay, [1024, 2048], [task], 3, 0))
    assert [case.prompt for case in cases] == [case.prompt for case in again]
    assert len({tuple(case.prompt) for case in cases}) == 6
    for case in cases:
        assert 0.9 * case.length <= len(case.prompt) <= case.length
        text = model.detokenize(case.prompt)
        for answer in case.answers:
            assert answer in text
    if task == "cwe":
        words = re.findall(r"\d+\. ([\w -]+?)(?= \d+\.|\n)", model.detokenize(cases[-1].prompt))
        counts = {word: words.count(word) for word in words}
        best = sorted(counts, key=lambda word: -counts[word])[:3]
        assert sorted(best) == sorted(cases[-1].answers)
    if task == "fwe":
        words = re.findall(r"[a-z]{6}", model.detokenize(cases[-1].prompt).split("words.\n")[1].split("\n\nQ")[0])
        counts = {word: words.count(word) for word in words}
        assert set(sorted(counts, key=lambda word: -counts[word])[:2]) == set(cases[-1].answers)
    if task == "vt":
        values = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", model.detokenize(cases[0].prompt)))
        asked = re.search(r"hold the value (\d+)\?", model.detokenize(cases[0].prompt))
        for name in cases[0].answers:
            while name in values:
                name = values[name]
            assert asked is not None and name == asked[1]


def test_turns(model: Model) -> None:
    hay = hay_tokens(model, None, 1000, 0)
    cases = list(turns_cases(Style(model), hay, [1000], 2, 4, 0))
    assert [case.task for case in cases] == (["first"] + ["later"] * 3 + ["before"] * 4) * 2
    assert len({tuple(case.prompt) for case in cases}) == 4
    text = model.detokenize(cases[0].prompt)
    for case in cases[1:4]:
        assert all(answer in text for answer in case.answers)
        assert model.detokenize(case.follow_up).startswith(f" {cases[0].answers[0]}.\n\nQuestion: ")
    for case, other in zip(cases[4:8], cases[:4], strict=True):
        assert case.answers == other.answers and case.depth == other.depth
        assert cases[0].prompt[: len(case.prompt)] == case.prompt and "Question" not in model.detokenize(case.prompt)
        assert model.detokenize(case.follow_up).startswith("\n\nQuestion: ")
    assert [*cases[4].prompt, *cases[4].follow_up] == cases[0].prompt
    assert len({case.key for case in cases}) == len(cases)


@pytest.mark.parametrize("chat", [False, True])
def test_conversations(model: Model, chat: bool) -> None:
    """Whatever is asked was told or pasted before, and nothing twice."""
    hay, style = hay_tokens(model, None, 400, 0), Style(model, chat)
    own = list(conversations(style, hay, 20, 2, 100, 0)) + list(conversations(style, hay, 4, 1, 100, 0))
    for talk, n_asked in zip(own, (13, 13, 2), strict=True):
        assert len(talk.questions) == n_asked and 0 not in talk.questions
        assert len({talk.turns[at].tokens[-12:].__repr__() for at in talk.questions}) == n_asked
        said = [model.detokenize(list(turn.tokens)) for turn in talk.turns]
        for at in talk.questions:
            turn = talk.turns[at]
            since = said[at - turn.ago]
            assert all(answer in since for answer in turn.answers), (since, turn.answers)
            assert since.count("Please read this." if turn.task == "pasted" else "Please remember this:") == 1
            assert 0 < talk.depth(at) <= 1 and turn.ago / len(talk.turns) <= talk.depth(at)
    assert {own[0].turns[at].task for at in own[0].questions} == {"told", "pasted"}
    assert own[0].turns != own[1].turns
    with pytest.raises(EvalError, match="a conversation of 3 turns, expected 4 to 64"):
        next(conversations(style, hay, 3, 1, 100, 0))


def test_chat_template(model: Model, gemma3: Path) -> None:
    style = Style(model, chat=True)
    text = "".join(model.piece(token) for token in [*style.head, *style.tokenize("A text."), *style.ask("Why?", "Because")])
    assert re.fullmatch(
        r"(<\|im_start\|>system\n.*<\|im_end\|>\n)?<\|im_start\|>user\nA text\.\n\nWhy\?<\|im_end\|>\n<\|im_start\|>assistant\nBecause",
        text, re.S,
    ), text  # fmt: skip
    again = "".join(model.piece(token) for token in style.ask_again("When?", "At"))
    assert re.fullmatch(r"<\|im_end\|>\n<\|im_start\|>user\nWhen\?<\|im_end\|>\n<\|im_start\|>assistant\nAt", again), again
    gemma = Model(gemma3)
    assert Style(gemma).head == [llama_cpp.llama_vocab_bos(gemma.vocab)]
    assert Style(model).head == []
    gemma.close()


@pytest.mark.parametrize(
    ("metric", "output", "answers", "classes", "want"),
    [
        ("contains_all", " Bluebird and 12", ("bluebird", "12"), (), 1.0),
        ("contains_all", " Bluebird", ("bluebird", "12"), (), 0.0),
        ("contains_share", "12, 34", ("12", "34", "56", "78"), (), 0.5),
        ("f1", "The cat sat.", ("a cat sat down",), (), 0.8),
        ("f1", "none", ("a cat", "None!"), (), 1.0),
        ("f1", "dog", ("cat",), (), 0.0),
        ("rouge_l", "the cat sat", ("the cat sat",), (), 1.0),
        ("rouge_l", "a b c d", ("a x c y",), (), 0.5),
        ("accuracy", "It is about Food.", ("Food",), ("Food", "Animal"), 1.0),
        ("accuracy", "Food or Animal", ("Food",), ("Food", "Animal"), 0.5),
        ("accuracy", "Other location", ("Other location",), ("Other location", "location"), 1.0),
        ("number", "Paragraph 3", ("Paragraph 3",), (), 1.0),
        ("number", "3 or 4", ("3",), (), 0.5),
        ("edit", "\nreturn x\nfoo()", ("return x",), (), 1.0),
        ("edit", "# why\nabcd", ("abxd",), (), 0.75),
    ],
)
def test_metrics(metric: str, output: str, answers: tuple[str, ...], classes: tuple[str, ...], want: float) -> None:
    assert score(metric, output, answers, classes) == pytest.approx(want)


def test_keys_are_one_per_prompt(model: Model) -> None:
    hay = hay_tokens(model, None, 600, 0)
    style = Style(model)
    made: list[Case] = [
        *needle_cases(style, hay, [500, 600], [0.1, 0.5], needles.KINDS, 2, 0),
        *ruler_cases(style, hay, [512], list(rulers.TASKS), 2, 0),
        *turns_cases(style, hay, [500, 600], 2, 3, 0),
    ]
    keys = [case.key for case in made]
    keys += [talk.key(at) for talk in conversations(style, hay, 20, 3, 100, 0) for at in talk.questions]
    assert len(set(keys)) == len(keys)
