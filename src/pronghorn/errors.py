"""Every error pronghorn raises on purpose.

    PronghornError                  exit code 1
    ├── InputError (ValueError)     2   what the user gave cannot be used
    │   ├── ConfigError                 an option or a line of run.yaml
    │   ├── SourceError                 a model or adapter folder, a hub id, a weight file
    │   ├── AdapterError                an adapter that does not fit its base, or its options
    │   ├── DataError                   rows, templates, masks
    │   └── NotSupportedError           asked for something pronghorn does not do (yet)
    ├── MissingDependencyError (ImportError)  2   an optional library is not installed
    ├── TrainingError (RuntimeError) 1
    │   ├── NonFiniteLossError      3   the loss is NaN or infinite
    │   ├── OutOfMemoryError        4   the device ran out of memory
    │   ├── RunConflictError        2   the run folder belongs to another configuration
    │   └── Preempted               75  stopped by a signal, checkpoint written: start again to go on
    └── ExportError (RuntimeError)  1   nothing was written under the final name
        └── VerificationError       1   the written folder breaks a promise, or could not be checked

A message names the thing, its value and the rule it breaks; ``fix`` is the way out, shown on its own line.
"""

from __future__ import annotations


class PronghornError(Exception):
    """Base of the tree. ``str(error)`` is the message followed by the fix, if there is one."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class InputError(PronghornError, ValueError):
    """What the user gave cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """An option, or a line of run.yaml, is unknown, malformed or contradicts another."""


class SourceError(InputError):
    """A model or adapter folder, a hub id or a weight file cannot be used."""


class AdapterError(InputError):
    """An adapter does not fit its base, its files are incomplete, or its options cannot work."""


class DataError(InputError):
    """Rows, a chat template or a loss mask cannot be used."""


class NotSupportedError(InputError):
    """A known request that pronghorn does not serve; the message says what to do instead."""


class MissingDependencyError(PronghornError, ImportError):
    """An optional library is needed and not installed; the fix is its install command."""

    exit_code = 2


class TrainingError(PronghornError, RuntimeError):
    """A run stopped before its end."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite; no weights of that step were kept."""

    exit_code = 3


class OutOfMemoryError(TrainingError):
    """The device ran out of memory; the fix names the setting to change."""

    exit_code = 4


class RunConflictError(TrainingError):
    """The run folder holds a run of another configuration."""

    exit_code = 2


class Preempted(TrainingError):
    """A signal stopped the run after its checkpoint was written; running again goes on from there."""

    exit_code = 75


class ExportError(PronghornError, RuntimeError):
    """An export stopped; nothing appeared under the final name."""


class VerificationError(ExportError):
    """A folder breaks a promise, or it could not be checked."""
