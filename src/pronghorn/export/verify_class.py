"""Asks transformers' own loader whether a folder's tensors are those of the class named in config.json.

The class is built on the meta device, so no weight is read: names and shapes only, after every renaming and
fusing of experts that this transformers does on load. transformers itself only logs what is missing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pronghorn.export.verify_folder import Folder, Row, quantization, verdict

_KINDS = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}


def model_class(folder: Path) -> Any:
    """The transformers class that config.json names; None when this transformers has none of that name."""
    import transformers

    named = Folder(folder).config.get("architectures") or [""]
    return getattr(transformers, str(named[0]), None)


def class_agrees(folder: Path) -> Row:
    """No tensor of the class is missing, unexpected or of another shape (tied tensors are not missing)."""
    import transformers

    name = "tensors are those of the class"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = model_class(folder)
    named = Folder(folder).config.get("architectures")
    if found is None:
        return Row(name, None, f"transformers {transformers.__version__} has no class {named}")
    # 4-bit tensors cannot be put together on the meta device
    place = "cpu" if quantization(Folder(folder).config) else "meta"
    options = {"device_map": place, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        _, info = found.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())
        return Row(name, False, f"{found.__name__} cannot be loaded: {said[:300]}")
    problems = [
        f"{key if isinstance(key, str) else key[0]} is {what}"
        for what, kind in _KINDS.items()
        for key in sorted(info[kind], key=str)
    ]
    problems += [str(message) for message in info.get("error_msgs", ())]
    return Row(name, *verdict(problems, f"{found.__name__}: none missing, unexpected or of another shape"))


if __name__ == "__main__":
    print(json.dumps(asdict(class_agrees(Path(sys.argv[1])))))
