"""Head scores: files, reduction to kv heads, and where sessions look for them."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from windowkv_edge import HeadScores, MissingProfileError
from windowkv_edge._files import FileError
from windowkv_edge.errors import HeadScoresError
from windowkv_edge.heads import METADATA_KEY, ModelHeads, profile_beside
from windowkv_edge.profile import EXAMPLES, Example, Outcome, Plan, ProfileError, word_f1, write_gguf


def model(path: Path | str = "model.gguf", metadata: dict[str, str] | None = None) -> ModelHeads:
    return ModelHeads(str(path), metadata or {}, 2, 2, (0, 1))


ROWS = np.array([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 8.0, 0.0]])


def test_a_kv_head_takes_from_its_query_heads() -> None:
    scores = HeadScores({"r": ROWS})
    np.testing.assert_allclose(scores.kv_heads("r", 2), np.array([[2, 0], [2, 4]]) / 8)
    np.testing.assert_allclose(scores.kv_heads("r", 2, "max"), np.array([[3, 0], [2, 8]]) / 13)
    np.testing.assert_allclose(scores.kv_heads("r", 4), ROWS / 16)
    np.testing.assert_allclose(HeadScores({"r": np.zeros((2, 4))}).kv_heads("r", 2), 0.25)
    with pytest.raises(ValueError, match="holds scores of kind r, expected r2"):
        scores.kv_heads("r2", 2)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 kv heads"):
        scores.kv_heads("r", 3)


def test_only_compressed_layers_count() -> None:
    scores = HeadScores({"r": ROWS})
    shares = ModelHeads("m", {}, 2, 2, (1,)).importance(scores, "r", "mean")
    np.testing.assert_allclose(shares, [[2 / 6, 4 / 6]])


def test_files_survive_a_round_trip(tmp_path: Path) -> None:
    scores = HeadScores({"r": ROWS / 7, "r2": ROWS}, about={"model": "m", "counts": {"r": {"asked": 4, "right": 2}}})
    scores.save(tmp_path / "a.json")
    again = HeadScores.load(tmp_path / "a.json")
    for kind in ("r", "r2"):
        np.testing.assert_allclose(again.scores[kind], scores.scores[kind], rtol=1e-5)
    assert again.about == scores.about
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_the_authors_files_load(tmp_path: Path) -> None:
    """One line, "layer-head": a list with a value for every example."""
    path = tmp_path / "retrieval_heads.json"
    path.write_text(json.dumps({f"{il}-{ih}": [ROWS[il, ih], 0.0, 2 * ROWS[il, ih]] for ih in range(4) for il in range(2)}))
    scores = HeadScores.load(path)
    assert scores.shape == (2, 4)
    np.testing.assert_allclose(scores.scores["r"], ROWS)
    np.testing.assert_allclose(scores.kv_heads("r2", 2), scores.kv_heads("r", 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "not a file of head scores"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("{}", "expected keys such as '0-0'"),
        ('{"a": [1]}', "expected keys such as '0-0'"),
        ('{"0-0": [1], "1-1": [1]}', "2 layers x 2 heads, but head"),
        ('{"0-0": [-1]}', "negative or not numbers"),
        ('{"format": "windowkv-edge head scores", "version": 9}', "version 9 of the format, expected 1"),
        ('{"format": "windowkv-edge head scores", "version": 1, "scores": {"x": [[1]]}}', "expected 'r', 'r2' or both"),
        ('{"format": "windowkv-edge head scores", "version": 1, "scores": {"r": [1]}}', "expected one"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        HeadScores.load(path)


OURS = '{"format": "windowkv-edge head scores", "version": 1, "scores": %s}'
HUGE = "9" * 400

# what strangers may write into a model's metadata: sizes to allocate, depths to recurse, types to trip over
HOSTILE = {
    "layer": '{"99999999-0": [1]}',
    "layers-and-heads": '{"3000000-3000000": [1]}',
    "more-digits": '{"1000000000-0": [1]}',
    "a-number-of-digits": '{"%s-0": [1]}' % ("9" * 5000),
    "negative-layer": '{"-1-0": [1]}',
    "unicode-digits": '{"\u0661-0": [1]}',
    "spaces": '{" 1-0": [1]}',
    "twice": '{"0-0": [1], "00-0": [1]}',
    "no-list": '{"0-0": "1"}',
    "an-object": '{"0-0": {"a": 1}}',
    "nested": '{"0-0": [[1]]}',
    "empty": '{"0-0": []}',
    "null": '{"0-0": null}',
    "true": '{"0-0": true}',
    "text": '{"0-0": ["1"]}',
    "nan": '{"0-0": [NaN]}',
    "infinite": '{"0-0": [Infinity]}',
    "overflow": '{"0-0": [1e400]}',
    "a-huge-float": '{"0-0": [1e308, 1e308]}',
    "a-huge-int": '{"0-0": [%s]}' % HUGE,
    "an-endless-int": '{"0-0": [%s]}' % (HUGE * 20),
    "deep-list": "[" * 100_000,
    "deep-object": '{"a":' * 100_000,
    "deep-score": '{"0-0": %s%s}' % ("[" * 100_000, "]" * 100_000),
    "deep-version": '{"format": "windowkv-edge head scores", "version": %s1%s}' % ("[" * 900, "]" * 900),
    "version-true": '{"format": "windowkv-edge head scores", "version": true, "scores": {"r": [[1]]}}',
    "version-huge": '{"format": "windowkv-edge head scores", "version": %s, "scores": {"r": [[1]]}}' % HUGE,
    "no-scores": '{"format": "windowkv-edge head scores", "version": 1}',
    "about": '{"format": "windowkv-edge head scores", "version": 1, "scores": {"r": [[1]]}, "about": [1]}',
    "scores-list": OURS % "[[1]]",
    "scores-null": OURS % "null",
    "scores-none": OURS % "{}",
    "rows-object": OURS % '{"r": {"0": [1]}}',
    "rows-number": OURS % '{"r": 1}',
    "rows-text": OURS % '{"r": "ab"}',
    "rows-empty": OURS % '{"r": []}',
    "row-empty": OURS % '{"r": [[]]}',
    "row-text": OURS % '{"r": [["1"]]}',
    "row-null": OURS % '{"r": [[null]]}',
    "row-nan": OURS % '{"r": [[NaN]]}',
    "row-huge": OURS % ('{"r": [[%s]]}' % HUGE),
    "row-deeper": OURS % '{"r": [[[1]]]}',
    "row-deep": OURS % ('{"r": [[%s1%s]]}' % ("[" * 500, "]" * 500)),
    "rows-of-lengths": OURS % '{"r": [[1, 2], [1]]}',
    "rows-of-shapes": OURS % '{"r": [[1, 2]], "r2": [[1]]}',
    "many-layers": OURS % ('{"r": [%s[1]]}' % ("[1]," * 600)),
    "many-heads": OURS % ('{"r": [[%s1]]}' % ("1," * 2000)),
    "many-kinds": OURS % ("{%s}" % ",".join(f'"{i}": [[1]]' for i in range(5000))),
    "a-kind-twice": OURS % '{"r": [[1]], "r": [[2]]}',
    "half-a-character": OURS % r'{"r": [[1]]}, "about": {"model": "\ud800"}',
    "an-endless-note": OURS % '{"r": [[1]]}, "about": {"model": %s}' % HUGE,
    "a-deep-note": OURS % ('{"r": [[1]]}, "about": {"a": %s%s}' % ("[" * 100, "]" * 100)),
    "cut": '{"0-0": [1',
    "a-number": "7",
    "nothing": "",
    "zeros": "\0\0\0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_scores_end_in_one_kind_of_error(name: str, tmp_path: Path) -> None:
    """A short message with the source, at once and without memory for what the text promises."""
    path = tmp_path / "a.json"
    path.write_text(HOSTILE[name])
    tracemalloc.start()
    try:
        for read in (lambda: model(metadata={METADATA_KEY: HOSTILE[name]}).find(None), lambda: HeadScores.load(path)):
            with pytest.raises(HeadScoresError) as caught:
                read()
            assert len(str(caught.value)) < 600 + len(str(path))
            assert str(path) in str(caught.value) or METADATA_KEY in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"0-0": [\xff\xfe]}')
    with pytest.raises(HeadScoresError, match="a.json: not a file of head scores: .*utf-8"):
        HeadScores.load(path)
    path.write_text('{"0-0": [1]}', encoding="utf-8-sig")
    assert HeadScores.load(path).shape == (1, 1)
    path.write_bytes(b" " * (17 << 20))
    with pytest.raises(HeadScoresError, match="a.json: 17,825,792 bytes, expected at most 16,777,216"):
        HeadScores.load(path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is a FIFO, expected a regular file"):
        HeadScores.load(pipe)
    with pytest.raises(FileNotFoundError):
        HeadScores.load(tmp_path / "missing")


@pytest.mark.parametrize("given", [0, 1, True, 0.5, b"a.json", ["a.json"]])
def test_scores_are_given_as_a_path(given: object) -> None:
    """A number would be a file descriptor: 0 waits for the terminal."""
    with pytest.raises(ValueError, match="importance is .*, expected HeadScores or the path"):
        model().find(given)  # type: ignore[arg-type]


def test_scores_whose_sum_would_overflow_are_refused() -> None:
    with pytest.raises(HeadScoresError, match="above 1e.100"):
        HeadScores({"r": np.full((2, 4), 1e308)})
    shares = HeadScores({"r": np.full((2, 4), 1e100)}).kv_heads("r", 2)
    np.testing.assert_allclose(shares, 0.25)


def test_the_nearest_scores_win(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(MissingProfileError, match="windowkv-edge profile .*model.gguf"):
        model(path).find(None)
    HeadScores({"r": ROWS}).save(profile_beside(path))
    assert model(path).find(None).source == str(tmp_path / "model.heads.json")
    inside = {METADATA_KEY: HeadScores({"r": 2 * ROWS}).dumps()}
    assert METADATA_KEY in model(path, inside).find(None).source
    given = HeadScores({"r": 3 * ROWS})
    assert model(path, inside).find(given) is given
    given.save(tmp_path / "other.json")
    assert model(path, inside).find(tmp_path / "other.json").source == str(tmp_path / "other.json")
    with pytest.raises(ValueError, match="do not fit model.gguf with 2 layers of 8 query heads and 2 kv heads"):
        ModelHeads("model.gguf", {}, 2, 2, (0, 1), n_head=8).importance(given, "r", "mean")
    assert profile_beside("SmolLM2-1.7B").name == "SmolLM2-1.7B.heads.json"
    with pytest.raises(ValueError, match="2 layers x 4 query heads do not fit model.gguf with 9 layers"):
        ModelHeads("model.gguf", {}, 9, 2, tuple(range(9))).importance(given, "r", "mean")


@pytest.mark.parametrize(
    ("name", "shape", "layers", "n_head_kv"),
    [
        ("Smollm2 135M 8k Lc100K Mix1 Ep2", (30, 9), tuple(range(30)), 3),
        ("Gemma 3 270m", (18, 4), (5, 11, 17), 1),
    ],
)
def test_shipped_profiles_are_found_by_name(
    name: str, shape: tuple[int, int], layers: tuple[int, ...], n_head_kv: int
) -> None:
    model = ModelHeads("m.gguf", {"general.name": name}, shape[0], n_head_kv, layers)
    scores = model.find(None)
    assert scores.shape == shape
    assert scores.about["command"].startswith("windowkv-edge profile")
    for kind in ("r", "r2"):
        count = scores.about["counts"][kind]
        assert count["asked"] == 100 and count["right"] >= 50
        shares = model.importance(None, kind, "mean")
        assert shares.shape == (len(layers), n_head_kv)
        assert shares.sum() == pytest.approx(1) and shares.min() >= 0


def test_word_f1() -> None:
    assert word_f1("A bowl of soup.", "a bowl of soup") == 1.0
    assert word_f1("the kettle", "a copper kettle") == pytest.approx(2 / 5)
    assert word_f1("", "a") == word_f1("b", "a") == 0.0


def test_plan_and_examples() -> None:
    assert {e.kind for e in EXAMPLES} == {"r", "r2"}
    plan = Plan(lengths=(100, 200), depths=(0.1, 0.9))
    assert len(list(plan.cases())) == len(set(plan.cases())) == 2 * 2 * len(EXAMPLES)
    assert plan.digest() != Plan(lengths=(100, 201), depths=(0.1, 0.9)).digest()
    with pytest.raises(ValueError, match="no part of the needle"):
        Example("r", "The sky is grey.", "?", "The sky is", "blue")


def test_outcomes_survive_a_round_trip() -> None:
    outcome = Outcome((100, 0.5, 1), "an answer", ROWS)
    again = Outcome.parse(outcome.row())
    assert again.case == outcome.case and again.answer == outcome.answer
    np.testing.assert_allclose(again.earned, ROWS)  # type: ignore[arg-type]
    assert Outcome.parse(Outcome((1, 0.0, 0), "", None).row()).earned is None


def test_a_gguf_carries_its_scores(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "with.gguf"
    scores = HeadScores({"r": ROWS}, about={"model": "tiny"})
    write_gguf(tiny, scores, out)
    a, b = gguf.GGUFReader(tiny), gguf.GGUFReader(out)
    assert HeadScores.parse(b.fields[METADATA_KEY].contents(), "x").about == {"model": "tiny"}
    assert {n for n in b.fields if not n.startswith("GGUF.")} - {n for n in a.fields} == {METADATA_KEY}
    for s, t in zip(a.tensors, b.tensors, strict=True):
        assert s.name == t.name and s.tensor_type == t.tensor_type and np.array_equal(s.data, t.data)
    with pytest.raises(ProfileError, match="is the model itself"):
        write_gguf(tiny, scores, tiny)
    with pytest.raises(FileError, match="there is no folder .*missing; create it, or give another --gguf"):
        write_gguf(tiny, scores, tmp_path / "missing" / "with.gguf")
    assert list(tmp_path.iterdir()) == [out]
