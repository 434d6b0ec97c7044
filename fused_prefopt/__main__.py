import sys

from fused_prefopt.cli.main import main

sys.exit(main())
