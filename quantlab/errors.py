"""The tree of errors that a user can cause; everything else is a bug of ours.

UserError (probes.errors)   one sentence on stderr, exit code 2
├── ProbeError (probes)     a place in the model that cannot be observed
├── CheckpointError         a checkpoint that is missing, unsafe, damaged or unknown
├── ConfigError             a configuration key, value or option
├── SchemeError             a scheme name, or a scheme that this model cannot take
├── DataError               a text or task file
├── CalibrationError        a model or text that calibration cannot use, or statistics that are not this model's
├── EvaluationError         a model and a task that do not fit together
├── RecordError             a record that is damaged or from another format
├── VerificationError       a folder that is not what it is said to be
├── TrainingError           a training that ended before its time
└── OutputError             a place where results cannot be written
"""

from probes.errors import ProbeError, UserError, nearest

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvaluationError",
    "OutputError",
    "ProbeError",
    "RecordError",
    "SchemeError",
    "TrainingError",
    "UserError",
    "VerificationError",
    "nearest",
]


class CheckpointError(UserError):
    """A checkpoint that is missing, unsafe, damaged or of an unknown architecture."""


class ConfigError(UserError):
    """A configuration key, value or command-line option that cannot be honoured."""


class SchemeError(UserError):
    """A scheme name that does not parse, or a scheme that this model cannot take."""


class DataError(UserError):
    """A text or task file that cannot be read or used."""


class CalibrationError(UserError):
    """A model or text that calibration cannot use, or stored statistics that are damaged or another model's."""


class EvaluationError(UserError):
    """A model, tokenizer and task that do not fit together."""


class RecordError(UserError):
    """A record that is damaged, or was written by another format version."""


class OutputError(UserError):
    """A place where results cannot be written."""


class TrainingError(UserError):
    """A training that ended before its time."""


class VerificationError(UserError):
    """A folder of low-bit weights that is not what was written, or that no engine loads as it was meant."""
