"""What a driver tells its node to bring the packages of its runtime environment into the control store.

    driver                                node
      | -- OfferPackage ------------------> |  is it in the control store?
      | <- PackageAnswer (is_there) ------- |  if so, that is all
      | -- SendPackage (offset 0) --------> |
      | <- PackageAnswer ------------------ |
      | -- SendPackage ... the last ------> |  checks the digest, puts it into the control store
      | <- PackageAnswer (is_there) ------- |

One chunk is under way at a time, so that a package never waits in a socket's queue with tasks behind it.
"""

from __future__ import annotations

from clusterpool.core.messages import Message

# Of all files of a package before they are compressed, and so of the package too. Higher sends folders that
# were never meant to be sent; lower refuses programs with some data beside them. Ray's limit is 500 MiB.
PACKAGE_BYTES_MAX = 256 * 1024 * 1024


class OfferPackage(Message, frozen=True):
    """I have a package of this SHA-256 digest; do you need its content?"""

    request: int
    digest: str
    size_bytes: int


class SendPackage(Message, frozen=True):
    """A piece of the package offered last, in order."""

    request: int
    digest: str
    offset: int
    chunk: bytes


class PackageAnswer(Message, frozen=True):
    """Answer to both. `is_there`: the control store has the whole package. `error`: why it never will."""

    request: int
    is_there: bool
    error: str = ""
