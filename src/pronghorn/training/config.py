"""The one typed configuration of a run: what run.yaml may say, each key with a default and a rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pronghorn.adapters.options import LoraOptions
from pronghorn.data.options import DataOptions
from pronghorn.errors import ConfigError
from pronghorn.training.config_errors import explain


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_enum_values=True)
    # the key that a bare text stands for: "model: my-model" is "model: {name: my-model}"
    short_for: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        return {cls.short_for: values} if cls.short_for and isinstance(values, (str, Path)) else values


class ModelSection(Section):
    """What is fine-tuned."""

    short_for: ClassVar[str] = "name"
    name: str = Field(
        min_length=1, description="Local folder or hub id of the base model, or of an adapter to go on with."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    base: str | None = Field(
        None, description="If name is an adapter: its base, where that is no longer at the recorded place."
    )
    max_seq_length: int | None = Field(
        None,
        ge=2,
        description="Longest row in tokens; longer ones are cut and told. Empty: 2048, or the model's limit.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="In what the base is held: auto takes the dtype of its files."
    )
    quantization: Literal["nf4", "int8", "none"] | None = Field(
        None,
        description="nf4: hold the base in 4-bit; int8: in 8-bit; none: in 16-bit, or fail; empty: as its "
        "folder says.",
    )
    new_tokens: tuple[str, ...] | None = Field(
        None, description="Tokens to add to tokenizer and model; their rows train with the adapter."
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped inside the model folder.")


class TrainingSection(Section):
    """Optimizer, schedule, batch."""

    epochs: float = Field(1.0, gt=0, description="Passes over the training rows; max_steps, if given, wins.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps to run instead of counting epochs."
    )
    batch_size: int = Field(2, ge=1, description="Rows in one forward pass.")
    gradient_accumulation: int = Field(
        4,
        ge=1,
        description="Forward passes per optimizer step; the loss is divided by the tokens of all of them.",
    )
    attention: Literal[
        "auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = Field(
        "auto",
        description="How attention is computed; auto: as loaded, or faster where that is proven.",
    )
    learning_rate: float = Field(2e-4, gt=0, lt=10, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rate falls."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Share of all steps in which the learning rate rises."
    )
    optimizer: Literal["adamw", "adafactor", "sgd"] = Field("adamw", description="The update rule.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the squared gradient.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's floor of the denominator.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients longer than this are scaled down; 0 = never."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of the forward pass: auto is bf16 autocast for a bfloat16 base, else fp32.",
    )
    accelerate: bool = Field(
        True,
        description="Replace the parts of the model that are proven equal on this very model by leaner ones.",
    )
    recompute: bool | Literal["unsloth", "auto"] = Field(
        True,
        description="Compute activations again in backward: true for every layer (far less memory, about "
        "25 % more time), false for none, unsloth for every layer with its input in host memory, auto for "
        "as many layers as the free memory asks for.",
    )

    mlp_tile_tokens: int | None = Field(
        None,
        ge=1,
        description="For long rows: at most this many tokens at a time in MLPs and experts, whose input is "
        "all that is kept; their first products run twice. Needs accelerate.",
    )
    over_budget: Literal["refuse", "warn", "skip"] = Field(
        "refuse",
        description="What happens when the plan of the run needs more memory than there is: refuse to "
        "train, warn and train, or skip the plan.",
    )

    @model_validator(mode="after")
    def _some_settings_need_acceleration(self) -> TrainingSection:
        if isinstance(self.recompute, str) and not self.accelerate:
            raise ValueError(f"recompute: {self.recompute} needs accelerate: true")
        if self.mlp_tile_tokens is not None and not self.accelerate:
            raise ValueError(f"mlp_tile_tokens: {self.mlp_tile_tokens} needs accelerate: true")
        return self


class EvalSection(Section):
    """When and how the evaluation split is measured."""

    batch_size: int | None = Field(
        None, ge=1, description="Rows in one evaluation pass; empty = training.batch_size."
    )
    every_steps: int | None = Field(
        None, ge=1, description="Evaluate each N steps; empty = after each epoch."
    )
    at_start: bool = Field(False, description="Also evaluate before the first step.")


class CheckpointSection(Section):
    """When the state of the run is sealed, and how many are kept."""

    every_steps: int | None = Field(
        100, ge=1, description="Write one each N steps; empty = after each epoch."
    )
    keep: int = Field(2, ge=1, description="How many of the newest valid checkpoints stay on the disk.")


class LoggingSection(Section):
    """What is shown while it runs; metrics.jsonl always has every step."""

    every_steps: int = Field(10, ge=1, description="Print a line each N steps.")
    progress: Literal["auto", "plain", "none"] = Field(
        "auto", description="auto: a bar on a terminal, lines otherwise; plain: lines; none: nothing."
    )
    report_to: tuple[str, ...] = Field(
        (), description="Trackers of transformers to report to, e.g. [tensorboard], [wandb], [trackio]."
    )
    run_name: str | None = Field(
        None, description="Name shown by the trackers; empty = the run folder's name."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("report_to"), str):
            name = values["report_to"]
            return {**values, "report_to": () if name == "none" else (name,)}
        return values


class OutputSection(Section):
    """Where the run lives."""

    short_for: ClassVar[str] = "folder"
    folder: Path = Field(
        description="The run folder; it is made if missing, and resumed if it holds this run."
    )


class RunConfig(Section):
    """Everything that decides a run. The resolved form is kept as run.yaml in the run folder."""

    schema_version: Literal[1] = Field(1, description="Version of this layout.")
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="Seeds dropout and the order of rows (lora.seed and data.seed choose A and the split).",
    )
    model: ModelSection = Field(description="What is fine-tuned.")
    data: DataOptions = Field(description="The rows, and what of them is trained.")
    lora: LoraOptions | None = Field(
        None,
        description="The adapter; empty: the defaults. Must be empty if model.name is an adapter already.",
    )
    training: TrainingSection = Field(
        default_factory=TrainingSection, description="Optimizer, schedule, batch."
    )
    eval: EvalSection = Field(
        default_factory=EvalSection, description="When the evaluation split is measured."
    )
    checkpoints: CheckpointSection = Field(
        default_factory=CheckpointSection, description="Sealed states to resume from."
    )
    logging: LoggingSection = Field(
        default_factory=LoggingSection, description="What is shown while it runs."
    )
    output: OutputSection = Field(description="Where the run lives.")

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values, in the order of the schema."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def parse_config(values: Any, *, origin: str = "configuration") -> RunConfig:
    """Validate a mapping (as read from YAML).

    Raises:
        ConfigError: names each wrong key with its path, value and rule, and the key that was probably meant.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{origin} must be a mapping of sections, got {type(values).__name__}",
            fix="start from: model: NAME, data: {train: ROWS}, output: FOLDER",
        )
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, RunConfig, origin) from None


