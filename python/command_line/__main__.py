import sys

from distill_kernels.api.command_line import main

sys.exit(main())
