"""`python -m gdro.tools.comparison.child MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` that ends with its parent.

Its standard input is a pipe whose other end the parent holds: it closes however the parent ends, kill -9 included.
"""

import _thread
import os
import runpy
import signal
import sys
import threading
import time

GRACE_SECONDS = 10.0
INTERRUPTED = 130  # exit code: no failure of the job's own


def end_with_parent() -> None:
    """From now on, when the pipe closes the main thread is interrupted as by Ctrl-C, and soon after ended for certain.

    Called in the main thread.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    main = threading.get_ident()

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written: it returns at the end; sys.stdin would hold a lock at exit
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signal.SIGINT)
        else:  # Windows
            _thread.interrupt_main()
        time.sleep(GRACE_SECONDS)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
