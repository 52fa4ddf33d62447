"""Exceptions for the failures that a user can cause while building or loading a decoder, as one tree."""


class DecoderError(Exception):
    """Base class. The message is one line: what was wrong, where, and what is wanted."""


class CorpusError(DecoderError):
    """A corpus is missing, empty, too small or not UTF-8."""


class ManifestError(DecoderError):
    """An artifact on disk doesn't match what made it, or is incomplete."""


class PackageError(DecoderError):
    """A decoder or base folder can't be used: files missing, weights broken, config unreadable."""


class TokenizerMismatch(PackageError):
    """Decoder and base map some token to different ids, so their distributions can't be mixed."""


class OptionError(DecoderError):
    """A command-line option or configuration key has an unusable value."""
