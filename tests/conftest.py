"""What every test starts with, wherever pytest itself was started."""

import signal

# A shell starts jobs in the background with SIGINT ignored, and so would our children be.
signal.signal(signal.SIGINT, signal.default_int_handler)
