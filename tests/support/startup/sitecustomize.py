"""What every Python that a story starts does first, by PYTHONPATH: a .gguf file is taken apart once in a process.

transformers does so three times for each model that it loads, in seconds of Python each.
"""

import functools
import os

try:
    import gguf
except ImportError:
    pass
else:

    @functools.cache
    def _read(path, version, mode, read=gguf.GGUFReader):
        return read(path, mode)

    def _reader(path, mode="r"):
        status = os.stat(path)
        return _read(os.path.realpath(path), (status.st_ino, status.st_mtime_ns), mode)

    gguf.GGUFReader = _reader
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
