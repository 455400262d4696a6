"""An HTTP endpoint that scores images: ``fastmaf inspect serve``."""

from fastmaf.extras import require

require("serve", "fastmaf inspect serve")
