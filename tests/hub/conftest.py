"""The kernel hub's repository, written once for each file of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_prefopt.cli.hub import NAME
from fused_prefopt.cli.main import main


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("kernel_hub") / NAME
    assert main(["hub", str(output)]) == 0
    return output
