"""python -m medseg_jax.cli"""

import sys

from medseg_jax.cli import main

sys.exit(main())
