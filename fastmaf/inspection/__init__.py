"""Visual inspection: fitted to good images, finds and locates defects at a guaranteed false-alarm rate."""

from fastmaf.extras import require

require("inspection", "fastmaf.inspection")
