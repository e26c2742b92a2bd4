"""Policies that select in Python: equal to their native twins, no copies, errors at the call, entry points."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_model
from reference.keydiff import keydiff
from scripted import OTHERS, evaluate, positions

from windowkv_edge import CacheView, ExpectedAttention, KVPolicy, Llama, NativeError, SnapKV, WindowKV, WindowKVError, get_policy
from windowkv_edge.bench.session import Model
from windowkv_edge.compaction import compact
from windowkv_edge.eval import Branches
from windowkv_edge.policies import POLICIES, policy_names

TOKENS = np.random.default_rng(3).integers(0, tiny_model.N_VOCAB, 400).tolist()


@dataclass(frozen=True, kw_only=True)
class SnapKVTwin(KVPolicy):
    """SnapKV once more, in NumPy."""

    window_size: int = 32
    kernel_size: int = 7

    name: ClassVar[str] = "snapkv-twin"

    @property
    def n_observed(self) -> int:
        return self.window_size

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        return [[self.best(s, p, budget) for s, p in zip(*layer)] for layer in zip(scores, ctx.positions)]

    def best(self, score: np.ndarray, positions: np.ndarray, budget: int) -> np.ndarray:
        recent = min(self.window_size, budget)
        review = score[: len(score) - self.window_size]
        half = self.kernel_size // 2
        padded = np.pad(review, half, constant_values=-np.inf)
        pooled = np.lib.stride_tricks.sliding_window_view(padded, self.kernel_size).max(axis=1)
        rest = budget - recent
        top = np.argsort(-pooled, kind="stable")[:rest] if rest else []
        return np.concatenate([positions[np.sort(top).astype(int)], positions[len(score) - recent :]])


@dataclass(frozen=True, kw_only=True)
class Script(KVPolicy):
    """Answers what a test says."""

    answer: Callable[..., Any]
    ragged: bool = True

    name: ClassVar[str] = "script"

    @property
    def n_observed(self) -> int:
        return 8

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        return self.answer(scores, budget, ctx)


def last(scores: Any, budget: int, ctx: CacheView) -> Any:
    return [[own[-budget:] for own in layer] for layer in ctx.positions]


@pytest.mark.parametrize("budget", [20, 40, 100, 250])
def test_the_twin_keeps_the_same_cells(smollm2: Path, document: str, budget: int) -> None:
    """Cell by cell over 30 layers of 3 heads, at the first and at a second compaction."""
    model = Model(smollm2)
    own = Branches(model, 1024, 32)
    try:
        own.prefill(model.tokenize(document)[:700])
        kept = []
        for policy in (SnapKV(), SnapKVTwin()):
            own.compact(policy, budget)
            first = [own.kv.positions(il, ih).tolist() for il in range(30) for ih in range(3)]
            own.extend(own.prompt[100:150])
            compact(own.kv, own.bind(policy), budget // 2 + 5)
            kept.append((first, [own.kv.positions(il, ih).tolist() for il in range(30) for ih in range(3)]))
        assert kept[0] == kept[1]
        assert all(len(positions) == budget for positions in kept[0][0])
    finally:
        own.close()
        model.close()


def test_what_a_policy_sees(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Arrays of native memory, and keys, values and queries whose attention the scores are."""
    seen: dict[str, Any] = {}

    def answer(scores: Any, budget: int, ctx: CacheView) -> Any:
        score, positions = scores[1][1], ctx.positions[1][1]
        assert not score.flags.owndata and not positions.flags.owndata
        assert score.base is not None and score.dtype == np.float32 and positions.dtype == np.int32
        keys, values = ctx.keys(1, 1), ctx.values(1, 1)
        assert keys.shape == values.shape == (len(positions), 32)
        weights = []
        for head in (2, 3):
            at, rows = ctx.queries(1, head)
            logits = rows @ keys.T / np.sqrt(32)
            logits = np.where(positions[None] <= at[:, None], logits, -np.inf)
            part = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights.append(part / part.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(np.mean(weights, axis=(0, 1)), score, atol=2e-3)
        seen.update(n=ctx.n_past, budget=budget, shape=(ctx.n_layer, ctx.n_head_kv, ctx.n_gqa), types=ctx.cell_types)
        return last(scores, budget, ctx)

    llm = opened(tiny, kv_policy=Script(answer=answer), kv_budget=0.25)
    evaluate(llm, TOKENS)
    assert seen == {"n": 400, "budget": 100, "shape": (3, 2, 2), "types": ("f16", "f16")}
    assert llm.kv_positions(2, 1).tolist() == list(range(300, 400))


def test_a_window_of_its_own(smollm2: Path, document: str) -> None:
    """With more queries observed than the policy asks for."""
    model = Model(smollm2)
    own = Branches(model, 700, 64)

    def answer(scores: Any, budget: int, ctx: CacheView) -> Any:
        at, rows = ctx.queries(3, 4)
        assert at.tolist() == list(range(592, 600)) and rows.shape == (8, 64)
        assert not scores[0][0].flags.writeable and not ctx.positions[0][0].flags.writeable
        return last(scores, budget, ctx)

    own.prefill(model.tokenize(document)[:600])
    own.compact(Script(answer=answer), 50)
    own.close()
    model.close()


def test_heads_of_different_lengths(tiny: Path, opened: Callable[..., Llama]) -> None:
    def answer(scores: Any, budget: int, ctx: CacheView) -> Any:
        return [[layer[0][-budget - 20 :], layer[1][20 - budget :]] for layer in ctx.positions]

    llm = opened(tiny, kv_policy=Script(answer=answer), kv_budget=60)
    evaluate(llm, TOKENS)
    assert llm.kv_stats().cells.tolist() == [[80, 40]] * 3


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda s, b, c: 1 / 0, ZeroDivisionError, "division"),
        (lambda s, b, c: (_ for _ in ()).throw(KeyboardInterrupt), KeyboardInterrupt, None),
        (lambda s, b, c: None, TypeError, r"Script.select\(\) returned NoneType, expected positions"),
        (lambda s, b, c: last(s, b, c)[1:], ValueError, "returned 2 layers of 2 kv heads, expected 3 of 2"),
        (lambda s, b, c: [[own[:5] * 1.0 for own in layer] for layer in c.positions], TypeError, "integer positions"),
        (lambda s, b, c: [[own[:5] + 1000 for own in layer] for layer in c.positions], ValueError, "not hold the position 1000"),
        (lambda s, b, c: [[own[: 5 + h] for h, own in enumerate(layer)] for layer in c.positions], ValueError, "set ragged = True"),
        (lambda s, b, c: c.positions, NativeError, "keeps 2400 cells over all heads, expected at most 360"),
        (lambda s, b, c: [[own[:0] for own in layer] for layer in c.positions], NativeError, "no cell of layer 0, kv head 0"),
    ],
)  # fmt: skip
def test_errors_surface_and_nothing_is_evicted(
    tiny: Path, opened: Callable[..., Llama], answer: Callable[..., Any], error: type[BaseException], message: str | None
) -> None:
    """At the call that compacted; the session goes on, and compacts with a policy that works."""
    llm = opened(tiny, kv_policy=Script(answer=answer, ragged=False), kv_budget=60)
    with pytest.raises(error, match=message) as caught:
        evaluate(llm, TOKENS)
    # a debugger must not look at native memory that is gone
    frames = [entry.frame for entry in caught.traceback if entry.frame.code.name in ("choose", "select", "_mark")]
    assert all(not isinstance(value, np.ndarray | list) for frame in frames for value in frame.f_locals.values())
    assert (llm.kv_stats().cells == 400).all()
    assert llm.kv_stats().n_compactions == 0
    llm.eval(TOKENS[:1])
    assert (llm.kv_stats().cells == 401).all()
    llm.kv_policy = Script(answer=last)
    evaluate(llm, TOKENS)
    assert (llm.kv_stats().cells == 60).all()


