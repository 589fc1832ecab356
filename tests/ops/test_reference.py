"""The specification's own linear ops, which no kernel falls back to: the ops and they agree."""

from __future__ import annotations

import pytest
import torch

from diffcore import ops, reference
from support.cases import NOISE_TABLE, steps_of

ALPHA, SIGMA = NOISE_TABLE[steps_of(5)].unbind(1)
# The formulas of v hold where alpha^2 + sigma^2 = 1, those of flow where alpha + sigma = 1.
LEVELS = {"numbers": [(0.8, 0.6), (0.7, 0.3)], "per sample": [(ALPHA, SIGMA), (1 - SIGMA, SIGMA)]}


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_linear_ops_are_their_specification(levels: list[tuple[object, object]]) -> None:
    x, y = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    calls = [(name, levels[0], {}) for name in ("add_noise", "velocity")]
    for kind in ops.PREDICTION_TYPES:
        pair = levels[kind == "flow_prediction"]
        options = {"prediction_type": kind}
        names = ("predict_x0", "predict_epsilon", "classifier_guidance")
        calls += [(name, pair, options) for name in names]
    for name, pair, options in calls:
        found, wanted = (getattr(where, name)(x, y, *pair, **options) for where in (ops, reference))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
