"""The exception tree: every error a user can meet derives from VisionLoRAError.

VisionLoRAError
├── ConfigError             a setting that cannot work, before any model is touched
├── TargetError             the config does not fit the model: no match, typo, rank too large
│   └── InertAdapterError   an adapter that received no gradient
├── StateError              a verb in the wrong order: merge twice, unknown adapter name
├── AdapterFileError        a file that is not a sound adapter
│   └── BaseMismatchError   a sound adapter, but for another base model
├── DataError               images, labels or splits that cannot be trusted
│   └── ImageError          one unreadable image
└── TrainingError           a run that must stop
    ├── NonFiniteError      NaN or infinity in the loss
    └── ResumeError         a checkpoint that does not fit the run
"""


class VisionLoRAError(Exception):
    """Base of all errors raised on purpose. The message says what was expected, what came and what to do."""


class ConfigError(VisionLoRAError, ValueError):
    """A setting that cannot work."""


class TargetError(VisionLoRAError, ValueError):
    """The config does not fit the model."""


class InertAdapterError(TargetError):
    """An adapter received no gradient, so it would never learn."""


class StateError(VisionLoRAError, RuntimeError):
    """A verb called in the wrong order or with an unknown adapter name."""


class AdapterFileError(VisionLoRAError, ValueError):
    """A file that is not a sound adapter."""


class BaseMismatchError(AdapterFileError):
    """The adapter belongs to another base model."""


class DataError(VisionLoRAError, ValueError):
    """Images, labels or splits that cannot be trusted."""


class ImageError(DataError):
    """One image that cannot be read. The message names the file."""


class TrainingError(VisionLoRAError, RuntimeError):
    """A training run that must stop."""


class NonFiniteError(TrainingError):
    """The loss or a weight is NaN or infinite."""


class ResumeError(TrainingError):
    """A checkpoint that does not fit the run that wants to resume from it."""
