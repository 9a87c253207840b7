"""Why vLLM would not serve an adapter rightly: the pre-flight of ``pronghorn serve`` for ``verify --for``.

``python -m pronghorn.serving.vllm_check ADAPTER [BASE]`` prints the refusals as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pronghorn.errors import AdapterError, PronghornError, SourceError
from pronghorn.serving.base import base_to_serve
from pronghorn.serving.vllm import plan_serving
from pronghorn.sources.resolve import resolve


def main(*places: str) -> None:
    """Print each refusal; ``sure`` is false where the base to serve on could not be had.

    ``silent``: vLLM would load the adapter and compute something else.
    """
    folder, *base = (Path(place) for place in places)
    said = []
    found = False
    try:
        base_to_serve(resolve(folder), *base)
        found = True
        plan_serving(folder, base=base[0] if base else None)
    except PronghornError as error:
        silent = isinstance(error, AdapterError)
        sure = found or not isinstance(error, (AdapterError, SourceError))
        said.append({"text": error.message, "fix": error.fix, "sure": sure, "silent": silent})
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
