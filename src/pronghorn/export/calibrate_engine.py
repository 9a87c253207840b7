"""GPTQ by llm-compressor, in a process of its own: it may live in another environment, beside another
transformers.

This file is also the program that runs there, so it imports nothing of ours when it is started by its path:
``python calibrate_engine.py MODEL JOB.json OUT``. The job holds "rows" (token ids), and the "group" and
"ignore" of a quantization_config; OUT becomes a folder whose safetensors hold the codes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def compressor(python: Path | None) -> str:
    """The interpreter that has llmcompressor: ``python``, or this one.

    Raises:
        MissingDependencyError: it does not; what to install, and what to take instead.
    """
    from pronghorn.errors import MissingDependencyError

    if python is None and find_spec("llmcompressor") is not None:
        return sys.executable
    if python is not None and python.is_file():
        asked = subprocess.run([str(python), "-c", "import llmcompressor"], capture_output=True, check=False)
        if asked.returncode == 0:
            return str(python)
    raise MissingDependencyError(
        f"calibration is GPTQ by llm-compressor, and {python or 'this environment'} has no llmcompressor",
        fix="pip install 'pronghorn[gptq]' (llm-compressor 0.14 takes transformers 5.15 to 5.17), name an "
        "interpreter of another environment that has it (--calibrate-python PATH), or leave out --calibrate",
    )


def solve(
    python: str, model: Path, rows: Sequence[Sequence[int]], config: Mapping[str, Any], out: Path
) -> None:
    """Have llm-compressor choose the codes of ``model``, whose quantization_config will be ``config``.

    Raises:
        ExportError: llm-compressor failed, with the last it said.
    """
    from pronghorn.errors import ExportError

    job = out.with_suffix(".json")
    (group,) = config["config_groups"].values()
    asked = {"rows": [list(row) for row in rows], "group": group, "ignore": config["ignore"]}
    job.write_text(json.dumps(asked), encoding="utf-8")
    # absolute, but links stay: an environment's interpreter is one, and its place names the environment
    places = [str(place.absolute()) for place in (Path(python), Path(__file__), model, job, out)]
    done = subprocess.run(
        places, capture_output=True, text=True, errors="replace", check=False, cwd=out.parent
    )
    if done.returncode != 0 or not any(out.glob("*.safetensors")):
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise ExportError(
            f"llm-compressor failed with code {done.returncode}: {' / '.join(said) or 'no message'}",
            fix="leave out --calibrate: codes are then rounded to the nearest",
        )


def main(folder: str, job: str, out: str) -> None:
    """Quantise one folder."""
    import torch
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    asked = json.loads(Path(job).read_text(encoding="utf-8"))
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=False)
    rows = [torch.tensor([ids]) for ids in asked["rows"]]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    order = asked["group"]["weights"].pop("actorder")
    recipe = GPTQModifier(config_groups={"group_0": asked["group"]}, ignore=asked["ignore"], actorder=order)
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(rows))
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    sys.path[:] = sys.path[1:]  # this folder: its names are not meant for other libraries
    main(*sys.argv[1:])
