"""LLaMA-Factory: its own command, its own configuration, and the losses of this package.

It has no hook for a trainer or a loss, so `launch.run` puts its own in place before the command.
"""

from fused_prefopt.checks import require_packages, require_version

require_version("llamafactory")
require_packages(__name__, "llamafactory")
