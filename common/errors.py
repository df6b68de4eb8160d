"""The mistakes that a user can make, told in one line each."""


class FedcopraError(ValueError):
    """A mistake in what the user gave; the command line shows it as one line and exits with 2."""


class ConfigError(FedcopraError):
    """An experiment that cannot be meant: unknown key, wrong type, impossible combination."""


class DataError(FedcopraError):
    """A task, a shard or a record on disk that cannot be used as it is."""


class UpdateRefusedError(FedcopraError):
    """Tensors that arrived are not what was asked for: names, shapes or values."""
