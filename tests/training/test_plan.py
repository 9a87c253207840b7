"""The plan of a run: figures before loading, refusals that name what would fit, predicted beside measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pronghorn
from pronghorn.cli.main import app
from pronghorn.errors import ConfigError, OutOfMemoryError
from pronghorn.memory.budget import Card
from pronghorn.training import plan as planning
from pronghorn.training.config import RunConfig, parse_config
from pronghorn.training.plan import Plan, Planner, require_fit
from pronghorn.training.run import train
from scripts.first_run import ROOT, commands
from tests.training.conftest import MakeConfig

BIG = Card("test", 10**9, "as given", is_cpu=True)


def sized(memory_bytes: int) -> Card:
    return replace(BIG, memory_bytes=memory_bytes)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return parse_config(make_config(model={"max_seq_length": 128}, lora={"dropout": 0.0}))


def test_a_full_plan_says_what_fits_and_how_long_a_row_may_be(config: RunConfig) -> None:
    made = Planner(config, sized(6_000_000)).full()
    by_setting = {one.recompute: one for one in made.settings}
    assert set(by_setting) == {False, True, "unsloth", "auto"}
    assert by_setting[True].need.step.saved < by_setting[False].need.step.saved
    for one in made.settings:
        assert one.fits == (one.total_bytes <= 6_000_000)
        assert one.fits == ((one.longest or 0) >= 128)
    assert made.recommended == next(s for s in (False, "auto", True, "unsloth") if by_setting[s].fits)
    assert made.basis == "one micro-step rehearsed on shapes"
    assert made.disk.checkpoints == 3 * (made.chosen.need.adapters + made.chosen.need.optimizer)
    assert json.loads(made.as_json())["chosen"]["total_bytes"] == made.chosen.total_bytes


def test_the_longest_row_is_rehearsed_and_fits(config: RunConfig) -> None:
    planner = Planner(config, sized(4_000_000))
    length = planner.longest(True)
    assert 0 < length < 256
    assert planner.need(True, planner._resized(length)).fits(planner.card)
    assert not planner.need(True, planner._resized(length + length // 25 + 17)).fits(planner.card)


@pytest.mark.slow
def test_every_change_that_is_named_fits(config: RunConfig) -> None:
    whole = Planner(config, BIG)
    enough = whole.need(True).tensors
    planner = Planner(config, sized(enough - 200_000))
    changes = list(planner.changes())
    assert any(change.startswith("training.batch_size=") for change in changes)
    assert any(change.startswith("model.max_seq_length=") for change in changes)
    for change in changes:
        key, value = re.match(r"([\w.]+)=(\S+)", change).groups()  # type: ignore[union-attr]
        section, name = key.split(".")
        values = config.to_dict()
        values[section] = {**(values[section] or {}), name: json.loads(value) if value != "nf4" else value}
        assert Planner(parse_config(values), planner.card).brief().fits, change


def test_a_run_over_budget_is_refused_before_it_starts(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "detect", lambda: sized(1_500_000))
    values = make_config("refused", training={"over_budget": "refuse"})
    with pytest.raises(OutOfMemoryError, match=r"the run needs \d+\.\d+ GB and test has 0\.00 GB") as error:
        train(values)
    assert "training.over_budget=warn" in error.value.fix
    assert not (tmp_path / "refused" / "manifest.json").exists()
    values["training"] = {**values["training"], "over_budget": "warn", "max_steps": 1}
    assert train(values).steps == 1


def test_a_refusal_names_single_changes_or_says_that_none_is_enough(config: RunConfig) -> None:
    made = Planner(config, sized(Planner(config, BIG).need(True).tensors - 1)).brief()
    with pytest.raises(OutOfMemoryError) as error:
        require_fit(made)
    assert "any one of: " in error.value.fix
    assert "training.batch_size=1" in error.value.fix
    hopeless = Planner(config, sized(1_000)).brief()
    with pytest.raises(OutOfMemoryError) as error:
        require_fit(hopeless)
    assert "no single change of it fits" in error.value.fix


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_writes_predicted_beside_measured(
    packing: bool, make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config(
        "measured",
        training={"over_budget": "refuse", "max_steps": 1},
        data={"packing": True, "pack_tokens": 64} if packing else {},
        model={"max_seq_length": 64},
        lora={"dropout": 0.0},
    )
    train(values)
    manifest = json.loads((tmp_path / "measured" / "manifest.json").read_text())
    assert manifest["plan"]["fits"] is True
    found = manifest["memory"]
    assert found["batch"]["packed"] is packing
    for key in ("held_bytes", "optimizer_bytes"):
        assert found[key]["predicted"] == found[key]["measured"]
    for key in ("saved_bytes", "peak_bytes"):
        assert found[key]["predicted"] == pytest.approx(found[key]["measured"], rel=0.05)


def write_yaml(config: RunConfig, folder: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return str(path)


def test_the_command_prints_a_table_or_json_and_exits_by_the_verdict(
    config: RunConfig, tmp_path: Path
) -> None:
    path = write_yaml(config, tmp_path)
    shown = CliRunner().invoke(app, ["plan", path, "--memory", "A100-80GB"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for text in ("auto", "recommended", "disk for the run", "of the data sheet's", "rehearsed"):
        assert text in " ".join(shown.output.split())
    refused = CliRunner().invoke(
        app, ["plan", path, "training.accelerate=false", "--memory", "100MB", "--json"]
    )
    assert refused.exit_code == 1
    made = json.loads(refused.output)
    assert made["fits"] is False
    assert [one["recompute"] for one in made["settings"]] == [False, True]
    assert made["time"] is None


def test_the_public_function_takes_a_size_and_refuses_nonsense(config: RunConfig) -> None:
    made = pronghorn.plan(config.to_dict(), memory="2GB")
    assert isinstance(made, Plan)
    assert made.fits
    with pytest.raises(ConfigError, match="neither a size nor a card"):
        pronghorn.plan(config, memory="much")


def test_nothing_but_headers_is_read(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was read")

    from pronghorn.weights import reader

    monkeypatch.setattr(reader, "read_tensor", refuse)
    before = torch.random.get_rng_state()
    assert Planner(config, BIG).brief().fits
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_commands_of_the_documentation_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(config, tmp_path)
    typed = commands((ROOT / "docs" / "plan.md").read_text(encoding="utf-8"))
    assert len(typed) == 3
    for command in typed:
        assert command.startswith("pronghorn plan run.yaml")
        done = CliRunner().invoke(app, command.split()[1:])
        assert done.exit_code == 0, done.output
