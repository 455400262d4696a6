"""The published run on images of capsules: synthetic data, training, sampling, evaluation, reproduction."""

from fastmaf.extras import require

require("inspection", "fastmaf.capsule")
