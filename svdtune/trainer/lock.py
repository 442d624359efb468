"""A lock that the kernel frees when its process dies, and nothing that a dead machine leaves behind. No torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EPERM)


@contextmanager
def held(path: Path, *, timeout: float) -> Iterator[bool]:
    """Hold the lock file `path`; False where the mount knows no locks, as buckets often do. Raises filelock.Timeout.

    There is no other kind of lock to fall back to: a file that says "locked" outlives a spot machine that was taken away.
    """
    # filelock 4 lets go of the lock in forked children; otherwise loader workers would hold it after a kill
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()
