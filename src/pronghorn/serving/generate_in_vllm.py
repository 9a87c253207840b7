"""Run by vLLM's own interpreter: an engine that answers a line of JSON with a line of JSON.

The first line is ``{"llm": {keyword of LLM: value}}``, answered by ``{"ready": version}``. Each other is
``{"prompts": [[token id, ...], ...], "sampling": [fields of SamplingParams or null, ...], "loras": [{"name",
"id", "path"} or null, ...]}``, one entry per prompt, answered by ``{"outputs": [...]}``. ``{"error": text,
"goes_on": whether the next line can be answered}`` says why there is no answer.

It imports vLLM and the standard library only: nothing of pronghorn is installed where it runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

# fields of SamplingParams that are objects, and the class of each
_OBJECTS = {
    "structured_outputs": "StructuredOutputsParams",
    "repetition_detection": "RepetitionDetectionParams",
}


def main(lines: TextIO, answers: TextIO) -> None:
    """Start the engine that the first line asks for, then answer the others."""
    llm = None
    for line in lines:
        asked = json.loads(line)
        try:
            if llm is None:
                llm, answer = _start(asked["llm"])
            else:
                answer = {"outputs": _generate(llm, asked)}
        except (Exception, SystemExit) as error:
            # where a request is left behind, the next call would compute it, too
            goes_on = llm is not None and not llm.llm_engine.has_unfinished_requests()
            answer = {"error": _short(error), "goes_on": goes_on}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _start(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import vllm

    return vllm.LLM(**arguments), {"ready": vllm.__version__}


def _generate(llm: Any, asked: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm.lora.request import LoRARequest

    sampling = [_sampling(llm, fields) for fields in asked["sampling"]]
    loras = [
        one and LoRARequest(lora_name=one["name"], lora_int_id=one["id"], lora_path=one["path"])
        for one in asked["loras"]
    ]
    for one in {lora.lora_int_id: lora for lora in loras if lora}.values():
        llm.llm_engine.add_lora(one)  # an adapter that vLLM rejects is rejected here, before any request
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers: dict[int, Any] = {}
    # apart: vLLM's CPU kernels apply the adapter of the last slot to requests of the base in the same batch
    for of_base in (False, True):
        at = [i for i, lora in enumerate(loras) if (lora is None) == of_base]
        if at:
            own = [[each[i] for i in at] for each in (prompts, sampling, loras)]
            outputs = llm.generate(own[0], own[1], lora_request=own[2], use_tqdm=False)
            answers.update(zip(at, outputs, strict=True))
    return [_output(answers[i]) for i in range(len(prompts))]


def _sampling(llm: Any, given: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams, sampling_params

    if given is None:
        return llm.get_default_sampling_params()
    fields = dict(given)
    for name, kind in _OBJECTS.items():
        if isinstance(fields.get(name), dict):
            fields[name] = getattr(sampling_params, kind)(**fields[name])
    if isinstance(fields.get("logit_bias"), dict):  # JSON has no integer keys
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    return SamplingParams(**fields)


def _output(output: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
        "outputs": [
            {
                "index": one.index,
                "text": one.text,
                "token_ids": list(one.token_ids),
                "cumulative_logprob": one.cumulative_logprob,
                "logprobs": _logprobs(one.logprobs),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for one in output.outputs
        ],
    }


def _logprobs(positions: Any) -> list[list[list[Any]] | None] | None:
    """Of each position its tokens: id, log-probability, rank, text. The first of a prompt has none."""
    if positions is None:
        return None
    return [
        position and [[token, of.logprob, of.rank, of.decoded_token] for token, of in position.items()]
        for position in positions
    ]


def _short(error: BaseException) -> str:
    """The first error of a chain says why; those behind it say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


if __name__ == "__main__":
    # started as a file, the folder of this file comes first, and its vllm.py is not vLLM
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    # one process: the engine ends with it, whatever happens
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM and its libraries print goes to the log
    main(sys.stdin, replies)
