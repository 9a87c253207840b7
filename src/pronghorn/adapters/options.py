"""What a LoRA adapter should look like, validated when it is written down."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pronghorn.errors import AdapterError, NotSupportedError

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
_BIASES = ("none", "all", "lora_only")
# these move part of the base's weights into the adapter (or round the base to what a quantiser keeps)
_BASE_CHANGING = MappingProxyType(
    {
        "pissa": "moves the base's largest singular values into the adapter",
        "olora": "moves an orthogonal part of the base into the adapter",
        "corda": "moves a part of the base chosen from data into the adapter",
        "lora_ga": "subtracts its first step from the base",
        "loftq": "replaces the base by a quantised one",
    }
)


def check_keeps_base(init: object) -> None:
    """Refuse an initialisation that changes the base's weights.

    Raises:
        NotSupportedError: it is one of them.
    """
    name = init.lower() if isinstance(init, str) else ""
    root = next((known for known in _BASE_CHANGING if name.startswith(known)), None)
    if root is not None:
        raise NotSupportedError(
            f"init_lora_weights={init!r} {_BASE_CHANGING[root]}: the adapter would no longer belong to "
            "the base on disk, and merging it onto those files gives a wrong model",
            fix='train with init_lora_weights=True or "gaussian"; convert a trained one with PEFT '
            "(path_initial_model_for_weight_conversion)",
        )


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of ``attach_lora``. Raises AdapterError or NotSupportedError on values that cannot work."""

    r: int = 16
    """Rank."""
    alpha: float = 16
    """The update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    targets: str | tuple[str, ...] | list[str] = ALL_LINEAR
    """"all-linear", a list of module names (last parts or full names), or one regex over full names."""
    target_parameters: tuple[str, ...] | list[str] = ()
    """Further parameters by name, such as stacked experts ("experts.gate_up_proj")."""
    bias: str = "none"
    """Which biases train: none, all, lora_only."""
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] | list[str] = ()
    """Modules trained in full and saved whole."""
    layers: tuple[int, ...] | list[int] | int | None = None
    """Only these layer indices; None means all."""
    last_layers: int | None = None
    """Only this many layers at the end; None means all."""
    layers_pattern: str | tuple[str, ...] | list[str] | None = None
    """Name of the list whose index is the layer ("layers"), where a name has another number before it."""
    init: bool | str = True
    """True (A random, B zero), "gaussian", "orthogonal" or False (both random: the model changes at once)."""
    tied: Literal["keep", "untie"] | None = None
    """For training embed_tokens or lm_head of a model that ties them: keep them one, or separate them."""
    seed: int = 3407
    """Seed of A; the global random streams are not touched."""

    def __post_init__(self) -> None:
        """Check each value."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise AdapterError(
                f"the rank r is {self.r!r}", fix="give a whole number of at least 1, such as 16"
            )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not self.alpha > 0:
            raise AdapterError(f"lora_alpha is {self.alpha!r}", fix="give a number above 0, such as the rank")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise AdapterError(
                f"lora_dropout is {self.dropout!r}", fix="give a number from 0 up to, not including, 1"
            )
        if self.bias not in _BIASES:
            raise AdapterError(f"bias is {self.bias!r}", fix=f"choose one of {', '.join(_BIASES)}")
        if self.tied not in (None, "keep", "untie"):
            raise AdapterError(f"tied is {self.tied!r}", fix='choose "keep" or "untie"')
        if not self.targets and not self.target_parameters and not self.modules_to_save:
            raise AdapterError("no target is named", fix=f'name modules, or use "{ALL_LINEAR}"')
        if self.layers is not None and self.last_layers is not None:
            raise AdapterError("layers and last_layers are both set", fix="keep one of them")
        if self.last_layers is not None and self.last_layers < 1:
            raise AdapterError(
                f"last_layers is {self.last_layers!r}", fix="give a whole number of at least 1"
            )
        if self.layers_pattern and self.layers is None and self.last_layers is None:
            raise AdapterError("layers_pattern is set without layers", fix="name the layers, or leave it out")
        self._check_init()

    def _check_init(self) -> None:
        name = self.init.lower() if isinstance(self.init, str) else self.init
        check_keeps_base(name)
        if name not in (True, False, "gaussian", "orthogonal"):
            raise NotSupportedError(
                f"init_lora_weights={self.init!r} is not known here",
                fix='use True, False, "gaussian" or "orthogonal"',
            )
        if name == "orthogonal" and self.r % 2:
            raise AdapterError(f'init "orthogonal" needs an even rank, r is {self.r}', fix="use an even r")
