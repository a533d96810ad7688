import sys

from benchmarks.gpu_suite.suite import main

sys.exit(main())
