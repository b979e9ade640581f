"""The exceptions: one for each kind of error of the store, each of them also the built-in that one would catch.

The message names the operation, the key, the values and the remedy.
"""


class Error(Exception):
    """Any error of the store."""

    # KeyError would show the message in quotes.
    __str__ = Exception.__str__


class NotFound(Error, KeyError):
    """No object has this key."""

    __str__ = Exception.__str__


class AlreadyExists(Error, ValueError):
    """An object with this key exists, and the call asked for a new one."""


class NoSpace(Error, MemoryError):
    """The tier has no room, after eviction did what it could."""


class TooLarge(Error, ValueError):
    """The object can never fit, or a length is over its limit."""


class Busy(Error, RuntimeError):
    """A bounded resource is in use; asking again later can succeed."""


class TimedOut(Error, TimeoutError):
    """The deadline passed first."""


class Unavailable(Error, ConnectionError):
    """Something that the call needs is not here: the node, a GPU, a path without copies."""


class PeerLost(Error, ConnectionError):
    """The node at the other end went away."""


class Stale(Error, RuntimeError):
    """What was named has been replaced or withdrawn meanwhile."""


class Corrupt(Error, ValueError):
    """Bytes are not what their checksum or format says."""


class Protocol(Error, ConnectionError):
    """The other end does not speak this protocol, or this version of it."""


class Denied(Error, PermissionError):
    """The caller may not do this."""


class Os(Error, OSError):
    """The operating system refused."""


class Invalid(Error, ValueError):
    """An argument is outside what the call accepts."""
