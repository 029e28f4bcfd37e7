"""Fixtures shared by the tests of the core."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("checks")
torch.set_num_threads(1)  # networks this small only lose by more
