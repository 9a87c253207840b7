"""The benchmark's dry run on a CPU, what its rows must satisfy to count, and its arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import contenders
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cells import Cell, default_cells, select
from benchmarks.gpu.judge import judge, predicted_context
from benchmarks.gpu.report import markdown
from benchmarks.gpu.shapes import BATCHES, SHAPES


def cell(contender: str, batch: str = "tiny") -> Cell:
    return Cell(
        contender=contender, shape="tiny", batch=batch, device="cpu", dtype="float32", steps=2, warmup=1
    )


def row(losses: list[float], norms: list[float]) -> dict[str, Any]:
    return {"status": "measured", "losses": losses, "grad_norms": norms}


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    code = main(["--device", "cpu", "--shape", "tiny", "--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = [
        (c["contender"], c["batch"], r["status"])
        for c, r in zip(result["cells"], result["rows"], strict=True)
    ]
    assert found == [
        ("peft-recompute", "tiny", "ok"), ("pronghorn", "tiny", "ok"), ("pronghorn", "tiny-packed", "ok")
    ]  # fmt: skip
    assert code == 0
    assert (
        result["versions"]["torch"] == str(torch.__version__).partition("+")[0] or result["versions"]["torch"]
    )
    assert {op["op"] for op in result["ops"]} >= {
        "norm, forward",
        "MLP, forward and backward",
        "loss, frozen head",
    }
    assert "| pronghorn | tiny | tiny-packed |" in (tmp_path / "gpu.md").read_text()


def test_one_cell_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--shape", "tiny", "--quick", "--no-ops", "--out", str(tmp_path)]
    code = main([*given, "--only", "pronghorn/tiny/tiny"])
    (made,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert code == 1 and made["status"] == "invalid"
    assert made["why"] == "no plain run of these documents to compare with"
    assert len(made["losses"]) == 3 and all(norm > 0 for norm in made["grad_norms"])
    assert "pronghorn/tiny/tiny:" in capsys.readouterr().out


@pytest.mark.slow
def test_dry_run_in_4_bit(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--shape", "tiny", "--no-ops", "--out", str(tmp_path)]
    main([*given, "--only", "pronghorn-nf4*/tiny/tiny", "peft-decoded*"])
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = {
        c["contender"]: (r["status"], r["why"]) for c, r in zip(result["cells"], result["rows"], strict=True)
    }
    names = ("peft-decoded-recompute", "pronghorn-nf4", "pronghorn-nf4-recompute")
    assert found == dict.fromkeys(names, ("ok", ""))


def test_pronghorns_4_bit_rows_need_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = contenders.build("pronghorn-nf4", "tiny", "tiny", "cpu", torch.float32)
    (hook,) = model.base_model.model.model._forward_pre_hooks.values()
    for kind in ("qkv", "o", "mlp"):
        assert hook.report.count(kind) == (2, 2)
    losses = []
    for name in ("pronghorn-nf4", "peft-decoded-recompute", "peft"):
        one = contenders.build(name, "tiny", "tiny", "cpu", torch.float32)
        made = contenders.batch(SHAPES["tiny"], BATCHES["tiny"], "cpu", metadata=False)
        losses.append(float(one(**made).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-5)


def test_a_peer_that_is_not_there_is_a_row_that_says_so(tmp_path: Path) -> None:
    main(["--device", "cpu", "--shape", "tiny", "--no-ops", "--out", str(tmp_path), "--only", "unsloth"])
    (made,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (made["status"], made["why"]) == ("skipped", "unsloth cannot be imported")


@pytest.mark.parametrize(
    "made,why",
    [
        (row([6.0, 5.9], [1.0, 1.0]), ""),
        (row([6.0, 6.0], [1.0, 1.0]), "step 2: losses 6, the plain run has 5.9"),
        (row([6.0, 5.9], [1.0, 1.1]), "step 2: grad_norms 1.1, the plain run has 1"),
        (row([6.0, 5.9], [0.0, 1.0]), "gradient norms [0.0, 1.0]"),
        (row([float("nan"), 5.9], [1.0, 1.0]), "step 1: losses nan, the plain run has 6"),
    ],
)
def test_a_row_counts_only_if_it_computes_what_the_plain_run_does(made: dict[str, Any], why: str) -> None:
    rows = [row([6.0, 5.9], [1.0, 1.0]), made]
    judge([cell("peft"), cell("pronghorn", "tiny-packed")], rows)
    assert (rows[1]["status"], rows[1]["why"]) == ("invalid" if why else "ok", why)


def test_a_run_without_gradient_is_no_reference_for_itself() -> None:
    rows = [row([6.0], [0.0])]
    judge([cell("peft")], rows)
    assert rows[0]["status"] == "invalid"


def test_cells_are_selected_by_contender_or_by_name() -> None:
    cells = default_cells("llama-3.1-8b", "cuda", "bfloat16", quick=False)
    assert {c.contender for c in select(cells, ["liger"])} == {"liger"}
    assert [c.name for c in select(cells, ["*/qwen3-0.6b/*", "peft/*/2k"])] == [
        "peft/llama-3.1-8b/2k", "peft/qwen3-0.6b/2k", "pronghorn/qwen3-0.6b/2k", "unsloth/qwen3-0.6b/2k"
    ]  # fmt: skip
    assert len({c.name for c in cells}) == len(cells)
    assert cells[0].contender == "peft-recompute"


def test_the_packed_batch_holds_the_same_documents() -> None:
    shape = SHAPES["tiny"]
    rows = contenders.batch(shape, BATCHES["tiny"], "cpu", metadata=False)
    packed = contenders.batch(shape, BATCHES["tiny-packed"], "cpu", metadata=True)
    assert torch.equal(packed["labels"].view(4, 16), rows["labels"])
    assert packed["position_ids"].view(4, 16)[2].tolist() == list(range(16))
    assert packed["cu_seq_lens_q"].tolist() == [0, 16, 32, 48, 64] and packed["max_length_q"] == 16


def test_useful_operations_are_those_torch_counts() -> None:
    shape, cut = SHAPES["tiny"], BATCHES["tiny"]
    model = contenders.build("peft", "tiny", "tiny", "cpu", torch.float32)
    model.enable_input_require_grads()  # so that the first layer counts like the rest
    with FlopCounterMode(display=False) as counted:
        model(**contenders.batch(shape, cut, "cpu", metadata=False)).loss.backward()
    # the head sees the last position of each row, too; torch does not count attention on a CPU
    assert counted.get_total_flops() / cut.tokens == pytest.approx(shape.flops_per_token(0), rel=0.01)


def test_parameters_of_the_shapes_are_those_of_the_models() -> None:
    def billions(name: str) -> float:
        shape = SHAPES[name]
        linears = shape.get("num_hidden_layers") * sum(i * o for i, o in shape.linears)
        return linears / 1e9

    assert billions("llama-3.1-8b") == pytest.approx(6.979, abs=0.001)
    assert billions("qwen3-8b") == pytest.approx(6.946, abs=0.001)
    assert billions("qwen3-0.6b") == pytest.approx(0.440, abs=0.001)


def test_context_is_predicted_by_the_line_through_two_peaks() -> None:
    assert predicted_context((1000, 3.0), (2000, 4.0), 100.0) == 93_000


def test_contexts_are_reported_with_what_confirmed_them() -> None:
    cells = [
        Cell(contender="pronghorn-recompute", shape="qwen3-8b", batch=b, device="cuda", dtype="bfloat16")
        for b in ("2k", "16k", "64k")
    ]
    figures = {
        "tokens_per_s": 1.0, "step_s": 1.0, "step_s_min": 1.0, "step_s_max": 1.0, "useful_tflops": 1.0,
        "status": "ok", "why": "", **row([1.0], [1.0]),
    }  # fmt: skip
    rows = [{**figures, "status": "ok", "peak_reserved_gib": gib} for gib in (18.0, 19.0, 25.5)]
    text = markdown(
        {"cells": [c.as_dict() for c in cells], "rows": rows, "ops": [], "versions": {}, "device": "cuda",
         "dtype": "bfloat16", "ceilings": {"matrix_tflops": 790.0, "copy_gbs": 4300.0}}
    )  # fmt: skip
    assert "from 8,192 and 16,384 tokens" in text
    assert "Confirmed at 65,536 tokens: 25.00 GiB predicted, 25.50 measured" in text
