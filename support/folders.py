"""A folder that is there whole or not at all."""
import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

from support.system import BadInput


@contextlib.contextmanager
def filled_beside(folder):
    """`with filled_beside(folder) as part`: an empty folder beside the place of `folder`.

    The caller fills it, then renames it, or a folder in it. Afterwards `part` is gone, whatever
    happens. It also removes what a killed run left. A second process waits for the first.
    Raises BadInput when the disk refuses.
    """
    part, lock = Path(f"{Path(folder).absolute()}.ce-clip-part"), None
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(part.parent, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)                    # the system releases it with the process
        if part.is_dir():
            shutil.rmtree(part)
        part.mkdir()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            remedy = "; make room, or name another place"
        raise BadInput(f"{folder}: cannot be made ({str(error)[:300]}){remedy}") from None
    finally:
        if lock is not None:
            os.close(lock)
