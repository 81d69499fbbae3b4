"""Models whose step looks at what is in a tensor, which a rehearsal cannot know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from badam.errors import InputError
from badam.plan import ModelSpec

_SCRIPT = "TorchScript interpreter"  # what torch.jit.script compiled makes real tensors among those without data


@contextmanager
def refusing_what_needs_values(model: ModelSpec) -> Iterator[None]:
    """Turn torch's complaint that a tensor without data was looked into to a sentence about the model.

    Raises:
        InputError: with the operator and the version of transformers whose model it is.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise _refusal(model, f"{error.func} needs values of a tensor, or has no rule for its shape") from error
    except RuntimeError as error:
        if _SCRIPT not in str(error):
            raise
        raise _refusal(model, "a part of it was compiled by torch.jit.script") from error


def _refusal(model: ModelSpec, why: str) -> InputError:
    return InputError(
        f"{model.id} cannot be planned with transformers {transformers.__version__}: {why}, and a rehearsal has "
        "shapes only.",
        advice="A newer transformers may have written the model differently.",
    )
