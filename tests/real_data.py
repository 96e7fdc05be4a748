"""Photographs with ground truth that may lie beside the checkout; tests that need them are skipped without."""

from pathlib import Path

import pytest

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="there is no real data beside the checkout")
