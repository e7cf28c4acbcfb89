"""``python -m moe_npu.sim`` is ``moe-npu sim``."""

import sys

from moe_npu.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["sim"]
    main()
