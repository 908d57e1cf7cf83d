import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

if "hf_case" not in sys.modules:
    spec = importlib.util.spec_from_file_location("hf_case", Path(__file__).parent / "hf_case.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hf_case"] = module
    spec.loader.exec_module(module)
