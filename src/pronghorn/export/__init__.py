"""Hand a trained model over: plan, write, verify.

``pronghorn.export`` is both this room and the public function ``export``: importing a submodule binds the
room's name on the package, so the room itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from pronghorn.export.run import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
