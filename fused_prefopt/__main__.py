import sys

from fused_prefopt.cli import main

sys.exit(main())
