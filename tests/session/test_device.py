"""The runtime with layers on a device, where there is no GPU: tests/native/device has memory of its own, which the host cannot
touch, and counts what crosses the bus."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import device_runs
import numpy as np
import pytest
import tiny_model

from windowkv_edge import (
    POLICIES,
    AdaKV,
    Auto,
    HeadKV,
    HeadScores,
    PyramidKV,
    SnapKV,
    WindowAdaKV,
    WindowHeadKV,
    WindowKV,
)
from windowkv_edge.bench import Shape
from windowkv_edge.bench.shapes import write_shape
from windowkv_edge.budget import TYPES
from windowkv_edge.policies import HeadKVR2

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM = 3, 4, 2, 64

ADAKV = AdaKV(window_size=8, alpha_safeguard=0.1)
WINDOWKV = WindowKV(window_size=8)

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """F32 weights: those of llama.cpp's quantised types are computed in another layout where the CPU holds them."""
    path = tmp_path_factory.mktemp("device") / "tiny.gguf"
    return tiny_model.write_llama(path, n_layer=N_LAYER, n_head=N_HEAD, n_head_kv=N_HEAD_KV, head_dim=HEAD_DIM)


@pytest.fixture
def device(native_tests: Path) -> Run:
    """``device(kernel, run, ...)``: see device_runs."""
    return functools.partial(device_runs.on_device, native_tests / "test-device.so")


