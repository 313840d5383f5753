"""Begin a forward pass where a caller uses `model.forward`, which bypasses the model's hooks.

Sentence Transformers is such a caller. Normally the hooks of a parent model begin and end its
passes. If the model is itself a parent model and its hooks have not run, its forward does so.
"""

import functools
import inspect
from typing import Any

from torch import nn

from .passes import Passes


class DirectForward:
    """The forward of a model that is a parent model itself."""

    def __init__(self, parent: nn.Module, passes: Passes):
        self._parent, self._passes = parent, passes
        self._replaced = parent.__dict__.get("forward")  # of Accelerate

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments of the model, which generation and Trainer inspect."""
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Any:
        if self._replaced is not None:
            return self._replaced
        return functools.partial(type(self._parent).forward, self._parent)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = self._passes.find()
        if current is not None and not current.entered:  # the model's hooks have begun it
            current.entered = True
            return self._forward(*args, **kwargs)
        return self._passes.run(self._parent, self._forward, args, kwargs)

    @classmethod
    def attach(cls, parent: nn.Module, passes: Any) -> None:
        """Let `parent.forward` begin a pass."""
        if not isinstance(parent.__dict__.get("forward"), cls):
            parent.__dict__["forward"] = cls(parent, passes)

    @classmethod
    def detach(cls, parent: nn.Module) -> None:
        """Undo `attach`."""
        attached = parent.__dict__.get("forward")
        if isinstance(attached, cls):
            del parent.__dict__["forward"]
            if attached._replaced is not None:
                parent.__dict__["forward"] = attached._replaced
