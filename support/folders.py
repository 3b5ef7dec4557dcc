"""A folder that is there whole or not at all."""
import contextlib
import errno
import shutil
from pathlib import Path

from support import system
from support.system import BadInput


@contextlib.contextmanager
def filled_beside(folder):
    """`with filled_beside(folder) as part`: an empty folder beside the place of `folder`.

    The caller fills it, then renames it, or a folder in it. Afterwards `part` is gone, whatever
    happens. It also removes what a killed run left. A second process waits for the first.
    Raises BadInput when the disk refuses.
    """
    place, lock = Path(folder).absolute(), None
    part = place.with_name(f"{place.name}.ce-clip-part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = system.lock(place.with_name(f".{place.name}.lock"), wait=True)       # an empty file
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
            lock.close()
