"""windowkv-edge bench: shapes, filled caches, the gate, rows, JSON and the picture."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gguf
import llama_cpp
import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from windowkv_edge import POLICIES, AdaKV, Full, HeadKV, Llama, NativeError, WindowKV, WindowKVError, _native
from windowkv_edge.bench import SHAPES, Bench, GateError, Plan, Row, Shape, plot, run
from windowkv_edge.bench.distributions import divergence, log_softmax
from windowkv_edge.bench.session import TYPES, Model, Session
from windowkv_edge.bench.shapes import fetch_shape, write_shape
from windowkv_edge.cli import app
from windowkv_edge.gguf_info import read_info
from windowkv_edge.replay import N_ROOM

SMALL = Shape("small", 3, 256, 512, 8, 2, 32, 300)
CELL = 2 * 2 * 32  # bytes of K and V of one head, f16
SIZES = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] for name in TYPES}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shape") / "small.gguf"
    write_shape(SMALL, path)
    return path


@pytest.fixture
def model(small: Path) -> Iterator[Model]:
    res = Model(small)
    yield res
    res.close()


def bench(model: Model, **kwargs: object) -> Bench:
    plan = {"lengths": (600,), "policies": {"windowkv": WindowKV()}, "budgets": (0.12,), "rounds": 4, "fill": True}
    return Bench(model, read_info(model.path), Plan(**{**plan, **kwargs}), is_random=True)


def test_shapes_are_those_of_the_models() -> None:
    """Weights of Llama 3.2 1B and 3.1 8B: 1.24 and 8.03 billion, norms left out."""
    weights = {name: sum(math.prod(size) for size in shape.matrices().values()) for name, shape in SHAPES.items()}
    assert weights["llama-1b"] / 1e9 == pytest.approx(1.236, abs=0.001)
    assert weights["llama-8b"] / 1e9 == pytest.approx(8.030, abs=0.001)


def test_the_file_of_a_shape(small: Path) -> None:
    info = read_info(small)
    assert (info.n_layer, info.n_head[0], info.n_head_kv[0], info.head_dim_k) == (3, 8, 2, 32)
    assert info.file_type == "Q4_0"
    assert SMALL.n_bytes < info.file_size < SMALL.n_bytes + 64_000
    llm = Llama(str(small), n_ctx=64, verbose=False)
    llm.eval(list(range(40)))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(300,))
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    llm.close()


def test_a_shape_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINDOWKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(SHAPES, "small", SMALL)
    path = fetch_shape("small")
    before = path.stat().st_mtime_ns
    assert fetch_shape("small").stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]

    path.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WindowKVError, match="free some space"):
        fetch_shape("small")
    assert [p.suffix for p in path.parent.iterdir()] == [".lock"]


#
# filled caches
#


@pytest.mark.parametrize("policy", [None, WindowKV(), HeadKV()])
@pytest.mark.parametrize("cells", list(TYPES))
def test_a_filled_cache(model: Model, policy: WindowKV | None, cells: str) -> None:
    """Positions, bytes and rows as after a prompt; it goes on from there."""
    own = bench(model, policies={"own": policy} if policy else {}).policies.get("own")
    session = Session(model, 1024, cells, own, True, 2, 512)
    session.fill(700)
    stats = session.kv.stats()
    assert stats.n_past == 700
    if own is not None:
        assert (session.kv.cells() == 700).all()
        assert session.kv.positions(1, 1).tolist() == list(range(700))
        assert len(session.kv.queries(0, 0)[0]) == own.n_observed
        for which in "kv":
            rows = session.kv.rows(2, 1, which)
            assert rows.shape == (700, 32)
            assert np.isfinite(rows).all() and rows.std() == pytest.approx(1, abs=0.1)
        session.compact(0.1)
        assert session.kv.cells().sum() == 70 * 3 * 2
    session.decode([5, 6, 7])
    assert session.kv.stats().n_past == 703
    assert np.isfinite(session.logits()).all()
    session.close()


@pytest.mark.parametrize("name", [name for name, cls in POLICIES.items() if name != "full" and not cls().in_python])
def test_a_compaction_takes_less_than_5_bytes_a_cell(name: str, tmp_path: Path) -> None:
    """Beside the cache as it was; the pools of a layer's cells that stay are part of it. All that select in C++. A policy
    that sums attention up has 4 bytes a cell for that alone, which it keeps; so has one that goes by what is repeated, and as
    many for the scores of all heads, which compete."""
    write_shape(Shape("heads", 16, 1024, 64, 32, 8, 32, 320), path := tmp_path / "heads.gguf")
    model = Model(path)
    cells = POLICIES[name].cells or "f16"
    own = bench(model, policies={"own": POLICIES[name]()}).policies["own"]
    n_more = N_ROOM if own.replays else 0
    session = Session(model, 8193 + n_more, cells, own, True, 2, 512)
    session.kv.reserve(8192 + n_more)  # those who repeat come into rows that are there
    session.fill(8192)
    before, n_cells = session.kv.stats().bytes_live, int(session.kv.cells().sum())
    assert n_cells == 8192 * 16 * 8
    session.compact(0.12)
    n_most = 9 if own.replays else 6 if own.accumulates else 5
    # random cells that repeat token 0 are alike, so that some layers keep nearly all of theirs, in their new pools
    n_layer = int(session.kv.cells().sum(axis=1).max()) * int(session.kv.stats().bytes_cell) // (16 * 8) if own.replays else 0
    assert 0 < session.kv.stats().bytes_peak - before < n_most * n_cells + n_layer
    session.close()
    model.close()


def test_a_filled_cache_reads_as_an_evaluated_one(model: Model) -> None:
    """The cells that stock and we attend to after a fill are the same in number: a token sees all of them."""
    session = Session(model, 1024, "f16", Full(), True, 2, 512)
    session.fill(700)
    session.decode([5])
    weights = session.kv.attention(0)[0]
    assert weights.shape == (4, 701)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-3)
    session.close()


def test_filling_window_layers(gemma3: Path) -> None:
    weights = Model(gemma3)
    for policy in (None, WindowKV()):
        session = Session(weights, 2048, "f16", policy, True, 2, 512)
        session.fill(1500)
        assert session.kv.stats().n_past == 1500
        session.decode([5, 6])
        assert np.isfinite(session.logits()).all()
        session.close()
    weights.close()


def test_what_cannot_be_filled(model: Model) -> None:
    session = Session(model, 512, "f16", WindowKV(), True, 2, 512)
    with pytest.raises(NativeError, match="n_tokens is 513, expected 1 to 512"):
        session.fill(513)
    with pytest.raises(NativeError, match="n_tokens is 0"):
        session.fill(0)
    session.fill(10)
    with pytest.raises(NativeError, match="holds 10 positions, expected an empty one"):
        session.fill(10)
    session.close()
    assert _native.lib.wkv_fill(_native.ffi.NULL, 4) < 0


#
# rows
#


def test_rows(model: Model) -> None:
    """Every session with its cells and bytes, those of the quantised ones smaller by their bits."""
    types = ("f16", "q8_0")
    policies = {"windowkv": WindowKV(), "headkv": HeadKV(), "adakv": AdaKV(), "full": Full()}
    own = bench(model, policies=policies, budgets=(0.12, 200), types=types, references=(2, 600, 300))
    rows = {row.session: row for row in own.run()}
    names = [f"{name} {b} {t}" for t in types for name in ("windowkv", "headkv", "adakv") for b in ("12 %", "200")]
    stock = ["stock f16", "stock q8_0", "stock q4_0", "stock f16 at 2", "stock f16 at 300"]
    assert set(rows) == {*names, *stock, "full f16", "full q8_0"}
    for name in names:
        row = rows[name]
        n = 200 if "200" in name else 72
        assert row.n_cells == n
        assert row.compaction_ms is not None and row.compaction_ms > 0
        queries = 2 * 3 * 8 * 32 * policies[row.policy].n_observed * 2  # the last queries, and those of the prompt's end
        block, n_bytes = SIZES[row.cell_type]
        exact = 3 * 2 * (n + 5) * 2 * 32 * n_bytes / block  # five tokens were decoded
        assert exact <= row.kv_bytes - queries <= 1.03 * exact + 3 * 2 * 32 * CELL
        assert row.kv_bytes_peak > row.kv_bytes
    for row in rows.values():
        assert 0 < row.decode_ms_best <= row.decode_ms
        assert row.decode_ms_best <= row.decode_ms_mean
        assert row.prefill_tokens_per_s is None
        assert row.is_reference == (" at " in row.session)
    assert rows["stock f16"].n_cells == rows["full f16"].n_cells == 600
    assert rows["stock f16 at 300"].n_cells == 300


def test_steps_are_what_is_reported(model: Model) -> None:
    done: list[int] = []
    for fill in (False, True):
        own = bench(model, fill=fill, lengths=(600, 1100), baselines=("f16",), references=(2,))
        done.clear()
        own.report = lambda what, steps: done.append(steps)
        own.run()
        assert sum(done) == own.n_steps


def test_an_evaluated_prompt(model: Model) -> None:
    own = bench(model, fill=False, baselines=("f16",), references=(), policies={"windowkv": WindowKV(), "full": Full()})
    stock, kept, full = own.run()
    assert kept.n_cells == 72
    for row in (stock, kept, full):
        assert row.prefill_tokens_per_s is not None and row.prefill_tokens_per_s > 0


def test_the_gate(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose cells are not those of the prompt stops the bench, with either kernel."""
    bench(model, types=("f16", "q4_0")).gate()

    real, wrong = Session.decode, 50

    def decode(self: Session, tokens: list[int]) -> float:
        if self.policy is not None and len(tokens) > 1:
            tokens = [*tokens[:wrong], (tokens[wrong] + 1) % 300, *tokens[wrong + 1 :]]
        return real(self, tokens)

    monkeypatch.setattr(Session, "decode", decode)
    with pytest.raises(GateError, match="does not give stock's logits"):
        bench(model).gate()


