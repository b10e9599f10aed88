"""`python -m gdro.comparison.child ARGUMENTS` is `gdro ARGUMENTS` that ends with the process that started it.

Its standard input is a pipe whose other end the parent holds: it closes however the parent ends, kill -9 included.
"""

import _thread
import os
import sys
import threading
import time

GRACE_SECONDS = 10.0


def end_with_parent() -> None:
    """Wait for the pipe to close; then interrupt the work as Ctrl-C does, and soon after for certain."""
    sys.stdin.buffer.read()
    _thread.interrupt_main()
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    from gdro.cli import main

    sys.exit(main())
