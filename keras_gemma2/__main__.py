"""`python -m keras_gemma2` is the program `keras-gemma2`."""

import sys

from keras_gemma2.cli import main

sys.exit(main())