@pytest.mark.parametrize("kernel", ["cpu", "cuda", "metal", "none", "none, nor head by head"])
@pytest.mark.parametrize("layers", [2, 99], ids=["partial", "all"])
def test_the_cache_by_its_interface(
    native_tests: Path, model: Path, layers: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of test-ragged, under the sanitizers: what is stored, compacted, moved, refused."""
    kernel, *neither = kernel.split(", ")
    monkeypatch.setenv("TEST_DEVICE_KERNEL", kernel)
    if neither:
        monkeypatch.setenv("TEST_DEVICE_LACKS", "CONCAT")
    monkeypatch.setenv("GGML_BACKEND_PATH", str(native_tests / "test-device.so"))
    program = [native_tests / "test-ragged", model, str(layers), *(["uniform"] if neither else [])]
    run = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "ok"


def test_states_of_windows(native_tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DEVICE_KERNEL", "cuda")
    monkeypatch.setenv("GGML_BACKEND_PATH", str(native_tests / "test-device.so"))
    model = tiny_model.write_gpt_oss(tmp_path / "tiny.gguf")
    run = subprocess.run([native_tests / "test-ragged", model, "99", "state"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("layers", [1, 2, 99])
@pytest.mark.parametrize("offload_kqv", [True, False], ids=["pools on the device", "pools of the host"])
def test_answers_do_not_depend_on_where_layers_are(device: Run, model: Path, layers: int, offload_kqv: bool) -> None:
    check_answers(device, model, layers, offload_kqv)


def test_layers_on_two_devices(device: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DEVICE_COUNT", "2")
    check_answers(device, model, 99, True)
    assert device("cpu", device_runs.per_token, model, ADAKV, 40)["n_devices"] == 2


def by_importance() -> HeadKV:
    return HeadKV(beta=1.2, importance=HeadScores({"r": np.random.default_rng(0).random((N_LAYER, N_HEAD)) ** 3}))


def check_answers(device: Run, model: Path, layers: int, offload_kqv: bool) -> None:
    """What is kept and answered with layers on devices, against the CPU."""
    policies: list[Any] = [WINDOWKV, ADAKV, by_importance(), "auto"]
    # F16 is said, or auto would take q8_0, which stock's kernel on the CPU multiplies with quantised queries
    f16 = {"type_k": 1, "type_v": 1}
    variants: list[dict[str, Any]] = [
        {},
        *({"kv_policy": p, "kv_budget": n, **f16} for p in policies for n in (400, 40)),
    ]
    on_device = [{**variant, "offload_kqv": offload_kqv} for variant in variants]

    found = device("cuda", device_runs.answers, model, layers, on_device)
    want = device("cpu", device_runs.answers, model, 0, variants)
    stock = found[0]["logits"]
    for variant, here, there in zip(variants, found, want, strict=True):
        if variant.get("kv_budget") == 400:
            assert np.array_equal(here["logits"], stock), variant
        assert here["n_compactions"] == (variant.get("kv_budget") == 40)
        assert here["positions"] == there["positions"], variant
        # stock's kernel, which rounds weights to F16, may stand against ours; logits are around 1
        np.testing.assert_allclose(here["logits"], there["logits"], atol=2e-2, err_msg=str(variant))


@pytest.mark.parametrize("kernel", ["cuda", "metal", "none"])
@pytest.mark.parametrize("type_kv", [1, 8], ids=["f16", "q8_0"])
@pytest.mark.parametrize(
    ("layers", "offload_kqv"), [(2, True), (99, True), (99, False)], ids=["partial", "all", "pools of the host"]
)
def test_scores_by_replay(device: Run, model: Path, kernel: str, type_kv: int, layers: int, offload_kqv: bool) -> None:
    """Where the layer is, in ggml's operations, against the steps of the CPU, which round queries to F16. To quantised cells stock's
    attention on the test device, which is the CPU's, rounds them to 8 bits before."""
    found = device(kernel, device_runs.replayed, model, layers, type_kv, offload_kqv)
    want = device("cpu", device_runs.replayed, model, 0, type_kv)
    assert len(found) == len(want) == N_LAYER * N_HEAD_KV + 1
    for here, there in zip(found[:-1], want[:-1], strict=True):
        np.testing.assert_allclose(here, there, rtol=5e-2 if type_kv == 1 else 1.5e-1, atol=1e-6)
        assert (here[:4] == 2).all() and (here[250:] == 2).all() and 0 < here[4:250].min() < here[4:250].max() < 1
    assert np.isfinite(found[-1]).all()


def test_decoding_keeps_its_graph_and_waits_no_more_than_stock(device: Run, model: Path) -> None:
    """Nothing is captured anew, the host waits no more often, and what crosses the bus does not grow with the cells."""
    stock = device("cuda", device_runs.per_token, model, None, 0)
    assert stock["n_ragged"] == 0
    for policy, n_ragged, budget in ((WINDOWKV, 0, 40), (ADAKV, 12 * N_LAYER, 40), (ADAKV, 12 * N_LAYER, 120)):
        found = device("cuda", device_runs.per_token, model, policy, budget)
        assert found["n_ragged"] == n_ragged
        assert found["n_devices"] == (n_ragged > 0)
        assert found["n_graphs"] == stock["n_graphs"] == 12
        assert found["n_graphs_new"] == 0
        assert found["n_sync"] <= stock["n_sync"]
        assert found["bytes_get"] == stock["bytes_get"]
        assert found["n_get"] == stock["n_get"]
        if n_ragged:
            assert found["n_sync"] < stock["n_sync"]
            # instead of stock's mask and rows: where every head begins, how long it is, its row; the row of the observed query
            assert found["bytes_set"] <= stock["bytes_set"] + 12 * (4 * N_LAYER * N_HEAD_KV * 3 + 8)
        assert found["bytes_live"] == found["bytes_peak"]


def test_layers_of_distinct_lengths_share_a_mask(device: Run, model: Path) -> None:
    """A mask of its own for each would be 512 MiB with 32 layers, 16,000 cells and 512 tokens."""
    found = device("cuda", device_runs.masks, model, PyramidKV(window_size=8), 128)
    equal = device("cuda", device_runs.masks, model, SnapKV(window_size=8), 128)
    assert len(set(found["cells"])) == N_LAYER and len(set(equal["cells"])) == 1
    n_read = [-(-n // 256) * 256 for n in found["cells"]]
    one = max(n_read) + 256
    assert sum(n_read) > 1.5 * one  # the test would not see it otherwise
    # beside the masks: rows of the new cells, for one class of layers or for each
    masks = found["bytes_set"] - (equal["bytes_set"] - 2 * 128 * -(-equal["cells"][0] // 256) * 256) - (N_LAYER - 1) * 128 * 8
    assert 2 * 128 * max(found["cells"]) <= masks <= 2 * 128 * one


def head_scores() -> HeadScores:
    found = np.random.default_rng(0).random((N_LAYER, N_HEAD)) ** 3
    return HeadScores({"r": found, "r2": found})


ON_DEVICE: list[Any] = [
    Auto(),
    Auto(importance=head_scores(), importance_floor=4),
    WindowKV(task="localization"),
    WindowKV(task="aggregation", omega_aggregation=8, aggregation="max", protect_first=True),
    WindowAdaKV(token_share=0.3),
    WindowHeadKV(importance=head_scores(), omega=3),
    SnapKV(),
    PyramidKV(window_size=8),
    AdaKV(),
    AdaKV(window_size=8, across="model", alpha_safeguard=0.1),
    HeadKV(importance=head_scores()),
    HeadKVR2(importance=head_scores()),
]
"""Policies whose cells are chosen on the devices of layers."""

LAYER_BY_LAYER = [policy for policy in ON_DEVICE if getattr(policy, "across", "layer") == "layer"]
BUDGETS = (1, 2, 9, 40, 150, 298, 299)


def check_selections(device: Run, model: Path, layers: int, policies: list[Any], n_prompt: int = 300) -> list[dict[str, Any]]:
    """Cells that are chosen on devices, against those that the host chooses, and the reference in NumPy."""
    found = device("cuda", device_runs.selections, model, layers, policies, BUDGETS, n_prompt)
    want = device("cpu", device_runs.selections, model, layers, policies, BUDGETS, n_prompt)
    for here, there in zip(found, want, strict=True):
        assert there["n_select"] == 0 < here["n_select"], here["policy"]
        assert here["positions"] == there["positions"], (here["policy"], here["budget"])
        assert here["positions"] == here["want"], (here["policy"], here["budget"])
    return found


@pytest.mark.parametrize("policy", ON_DEVICE, ids=lambda policy: policy.name)
def test_devices_choose_the_cells_that_the_host_chooses(device: Run, model: Path, policy: Any) -> None:
    check_selections(device, model, 99, [policy])


def test_layers_of_two_devices_compete(device: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DEVICE_COUNT", "2")
    check_selections(device, model, 99, [Auto(), AdaKV(across="model"), SnapKV()])


def test_some_layers_on_the_cpu(device: Run, model: Path) -> None:
    """Where heads compete layer by layer, or not at all, those of devices choose there; over the model the host does it all."""
    check_selections(device, model, 2, [AdaKV(), WindowKV(), HeadKV(importance=head_scores())])
    found = device("cuda", device_runs.selections, model, 2, [Auto()], [40], 300)
    want = device("cpu", device_runs.selections, model, 2, [Auto()], [40], 300)
    assert found[0]["n_select"] == 0
    assert found[0]["positions"] == want[0]["positions"]


def test_prompts_shorter_than_the_observation_window(device: Run, model: Path) -> None:
    for n_prompt in (12, 33):
        found = device("cuda", device_runs.selections, model, 99, [Auto(), SnapKV(), WindowKV()], [1, 5, 11], n_prompt)
        want = device("cpu", device_runs.selections, model, 99, [Auto(), SnapKV(), WindowKV()], [1, 5, 11], n_prompt)
        assert [own["positions"] for own in found] == [own["positions"] for own in want]


def test_the_second_prompt_of_a_chat(device: Run, model: Path) -> None:
    """Its cells have gaps: windows are the host's to choose, single tokens are not."""
    by_model = AdaKV(across="model", alpha_safeguard=0.5)  # its heads are sure of more than a share of what they hold yet
    for policy, again in ((WindowKV(), False), (AdaKV(), True), (by_model, True), (HeadKV(importance=head_scores()), True)):
        found = device("cuda", device_runs.chat, model, policy)
        want = device("cpu", device_runs.chat, model, policy)
        assert [own["positions"] for own in found] == [own["positions"] for own in want]
        assert [own["n_select"] > 0 for own in found] == [True, again]


@pytest.mark.parametrize("n_prompt", [500, 1900])
@pytest.mark.parametrize("policy", [ADAKV, WINDOWKV, Auto(), HeadKVR2(importance=head_scores())], ids=lambda policy: policy.name)
def test_compaction_moves_counts_marks_and_indices_only(device: Run, model: Path, policy: Any, n_prompt: int) -> None:
    found = device("cuda", device_runs.compaction, model, policy, n_prompt)
    n_heads = N_LAYER * N_HEAD_KV
    assert found["cells"] == n_prompt * n_heads
    assert found["cells_after"] == n_prompt // 8 * n_heads

    n_planes = 2 if policy.name == "auto" else 1
    marks = 4 * 2 * -(-n_prompt // 64) * n_heads
    not_finite = 4 * n_planes * n_heads
    # heads that compete: counts by one digit, 16 to 256 of them, for keys of 32 or 64 bits; not more than 1/4 byte a cell for each digit
    counts, tables = 0, 1
    if policy.allocation().heads == "score":
        width = next(width for width in range(4, 9) if width == 8 or (n_heads << (width + 1)) * 16 > found["cells"])
        n_digits = {"adakv": -(-32 // width), "auto": -(-64 // width) + -(-32 // width)}[policy.name]
        counts = n_digits * max(4 * n_heads << width, found["cells"] // 4)
        tables += n_digits
    assert marks + not_finite <= found["bytes_get"] <= marks + not_finite + counts
    # a weight for every plane, the row of a query and at most as many masked columns for every observed query of every query head, as kv
    # heads are scored together; an index for every row, up to the next head's first one; 32 bytes a head for what a step is told
    n_observed = policy.n_observed
    slack = (16 if policy.ragged else 256) * n_heads
    told = 32 * n_heads * (tables + n_planes - 1)
    weights = 4 * N_LAYER * n_observed * N_HEAD * (1 + n_planes + n_observed)
    assert found["bytes_set"] <= 4 * (found["cells_after"] + slack) + weights + told


@pytest.mark.parametrize("policy", [WINDOWKV, ADAKV], ids=["uniform", "ragged"])
def test_reported_bytes_are_those_of_the_device(device: Run, model: Path, policy: Any) -> None:
    prompt, compacted, longer, peak, empty = device("cuda", device_runs.memory, model, policy)
    for on_device, reported in (prompt, compacted, longer, empty):
        assert on_device == reported
    # while cells are selected the host holds a bit of each, those of one layer twice; heads that compete take 1/2 of a byte for each of
    # their cells, and 32 bytes each
    compete = 0 if isinstance(policy, WindowKV) else (2000 // 2 + 32) * N_HEAD_KV
    assert peak[1] - peak[0] == -(-2000 // 64) * 8 * (N_LAYER + 1) * N_HEAD_KV + compete
    assert 0 == empty[0] < compacted[0] < longer[0] < prompt[0] / 3 < prompt[0] < peak[0]


@pytest.mark.parametrize("policy", [WINDOWKV, ADAKV], ids=["uniform", "ragged"])
@pytest.mark.parametrize(
    "write", [tiny_model.write_llama, tiny_model.write_gpt_oss, tiny_model.write_lfm2, tiny_model.write_granite_hybrid]
)
def test_out_of_memory_changes_nothing(device: Run, write: Callable[..., Path], policy: Any, tmp_path: Path) -> None:
    """A batch that finds no memory for its cells is refused before attention, windows or recurrent states have moved on."""
    found = device("cpu", device_runs.out_of_memory, write(tmp_path / "tiny.gguf"), policy)
    assert found["n_refused"] >= 1
    assert found["changed"] == []
    assert np.array_equal(found["short"], found["enough"])


def test_a_prompt_within_a_limit_without_memory(device: Run, model: Path) -> None:
    """Whichever allocation fails: tokens and positions agree, and the next prompt is answered as by a fresh session."""
    *failed, done = device("cuda", device_runs.prompt_out_of_memory, model, WINDOWKV)
    assert len(failed) > 10 and sum(row["error"] != "" for row in failed) > 5
    assert done["error"] == ""
    for row in failed:
        assert row["left"][0] == row["left"][1] and row["next"] == done["next"], row
        assert row["cells"] <= 64


@pytest.mark.parametrize("policy", [WINDOWKV, ADAKV], ids=["uniform", "ragged"])
def test_a_compaction_without_memory_leaves_whole_layers(device: Run, model: Path, policy: Any) -> None:
    """Whichever allocation fails. Where no layer was compacted nothing has changed; where some were the others hold all their
    cells, the message says which and the statistics are about what happened. A second compaction completes it."""
    *failed, done = device("cuda", device_runs.compaction_out_of_memory, model, policy)
    whole = [[300] * N_HEAD_KV] * N_LAYER
    reported, n_halves = [0, 0.0, 0.0], set()
    assert 0 < sum(not row["error"] for row in failed) < len(failed)
    for row in failed:
        if not row["error"]:  # no memory for keys: the host has chosen
            assert np.sum(row["cells"]) == 40 * N_LAYER * N_HEAD_KV and row["again"]["n_compactions"] == 0
            reported = row["reported"]
            continue
        n_now = sum(own != [300] * N_HEAD_KV for own in row["cells"])
        n_halves.add(n_now)
        assert "no memory" in row["error"]
        assert row["cells"][n_now:] == whole[n_now:]
        assert ("half done" in row["error"]) == (n_now > 0)
        if n_now > 0:
            assert f"the layers before layer {n_now} are compacted, {n_now} of {N_LAYER}" in row["error"]
            assert (row["n_compactions"], row["n_boundary"]) == (1, 300)
            # of two times in microseconds one may be what it was
            assert row["reported"][0] == row["freed"] > 0 and row["reported"] != reported
        else:
            assert (row["n_compactions"], row["n_boundary"], row["freed"], row["reported"]) == (0, 0, 0, reported)
        again = row["again"]
        assert again["error"] == "" and again["reported"][0] == again["freed"] > 0
        assert np.sum(again["cells"]) == 40 * N_LAYER * N_HEAD_KV and again["n_compactions"] == 1
        reported = again["reported"]
    assert n_halves == set(range(N_LAYER))
    assert np.sum(done["cells"]) == 40 * N_LAYER * N_HEAD_KV and done["n_boundary"] == 300
    assert done["again"]["freed"] == 0 and done["again"]["n_compactions"] == 0


@pytest.mark.parametrize("policy", [WINDOWKV, ADAKV], ids=["uniform", "ragged"])
def test_a_graph_that_fails_is_named(device: Run, model: Path, policy: Any) -> None:
    found = device("cuda", device_runs.failing_graphs, model, policy)
    prompt, compaction, token = found["errors"]
    for n_tokens, error in ((100, prompt), (1, token)):
        assert f"llama_decode of {n_tokens} tokens returned -3: kv_policy: the backend failed" in error
        assert f"while {n_tokens} tokens were computed; they are taken back" in error
    assert "a graph over the cells failed" in compaction
    assert found["changed"] == []
    assert np.array_equal(found["some"], found["none"])


def test_a_recurrent_state_that_cannot_go_back(device: Run, tmp_path: Path) -> None:
    """Upstream takes a failed token back; where it cannot, the cache is cleared, and not left with what was half computed."""
    model = tiny_model.write_lfm2(tmp_path / "lfm2.gguf")
    found = device("cuda", device_runs.failing_graph_of_a_hybrid, model, WINDOWKV)
    assert "a recurrent state cannot go back, the cache was cleared" in found["error"]
    assert tuple(found["left"]) == (0, -1)
    assert np.array_equal(found["some"], found["none"])


def test_a_device_that_attends_to_equal_heads_alone(device: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DEVICE_LACKS", "CONCAT")
    found = device("none", device_runs.refusals, model)
    assert found["ragged"].startswith("UnsupportedModelError: ")
    assert "TEST0 has no attention over heads of different lengths" in found["ragged"]
    assert "it lacks CONCAT" in found["ragged"] and "offload_kqv=False" in found["ragged"]
    assert found["uniform"] and found["cells"] == 45
    assert found["auto"] == "auto: windowkv"
    assert found["host"] and len(np.unique(found["host_cells"])) > 2


def check_head_by_head(
    device: Run, model: Path, layers: int, policies: Sequence[Any], atol: float, *, there: str = "cpu", **kwargs: Any
) -> list[dict[str, Any]]:
    """A device without the op against one that has it, or the CPU: the same cells, and the same answers within rounding. Until something
    is evicted both run stock's kernel, so that the scores are equal."""
    variants: list[dict[str, Any]] = [{"kv_policy": p, "kv_budget": 40, "attention": "stock", **kwargs} for p in policies]
    found = device("none", device_runs.answers, model, layers, variants)
    with_op = variants if there == "cpu" else [{**variant, "attention": "auto"} for variant in variants]
    wanted = device(there, device_runs.answers, model, 0 if there == "cpu" else layers, with_op)
    for variant, here, want in zip(variants, found, wanted, strict=True):
        assert here["n_compactions"] == 1
        assert here["positions"] == want["positions"], variant
        assert any(len({len(own) for own in heads}) > 1 for heads in here["positions"]), variant
        np.testing.assert_allclose(here["logits"], want["logits"], atol=atol, err_msg=str(variant))
        assert any("head by head, 2 attention operations" in text for text in here["warnings"])
    return found


@pytest.mark.parametrize("layers", [2, 99], ids=["partial", "all"])
def test_head_by_head(device: Run, model: Path, layers: int) -> None:
    found = check_head_by_head(device, model, layers, [ADAKV, by_importance()], 2e-2, type_k=1, type_v=1)
    assert all(own["n_ragged"] == 0 for own in found)  # on the device


@pytest.mark.parametrize(("type_name", "atol"), [("f32", 2e-2), ("bf16", 3e-2), ("q8_0", 0.1), ("q4_0", 0.2)])
def test_head_by_head_over_other_cells(device: Run, model: Path, type_name: str, atol: float) -> None:
    """Heads of q8_0 and q4_0 begin at multiples of 32 rows, or the device would refuse them. Stock's kernel on the CPU, which the
    device runs, quantises queries as well; our op does not, nor do our scores on the CPU: their cells are those of a device."""
    there = "cuda" if type_name in ("q8_0", "q4_0") else "cpu"
    check_head_by_head(device, model, 99, [ADAKV], atol, there=there, type_k=TYPES[type_name], type_v=TYPES[type_name])


@pytest.mark.parametrize(
    "write", [tiny_model.write_gpt_oss, tiny_model.write_lfm2, tiny_model.write_granite_hybrid], ids=lambda f: f.__name__
)
def test_head_by_head_beside_sinks_windows_and_recurrent_states(device: Run, write: Callable[..., Path], tmp_path: Path) -> None:
    check_head_by_head(device, write(tmp_path / "tiny.gguf"), 99, [ADAKV], 2e-2, type_k=1, type_v=1)


def test_head_by_head_on_two_devices(device: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DEVICE_COUNT", "2")
    check_head_by_head(device, model, 99, [ADAKV], 2e-2, type_k=1, type_v=1)


def test_head_by_head_with_many_heads(device: Run, tmp_path: Path) -> None:
    """More nodes than llama.cpp's bound for a model of so few tensors, 1,024."""
    path = tiny_model.write_llama(tmp_path / "many.gguf", n_layer=6, n_head=32, n_head_kv=32)
    variants = [{"kv_policy": ADAKV, "kv_budget": 40, "attention": "stock", "type_k": 1, "type_v": 1}]
    found = device("none", device_runs.answers, path, 99, variants)
    want = device("cpu", device_runs.answers, path, 0, variants)
    assert found[0]["positions"] == want[0]["positions"]
    np.testing.assert_allclose(found[0]["logits"], want[0]["logits"], atol=2e-2)


def test_many_tokens_go_head_by_head_where_there_is_the_op(device: Run, model: Path) -> None:
    """More than 8 tokens over ragged heads; "ragged" and "stock" ask for one of both whatever the number."""
    common = {"kv_policy": ADAKV, "kv_budget": 40, "type_k": 1, "type_v": 1}
    names = ("auto", "ragged", "stock")
    auto, ragged, stock = device("cuda", device_runs.pieces, model, [{**common, "attention": name} for name in names])
    assert [own["n_ragged"] for own in auto] == [n <= 8 and N_LAYER for n in device_runs.PIECES]
    assert [own["n_ragged"] for own in ragged] == [N_LAYER] * len(ragged)
    assert [own["n_ragged"] for own in stock] == [0] * len(stock)
    for one, other, third in zip(auto, ragged, stock, strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=2e-2)
        np.testing.assert_allclose(one["logits"], third["logits"], atol=2e-2)
        assert not np.array_equal(other["logits"], third["logits"])


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
def test_head_by_head_after_snapshots_and_growth(device: Run, model: Path, type_name: str) -> None:
    """Going back gives the same answers to the bit, and growth does not move them."""
    cells = {"type_k": TYPES[type_name], "type_v": TYPES[type_name]}
    found = device("none", device_runs.twice, model, {"kv_policy": ADAKV, "kv_budget": 40, **cells})
    assert found["n_pools"] > 3  # the pool moved while tokens came
    assert np.array_equal(found["first"], found["second"])
    assert np.array_equal(found["first"], found["roomy"])


def test_decoding_head_by_head_keeps_its_graph(device: Run, model: Path) -> None:
    """One mask for all heads crosses the bus, whose rows the device's table says."""
    stock = device("none", device_runs.per_token, model, None, 0)
    for budget in (40, 120):
        found = device("none", device_runs.per_token, model, ADAKV, budget)
        assert found["n_ragged"] == 0
        assert found["n_graphs"] == stock["n_graphs"] == 12
        assert found["n_graphs_new"] == 0
        assert found["n_sync"] <= stock["n_sync"]
        assert (found["n_get"], found["bytes_get"]) == (stock["n_get"], stock["bytes_get"])
        # 1,024 columns at most, the table's ranges and rows, the row of the observed query
        assert found["bytes_set"] <= stock["bytes_set"] + 12 * (2 * 1024 + 4 * N_LAYER * N_HEAD_KV * 3 + 8)
        assert found["bytes_live"] == found["bytes_peak"]


def test_graphs_serve_as_many_tokens_as_with_equal_heads(device: Run, model: Path) -> None:
    """Heads of different lengths reach a multiple of 256 at different tokens; a graph for each would be built at most tokens of a
    large model."""
    found = device("none", device_runs.graphs_built, model, ADAKV, 900)
    assert found["n_lengths"] > 3
    assert found["n_graphs_new"] <= found["n_pools"] + 600 // 256 + 1


def test_auto_keeps_heads_equal_where_others_are_slow(device: Run, model: Path) -> None:
    found = device("none", device_runs.stands_in, model)
    assert found["policy"] == "auto: windowkv"
    assert found["cell_types"] == ("q8_0", "q8_0")
    assert len(np.unique(found["cells"])) == 1
    assert sum("kv_policy='auto' gives all heads equally many cells, as 'windowkv'" in text for text in found["warnings"]) == 1
    equal = {name: getattr(Auto(), name) for name in ("omega", "token_share", "window_size", "carry", "task")}
    assert found["options"] == equal
    # with the op nothing stands in
    with_op = device("cpu", device_runs.stands_in, model)
    assert (with_op["policy"], with_op["warnings"]) == ("auto", [])
    assert len(np.unique(with_op["cells"])) > 1


def test_bench_measures_the_device(device: Run, tmp_path: Path) -> None:
    """What a session takes of the device beside its cells is what stock takes."""
    path = tmp_path / "small.gguf"
    write_shape(Shape("small", 3, 512, 512, 8, 2, 64, 300), path)
    rows = device(
        "cpu", device_runs.bench, path, "--lengths", "4k", "--rounds", "2", "--policies", "windowkv,adakv,auto"
    )
    by_name = {row["session"]: row for row in rows}
    stock = by_name["stock f16"]
    assert stock["kv_bytes"] == 2 * 2 * 64 * 2 * N_LAYER * 4352  # positions in steps of 256
    for name in ("windowkv 12 % f16", "adakv 12 % f16", "auto 12 % f16"):
        row = by_name[name]
        prompt_queries = N_LAYER * 8 * 64 * 2 * POLICIES[name.split()[0]]().n_observed  # beside the last ones
        assert row["kv_bytes"] - prompt_queries < stock["kv_bytes"] / 6
        # inputs and the parts of the mask
        assert (
            abs((row["device_bytes"] - row["kv_bytes_start"]) - (stock["device_bytes"] - stock["kv_bytes_start"]))
            < 16384
        )
