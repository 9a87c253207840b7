"""The parts of the demo's script that are not commands."""

from __future__ import annotations

import subprocess
import sys

import pytest
import run


def test_sparkline_falls_as_the_values_do() -> None:
    assert run.sparkline([8.0, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert len(run.sparkline([float(i % 7) for i in range(500)])) == 60
    assert run.sparkline([1.0, 1.0]) == "▁▁"


@pytest.mark.parametrize(("asked", "held"), [("none", None), ("nf4", "nf4")])
def test_run_yaml_is_a_valid_configuration(tmp_path, monkeypatch, asked: str, held: str | None) -> None:
    from pronghorn.training.config import load_config

    monkeypatch.setattr(run, "CONFIG", tmp_path / "run.yaml")
    monkeypatch.setattr(run, "shown", str)
    run.write_config(asked)
    config = load_config(tmp_path / "run.yaml")
    assert config.output.folder == run.RUN
    assert config.model.name == str(run.DEMO / "base")
    assert config.model.quantization == held


@pytest.mark.slow
def test_the_demo_on_a_base_in_4_bit() -> None:
    """It ends with an error where the held-out loss of the merged model is not a quarter better."""
    script = [sys.executable, str(run.DEMO / "run.py"), "--quantization", "nf4"]
    done = subprocess.run(script, cwd=run.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "modules in NF4" in done.stdout + done.stderr
