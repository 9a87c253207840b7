"""The trackers a run may report to are transformers' own; a name is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from pronghorn.errors import ConfigError, MissingDependencyError


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what transformers does not know, or cannot import.

    Raises:
        ConfigError: an unknown tracker; the message lists the known ones.
        MissingDependencyError: its package is not installed.
    """
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ConfigError(
                f"logging.report_to: {error}", fix="correct the name, or leave it out"
            ) from None
        if name not in get_available_reporting_integrations():
            raise MissingDependencyError(
                f"logging.report_to: {name} is not installed", fix=f"pip install {name}"
            )
