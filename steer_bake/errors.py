"""The exceptions steer-bake raises for anything a user can put right.

    SteerBakeError
    ├── RecipeError            the recipe, an option, a site or a prompt set asks for something that is not there
    ├── UnknownArchitecture    no file in architectures/ describes this model type
    ├── NotFoldable            the intervention has no exact home in this model's weights
    ├── CheckpointError        a model folder or one of its files is missing, damaged, unsafe or unwritable
    ├── ExtractionError        the activations cannot be read or are not numbers
    ├── JudgeFailed            a judge cannot be asked, or left too many answers without a label
    ├── ValidationFailed       what is on disk does not compute what the hooks compute
    └── PublishError           the hub refused, or publishing would be unsafe

Every message says what was asked, what is there, and what to do next. The library never prints or exits; the
command line turns these into one sentence and a non-zero exit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteerBakeError(Exception):
    """Root of the tree: catch this to catch everything steer-bake raises on purpose."""


class RecipeError(SteerBakeError):
    """The request itself cannot be carried out: a recipe key, an option, a site or a prompt set."""


class UnknownArchitecture(SteerBakeError):
    """No file in ``architectures/`` claims the model's ``model_type``."""


class NotFoldable(SteerBakeError):
    """The intervention cannot be held exactly by this model's tensors."""


class CheckpointError(SteerBakeError):
    """A model folder or a file in it is missing, damaged, unsafe or cannot be written."""


class ExtractionError(SteerBakeError):
    """Activations could not be read, or contain NaN or infinity."""


class JudgeFailed(SteerBakeError):
    """A judge could not be reached or asked, or left too many answers without a label."""


class ValidationFailed(SteerBakeError):
    """The candidate on disk does not compute the same function as the hooked reference."""


class PublishError(SteerBakeError):
    """Publishing was refused, by the hub or by a safety check."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence naming the closest known word, or all of them: ``"did you mean 'sites'?"``."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "nothing is known here"
