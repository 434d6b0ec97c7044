"""A plugin for ms-swift: ``swift rlhf --external_plugins examples/frameworks/ms_swift_plugin.py``.

ms-swift takes plugins by their paths, not by dotted names; see `docs/ms-swift.md`.
"""

import fused_prefopt.integrations.ms_swift  # noqa: F401