def as_config(config: RunConfig | str | Path | dict[str, Any]) -> RunConfig:
    """A configuration as it is given to public functions: ready, as a mapping, or the path of a run.yaml.

    Raises:
        ConfigError: as ``parse_config`` and ``load_config``.
    """
    if isinstance(config, RunConfig):
        return config
    return parse_config(config) if isinstance(config, dict) else load_config(config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read run.yaml and apply ``key=value`` overrides with dotted keys (``training.learning_rate=1e-4``).

    Raises:
        ConfigError: the file is missing or not YAML, an override is malformed, or a key or value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", fix="give the path of a run.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", fix="give the path of a UTF-8 YAML file"
        ) from error
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader that refuses repeated keys
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", fix="correct the line named above") from None
    for override in overrides:
        values = apply_override(values, override)
    return parse_config(values, origin=str(path))


def with_lora_defaults(config: RunConfig, *, adapter: bool | None = None) -> RunConfig:
    """Fill in the adapter's defaults, so that the resolved configuration says them.

    Args:
        config: The run.
        adapter: Whether model.name is an adapter; None: look whether it is a local adapter folder.

    Raises:
        ConfigError: model.name is an adapter, and the lora section asks for another.
    """
    if adapter is None:
        adapter = (Path(config.model.name).expanduser() / "adapter_config.json").is_file()
    if adapter and config.lora is not None:
        raise ConfigError(
            f"model.name {config.model.name} is an adapter with a rank and targets; lora asks for a new one",
            fix="remove the lora section to go on training it, or name its base as model.name",
        )
    return config if adapter or config.lora is not None else config.model_copy(update={"lora": LoraOptions()})


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: PyYAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def apply_override(values: Any, override: str) -> Any:
    """A copy of nested ``values`` with one ``key=value`` applied.

    Raises:
        ConfigError: the override is malformed.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"override {override!r} is not of the form key=value", fix="e.g. training.learning_rate=1e-4"
        )
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML", fix="quote the value"
        ) from None
    result = dict(values) if isinstance(values, dict) else {}
    level = result
    for position, part in enumerate(parts[:-1]):
        below = level.get(part) if level.get(part) is not None else {}
        if not isinstance(below, dict):
            reached = ".".join(parts[: position + 1])
            raise ConfigError(
                f"override {override!r}: {reached} is {below!r}, it has no keys below it",
                fix=f"set {reached}=...",
            )
        level[part] = dict(below)
        level = level[part]
    level[parts[-1]] = value
    return result
