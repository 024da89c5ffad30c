"""Turn source into a Python module. The text lives in `linecache`, for Triton and tracebacks; no file is written."""

from __future__ import annotations

import hashlib
import linecache
import types


def load_source(source: str, name: str) -> types.ModuleType:
    """Execute a generated module. Its pseudo file name carries a digest, so that two variants never share one."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    filename = f"<attncc {name} {digest}>"
    # an entry without a modification time is never dropped by linecache.checkcache
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(f"attncc_generated_{digest}")
    module.__file__ = filename
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
