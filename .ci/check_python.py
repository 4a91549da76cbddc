"""Says, before anything is downloaded, what this interpreter lacks for `make demo` and `make test`."""

import importlib.util
import os
import sys
import sysconfig

version = f"{sys.version_info.major}.{sys.version_info.minor}"
if not (3, 11) <= sys.version_info[:2] < (3, 13):
    # numpy 1.26, which Triton's Python stub needs, has no wheels beyond 3.12.
    sys.exit(f"Python {version} cannot run this: install 3.11 or 3.12 and run make PYTHON=python3.11")
if importlib.util.find_spec("ensurepip") is None:
    sys.exit(f"Python {version} cannot make virtual environments: apt-get install python{version}-venv")
library = f"libpython{version}.so.1.0"
libdir = sysconfig.get_config_var("LIBDIR") or ""
multiarch = sysconfig.get_config_var("MULTIARCH") or ""
folders = (libdir, os.path.join(libdir, multiarch), os.path.join(sys.base_prefix, "lib"))
if not any(os.path.isfile(os.path.join(folder, library)) for folder in folders):
    sys.exit(f"{library} is missing, which Triton's Python backend loads: apt-get install libpython{version}")