def test_nothing_to_evict_asks_nobody(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=Script(answer=lambda *_: 1 / 0), kv_budget=500)
    evaluate(llm, TOKENS)
    llm.kv_compact(400)
    assert (llm.kv_stats().cells == 400).all()


def test_one_of_the_two_ways() -> None:
    """A policy that selects in Python has no native fields; one with neither is refused before anything is loaded."""
    with pytest.raises(NotImplementedError, match="Script selects in Python"):
        Script(answer=last).parts()

    class Nothing(KVPolicy):
        name = "nothing"
        n_observed = 4

    with pytest.raises(TypeError, match="Nothing defines neither select"):
        get_policy(Nothing())


def test_the_example_of_the_readme(smollm2: Path, document: str, opened: Callable[..., Llama]) -> None:
    text = (Path(__file__).parents[2] / "windowkv_edge" / "policies" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from dataclasses .*?)```", text, re.S)
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code[: code.index("llm = ")], "README.md", "exec", dont_inherit=True), scope)
    llm = opened(smollm2, kv_policy=scope["ByValue"](), kv_budget=0.12)
    evaluate(llm, llm.tokenize(document.encode())[:600])
    assert (llm.kv_stats().cells == 72).all()
    kept = llm.kv_positions(11, 1).tolist()
    assert kept[:4] == [0, 1, 2, 3] and kept[-1] == 599


def test_expected_attention(smollm2: Path, gemma3: Path, document: str) -> None:
    """Sinks and the last token stay, and rotations are refused."""
    model = Model(smollm2)
    policy = ExpectedAttention(n_observed=128)
    for cells in ("f16", "q8_0"):
        own = Branches(model, 700, policy.n_observed, cells)
        own.prefill(model.tokenize(document)[:600])
        if cells == "q8_0":
            with pytest.raises(ValueError, match="needs cells that are not rotated"):
                own.compact(policy, 60)
        else:
            own.compact(policy, 60)
            assert own.bind(policy) == ExpectedAttention(n_observed=128, freq_base=100000.0, neox=False)
            assert (own.kv.cells() == 60).all()
            kept = own.kv.positions(7, 2).tolist()
            assert kept[:4] == [0, 1, 2, 3] and kept[-1] == 599
        own.close()
    model.close()
    other = Model(gemma3)
    with pytest.raises(WindowKVError, match="not for 'gemma3'; give neox=True"):
        Branches(other, 600, policy.n_observed).bind(policy)
    other.close()


@pytest.mark.parametrize("cells", [1, 8, 2])
def test_keydiff(tiny: Path, opened: Callable[..., Llama], cells: int) -> None:
    """The keys that are least alike their mean stay, by the definition; again among those that stayed."""
    llm = opened(tiny, kv_policy="keydiff", kv_budget=1.0, type_k=cells, type_v=cells)
    assert llm._kv is not None
    for tokens, n_cells in ((TOKENS[:120], 40), (OTHERS[:50], 60)):
        llm.eval(tokens)
        want = []
        for il, ih in np.ndindex(3, 2):
            stays = keydiff(llm._kv.rows(il, ih, "k"), n_cells)
            want.append(llm.kv_positions(il, ih)[stays].tolist())
        llm.kv_compact(n_cells)
        assert positions(llm) == want


def test_the_weights_of_expected_attention() -> None:
    """Queries that are all alike are expected again: softmax of their products, turned on to where they are asked."""
    policy = ExpectedAttention(n_future=1)
    rng = np.random.default_rng(2)
    keys, query = rng.normal(size=(9, 32)), rng.normal(size=32)

    def weights(rows: np.ndarray) -> np.ndarray:
        logits = keys @ rows / np.sqrt(32)
        return np.exp(logits) / np.exp(logits).sum()

    at = np.array([70, 70], dtype=np.int32)
    alike = np.stack([query, query]).astype(np.float32)
    np.testing.assert_allclose(policy._expected(keys, at, alike, 70), weights(query), rtol=1e-4)
    # 10 positions on, llama.cpp turns neighbours by 10 * base^(-2i/d): x' = x cos - y sin, y' = x sin + y cos
    angle = 10 * 10000.0 ** (-2 * np.arange(16) / 32)
    turned = query.copy()
    turned[0::2] = query[0::2] * np.cos(angle) - query[1::2] * np.sin(angle)
    turned[1::2] = query[0::2] * np.sin(angle) + query[1::2] * np.cos(angle)
    np.testing.assert_allclose(policy._expected(keys, at, alike, 80), weights(turned), rtol=1e-4)


@pytest.mark.parametrize("neox", [False, True])
def test_rotations_of_expected_attention(neox: bool) -> None:
    """Turned forth and back a row is itself; the mean rotation of one position is that position's."""
    policy = ExpectedAttention(neox=neox)
    rows = np.random.default_rng(0).normal(size=(5, 32))
    at = np.array([0.0, 3, 70, 700, 5000])
    np.testing.assert_allclose(policy._turn(policy._turn(rows, at), -at), rows, atol=1e-9)
    np.testing.assert_allclose(policy._mean_rotation(32, at[3:4]) @ rows[0], policy._turn(rows[:1], at[3:4])[0], atol=1e-9)


#
# names, parameters, entry points
#


def test_the_paper_by_name() -> None:
    for task in ("localization", "aggregation"):
        assert get_policy("windowkv-paper").parts(task) == WindowKV.published("llama3-8b", accounting="native").parts(task)


def test_names_with_parameters() -> None:
    assert get_policy("snapkv(window_size=16, kernel_size=5)") == SnapKV(window_size=16, kernel_size=5)
    assert get_policy("snapkv()") == SnapKV()
    for text, message in (
        ("snapkv(window_size=16", "expected parameters such as"),
        ("snapkv(16)", "expected parameters such as"),
        ("snapkv(window_size=open('x'))", "expected parameters such as"),
        ("snapkv(kernel_size=5)(window_size=4)", "expected parameters such as"),
        ("windowkv(recent_share='a')", "recent_share"),
        ("snapkv(beta=2)", "snapkv takes the parameters window_size, kernel_size"),
        ("snapkv(kernel_size=2)", "kernel_size is 2, expected an odd number"),
        ("snap", "expected one of auto, full"),
    ):
        with pytest.raises(ValueError, match=message):
            get_policy(text)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with entry points."""
    info = tmp_path / "other_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[windowkv_edge.policies]\nlast = other_policies:Last\nbroken = other_policies:Missing\nodd = other_policies:np\n"
    )
    (tmp_path / "other_policies.py").write_text(
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "from windowkv_edge import KVPolicy\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Last(KVPolicy):\n"
        "    window_size: int = 4\n"
        "    name = 'last'\n"
        "    @property\n"
        "    def n_observed(self): return self.window_size\n"
        "    def select(self, scores, budget, ctx):\n"
        "        return [[own[-budget:] for own in layer] for layer in ctx.positions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("other_policies", None)


def test_packages_bring_policies(package: Path, tiny: Path, opened: Callable[..., Llama]) -> None:
    assert policy_names() == [*POLICIES, "broken", "last", "odd"]
    llm = opened(tiny, kv_policy="last(window_size=6)", kv_budget=50)
    assert llm.kv_policy is not None and llm.kv_policy.n_observed == 6
    evaluate(llm, TOKENS)
    assert llm.kv_positions(0, 0).tolist() == list(range(350, 400))
    with pytest.raises(ValueError, match="'broken' .* cannot be loaded: .*; repair or remove"):
        get_policy("broken")
    with pytest.raises(ValueError, match="'odd' .* expected a subclass of KVPolicy"):
        get_policy("odd")
