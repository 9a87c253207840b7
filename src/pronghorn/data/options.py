"""What to train on: the ``data:`` section of run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Format = Literal[
    "messages", "conversations", "prompt_completion", "instruction", "text", "preference", "prompt_only"
]
LossOn = Literal["assistant", "last_assistant", "all"]
Rewritten = Literal["refuse", "last_turn", "split"]
TooLong = Literal["truncate", "drop"]

STOPPING_CHECKS = ("bos", "end_token", "masked", "serving", "equal_answers")
FORMATS: tuple[str, ...] = get_args(Format)


class DataOptions(BaseModel):
    """Where the rows come from, how they become text, and which of their tokens train."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    train: tuple[str, ...] = Field(
        min_length=1,
        description="files (.jsonl .json .csv .parquet), a folder saved by datasets, or a hub dataset id",
    )
    eval: tuple[str, ...] = Field(default=(), description="rows to evaluate on, named like train")
    eval_fraction: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the training rows set aside for evaluation"
    )
    seed: int = Field(
        default=0, description="chooses the rows set aside by eval_fraction, and among equal rows in packing"
    )
    format: Literal["auto"] | Format = Field(
        default="auto", description="layout of the rows; auto reads it from them"
    )
    rename: dict[str, str] = Field(
        default_factory=dict, description="column in the files -> name pronghorn knows, e.g. question: prompt"
    )
    split: str = Field(default="train", description="split of a hub dataset or saved dataset folder")
    subset: str | None = Field(default=None, description="configuration of a hub dataset")
    revision: str | None = Field(default=None, description="commit, branch or tag of a hub dataset")

    template: str | None = Field(
        default=None,
        description="chat template instead of the tokenizer's own: a Jinja file, or a name like chatml",
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="variables passed to the template, e.g. enable_thinking: false"
    )
    system: str | None = Field(default=None, description="system message for conversations that have none")
    loss_on: LossOn = Field(
        default="assistant",
        description="tokens that train: every answer, only the last answer, or everything",
    )
    rewritten: Rewritten = Field(
        default="refuse",
        description="conversations whose earlier answers the template rewrites once others follow: refuse "
        "them, train the last_turn only, or split them into one row per answer, each as it would be served",
    )
    too_long: TooLong = Field(
        default="truncate", description="rows longer than the sequence limit: cut or drop them"
    )
    packing: bool = Field(
        default=False,
        description="train on bins of whole rows instead of padded rows; the loss of each token is the same. "
        "A batch then counts bins: training.batch_size is bins in one forward pass",
    )
    pack_tokens: int | None = Field(
        default=None, ge=2, description="tokens of one bin; empty = the sequence limit"
    )
    skip_bad: int = Field(default=0, ge=0, description="unusable rows to leave out before the run is refused")
    allow: tuple[str, ...] = Field(
        default=(), description="failed checks that shall not stop the run, e.g. end_token, bos, masked"
    )
    isolate: bool = Field(
        default=True, description="render the chat template in a process with limits on time and memory"
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        le=256,
        description="processes that tokenise; 0 = this one alone, empty = one a core, for large files",
    )
    cache: bool = Field(
        default=True,
        description="use tokenised rows of an earlier run on the same data, also of one that was killed",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, (str, Path)) else value

    @field_validator("allow", mode="after")
    @classmethod
    def _known_checks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted({*value} - {*STOPPING_CHECKS}):
            raise ValueError(
                f"{', '.join(unknown)}: no check that stops a run; {', '.join(STOPPING_CHECKS)} do"
            )
        return value

    @field_validator("train", "eval", mode="after")
    @classmethod
    def _no_empty_name(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.strip() for name in value):
            raise ValueError("an empty name is no file and no dataset")
        return value

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> DataOptions:
        if self.eval and self.eval_fraction:
            raise ValueError("give eval or eval_fraction, not both")
        return self

    @model_validator(mode="after")
    def _budget_of_something(self) -> DataOptions:
        if self.pack_tokens is not None and not self.packing:
            raise ValueError("pack_tokens has no effect without packing: true")
        return self
