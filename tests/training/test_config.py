"""run.yaml: what it may say, what each mistake is told, overrides, schema, the way back to YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.errors import ConfigError
from pronghorn.training.config import RunConfig, load_config, parse_config, with_lora_defaults

MINIMAL: dict[str, Any] = {
    "model": {"name": "base"},
    "data": {"train": "rows.jsonl"},
    "output": {"folder": "runs/a"},
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_three_lines_are_a_run_and_the_rest_has_defaults() -> None:
    config = parse_config(MINIMAL)
    assert (
        config.training.batch_size == 2
        and config.checkpoints.keep == 2
        and config.output.folder == Path("runs/a")
    )


def test_a_bare_text_stands_for_the_model_name_and_the_folder() -> None:
    assert parse_config({**MINIMAL, "model": "base", "output": "runs/a"}) == parse_config(MINIMAL)


def test_yaml_numbers_that_yaml_reads_as_strings_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + "training: {learning_rate: 1e-4, epsilon: '1e-6'}\n")
    assert load_config(path).training.learning_rate == 1e-4
    assert (
        yaml.safe_load(path.read_text())["training"]["learning_rate"] == "1e-4"
    )  # what YAML 1.1 makes of it


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    changed = [
        "training.learning_rate=3e-5",
        "lora.targets=[q_proj, v_proj]",
        "lora.r=8",
        "seed=7",
        "model.name=other",
    ]
    config = load_config(path, changed)
    assert config.training.learning_rate == 3e-5 and config.seed == 7 and config.model.name == "other"
    assert (
        config.lora is not None and config.lora.r == 8 and list(config.lora.targets) == ["q_proj", "v_proj"]
    )


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"training": {"learning_rte": 1}}, "training.learning_rte: unknown key", "training.learning_rate?"),
        ({"learning_rate": 1}, "learning_rate: unknown key", "training.learning_rate?"),
        ({"training": {"lr": 1}}, "training.lr: unknown key", "training.learning_rate?"),
        ({"num_train_epochs": 1}, "num_train_epochs: unknown key", "training.epochs?"),
        ({"lora": {"rnk": 4}}, "lora.rnk: unknown key", "lora.r?"),
        ({"lora": {"depth": 4}}, "lora.depth: unknown key", "lora knows: r, alpha, dropout"),
        ({"lora": {"lora_alpha": 4}}, "lora.lora_alpha: unknown key", "lora.alpha?"),
        ({"data": {"train": "x", "fromat": "text"}}, "data.fromat: unknown key", "data.format?"),
        ({"zzz": 1}, "zzz: unknown key", "the top level knows: schema_version, seed, model"),
        (
            {"training": {"batch_size": 0}},
            "training.batch_size: should be greater than or equal to 1 (got 0)",
            "",
        ),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: should be a valid number", ""),
        ({"training": {"schedule": "cos"}}, "should be 'linear', 'cosine' or 'constant' (got 'cos')", ""),
        ({"lora": {"r": 0}}, "lora: the rank r is 0", "whole number of at least 1"),
        ({"lora": {"init": "pissa"}}, "lora: init_lora_weights='pissa' moves", "gaussian"),
        ({"schema_version": 2}, "schema_version: should be 1 (got 2)", ""),
        ({"data": None}, "data: should be a valid dictionary", ""),
        ({"model": {"name": ""}}, "model.name: String should have at least 1 character (got '')", ""),
    ],
)
def test_each_mistake_names_path_value_and_way_out(change: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **change}, origin="run.yaml")
    assert message in caught.value.message and caught.value.message.startswith("run.yaml: ")
    assert fix in caught.value.fix and caught.value.fix
    assert caught.value.exit_code == 2


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"name": "b", "nmae": 1}, "training": {"epochs": -1}})
    lines = caught.value.message.splitlines()
    assert lines[0] == "configuration: 4 errors"
    assert {line.partition(":")[0].strip() for line in lines[1:]} == {
        "model.nmae",
        "training.epochs",
        "data",
        "output",
    }
    assert "  model.nmae: unknown key (did you mean model.name?)" in lines


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: [", [], "is not valid YAML"),
        ("seed: 1\nseed: 2\n", [], "key 'seed' is given twice"),
        ("- a\n", [], "must be a mapping of sections, got list"),
        ("", [], "must be a mapping of sections, got NoneType"),
        ("model: {name: x}", ["model.name"], "override 'model.name' is not of the form key=value"),
        ("model: {name: x}", [".a=1"], "is not of the form key=value"),
        ("model: {name: x}", ["model.name=[1"], "the value is not valid YAML"),
        ("model: {name: x}", ["model.name.first=1"], "model.name is 'x', it has no keys below it"),
    ],
)
def test_unusable_files_and_overrides(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert message in caught.value.message and caught.value.fix


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml does not exist"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_the_resolved_form_reads_back_to_an_equal_one(tmp_path: Path) -> None:
    lora = {"r": 8, "targets": ["q_proj"], "layers": [0, 1]}
    config = with_lora_defaults(parse_config({**MINIMAL, "lora": lora, "logging": {"report_to": "wandb"}}))
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again.to_dict() == config.to_dict() and again.logging.report_to == ("wandb",)


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(MINIMAL).seed = 1  # type: ignore[misc]


def test_the_lora_section_is_filled_for_a_base_and_refused_for_an_adapter(tmp_path: Path) -> None:
    filled = with_lora_defaults(parse_config(MINIMAL))
    assert filled.lora is not None and filled.lora.r == 16
    (tmp_path / "adapter_config.json").write_text("{}")
    adapter = {**MINIMAL, "model": {"name": str(tmp_path)}}
    assert with_lora_defaults(parse_config(adapter)).lora is None
    with pytest.raises(ConfigError, match="is an adapter with a rank and targets"):
        with_lora_defaults(parse_config({**adapter, "lora": {"r": 4}}))


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    kinds = [field.annotation for field in model.model_fields.values()]
    below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(deeper for kind in below for deeper in sections(kind))]


def test_every_field_is_documented_in_the_schema() -> None:
    found = sections(RunConfig)
    assert len(found) == 8
    assert [
        f"{one.__name__}.{n}" for one in found for n, f in one.model_fields.items() if not f.description
    ] == []
    assert RunConfig.model_json_schema()["properties"]["seed"]["minimum"] == 0


def test_the_command_prints_schema_and_resolved_config_and_trains_nothing(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["train", "--schema"])
    assert json.loads(shown.stdout)["properties"].keys() == RunConfig.model_fields.keys()
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    printed = CliRunner().invoke(
        app, ["train", str(path), "training.epochs=3", "--skip-bad", "4", "--allow", "bos", "--dry-run"]
    )
    assert printed.exit_code == 0
    resolved = yaml.safe_load(printed.stdout)
    assert (
        resolved["training"]["epochs"] == 3
        and (resolved["data"]["skip_bad"], resolved["data"]["allow"]) == (4, ["bos"])
        and resolved["lora"]["r"] == 16
    )
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run.yaml"]


def test_the_command_without_a_file_says_what_to_do() -> None:
    failed = CliRunner().invoke(app, ["train"])
    assert isinstance(failed.exception, ConfigError) and "pronghorn train run.yaml" in failed.exception.fix