def test_the_gate_of_our_kernel(smollm2: Path, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that allows for rounding, alone: right cells pass it, the first half of the prompt backwards does not."""
    monkeypatch.setattr(np, "array_equal", lambda *_: True)
    weights = Model(smollm2)
    plan = Plan(lengths=(600,), policies={"windowkv": WindowKV()}, budgets=(0.12,), rounds=2)
    own = Bench(weights, read_info(smollm2), plan, weights.tokenize(document), is_random=False)
    try:
        own.gate()

        real = Session.decode

        def decode(self: Session, tokens: list[int]) -> float:
            ids = list(tokens)
            return real(self, ids[63::-1] + ids[64:] if self.policy is not None and len(ids) > 1 else ids)

        monkeypatch.setattr(Session, "decode", decode)
        with pytest.raises(GateError, match="KL divergence"):
            own.gate()
    finally:
        weights.close()


def test_too_little_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(WindowKVError, match=r"600 positions take .* GiB together, .* ask for shorter --lengths"):
        bench(model).run()


#
# the command
#


def call(*args: object) -> tuple[int, str, str]:
    res = CliRunner().invoke(app, ["bench", *map(str, args)])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res.exit_code, res.stdout, res.stderr


def test_the_table(small: Path) -> None:
    args = "--lengths 600,1k --fill --rounds 2 --policies windowkv,adakv --budgets 12%,64 --threads 2".split()
    code, out, _ = call(small, *args)
    assert code == 0
    assert "600 positions" in out and "1,024 positions" in out
    assert re.search(r"windowkv 12 % f16\D+122 ", out)
    assert re.search(r"adakv 64 f16\D+64 ", out)


def test_json_and_picture(smollm2: Path, tmp_path: Path) -> None:
    """4,096 positions of a real model: what the buffers hold is what the process grew by."""
    picture = tmp_path / "out.png"
    args = "--lengths 4k --fill --rounds 2 --policies windowkv,headkv-r2,full --references 2 --threads 2 --json --plot"
    code, out, err = call(smollm2, *args.split(), picture)
    assert code == 0, err
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    res = json.loads(out)
    assert (res["n_layer"], res["n_head_kv"], res["head_dim"], res["threads"]) == (30, 3, 64, 2)
    rows = {row["session"]: row for row in res["rows"]}
    assert len(rows) == 7
    for name in ("stock f16", "stock q8_0", "windowkv 12 % f16", "headkv-r2 12 % f16", "full f16"):
        row = rows[name]
        assert row["rss_bytes"] == pytest.approx(row["kv_bytes"], rel=0.1, abs=6 << 20)
    assert rows["windowkv 12 % f16"]["n_cells"] == rows["headkv-r2 12 % f16"]["n_cells"] == 491


def test_lines_over_lengths(tmp_path: Path) -> None:
    rows = [
        Row(name, name.split()[0], "f16", n, n, decode_ms=5.0, kv_bytes=n << 10)
        for n in (1024, 4096)
        for name in ("stock f16", "windowkv 12 % f16")
    ]
    for ending in ("svg", "pdf"):
        path = tmp_path / f"out.{ending}"
        plot(rows, "title", path)
        assert path.stat().st_size > 1000
    text = (tmp_path / "out.svg").read_text()
    assert "windowkv 12 % f16" in text and "4,096" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--types", "q5_1"], "--types has 'q5_1', expected some of f32, f16, bf16, q8_0, q4_0"),
        (["--baselines", "f16,best"], "--baselines has 'best'"),
        (["--policies", "windowkv,none"], "the policy is 'none', expected one of"),
        (["--policies", ""], "need at least one entry each"),
        (["--budgets", "0"], "the budget is '0'"),
        (["--lengths", "many"], "--lengths has 'many'"),
        (["--references", "deep"], "--references has 'deep'"),
        (["--plot", "out.bmpx"], "expected a name that ends in"),
        (["--plot", "/no/such/folder/out.png"], "there is no folder /no/such/folder"),
        (["--policies", "headkv"], "windowkv-edge profile"),
    ],
)
def test_bad_arguments(small: Path, args: list[str], message: str) -> None:
    code, _, err = call(small, "--fill", "--rounds", 1, "--lengths", 64, *args)
    assert code == 2
    assert message in err.replace("\n", " ")


def test_broken_head_scores(small: Path, tmp_path: Path) -> None:
    model = tmp_path / "copy.gguf"
    model.symlink_to(small)
    (tmp_path / "copy.heads.json").write_text("{")
    code, _, err = call(model, "--policies", "headkv", "--fill", "--lengths", 64)
    assert code == 2
    assert "copy.heads.json: not a file of head scores" in err.replace("\n", " ")


def test_heads_that_no_block_divides(tmp_path: Path) -> None:
    """Stock sessions that cannot be are left out, unless they were asked for."""
    path = tmp_path / "odd.gguf"
    write_shape(Shape("odd", 2, 320, 64, 4, 2, 80, 64), path)
    args = ["--fill", "--lengths", 300, "--rounds", 1, "--references", "", "--policies", "windowkv"]
    code, out, err = call(path, *args)
    assert code == 0, err
    assert "stock f16" in out and "q8_0" not in out
    for option in ("--types", "--baselines"):
        code, _, err = call(path, *args, option, "q8_0")
        assert code == 2
        assert "q8_0 cells come in blocks of 32 values" in err.replace("\n", " ")


def test_a_file_name_is_no_markup(small: Path, tmp_path: Path) -> None:
    model = tmp_path / "model[q4_0].gguf"
    model.symlink_to(small)
    code, out, _ = call(model, "--fill", "--lengths", 64, "--rounds", 1, "--references", "", "--baselines", "f16")
    assert code == 0
    assert "model[q4_0].gguf" in out


def test_short_prompts(smollm2: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Hi")
    args = ["--lengths", 70, "--rounds", 1, "--references", "", "--baselines", "f16", "--policies", "windowkv"]
    code, _, err = call(smollm2, *args, "--text", text)
    assert code == 0, err


def test_a_kernel_that_gives_nan(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "divergence", lambda *_: np.array([math.nan]))
    with pytest.raises(GateError, match="KL divergence nan"):
        bench(model).gate()


def test_masked_tokens_have_no_share() -> None:
    p = log_softmax(np.array([[1.0, 2.0, -np.inf]], dtype=np.float32))
    assert divergence(p, p) == 0
    assert divergence(p, p[:, [1, 0, 2]]) == pytest.approx(math.tanh(0.5))


def test_a_picture_needs_matplotlib(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = call(small, "--plot", "out.png")
    assert code == 2
    assert 'pip install "windowkv-edge[plot]"' in err


def test_a_model_without_a_policy_for_it(tmp_path: Path, smollm2: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(smollm2.read_bytes()[:1000])
    code, _, err = call(bad)
    assert code == 2
    assert "not a readable GGUF file" in err
