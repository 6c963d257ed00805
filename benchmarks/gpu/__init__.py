"""The suite for a GPU: what is launched is compiled, checked, timed beside peers and reported (suite.py).

In a bare checkout, where nothing is installed, the folder kernels/ becomes the package ``hla_kernels`` here, so that
every program of this folder finds it, in whichever process.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("hla_kernels") is None:
    folder = Path(__file__).resolve().parents[2] / "kernels"
    found_spec = importlib.util.spec_from_file_location(
        "hla_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert found_spec is not None and found_spec.loader is not None
    sys.modules["hla_kernels"] = importlib.util.module_from_spec(found_spec)
    found_spec.loader.exec_module(sys.modules["hla_kernels"])
