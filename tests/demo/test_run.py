"""The parts of the demo's script that are not commands."""

from __future__ import annotations

import run


def test_sparkline_falls_as_the_values_do() -> None:
    assert run.sparkline([8.0, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert len(run.sparkline([float(i % 7) for i in range(500)])) == 60
    assert run.sparkline([1.0, 1.0]) == "▁▁"


def test_run_yaml_is_a_valid_configuration(tmp_path, monkeypatch) -> None:
    from pronghorn.training.config import load_config

    monkeypatch.setattr(run, "CONFIG", tmp_path / "run.yaml")
    monkeypatch.setattr(run, "shown", str)
    run.write_config()
    config = load_config(tmp_path / "run.yaml")
    assert config.output.folder == run.RUN
    assert config.model.name == str(run.DEMO / "base")
