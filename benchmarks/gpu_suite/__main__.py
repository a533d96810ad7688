"""python -m benchmarks.gpu_suite OUT"""

import sys

from benchmarks.gpu_suite import bundle

if __name__ == "__main__":
    bundle.use()  # before anything imports the package
    from benchmarks.gpu_suite.runner import main

    sys.exit(main())
