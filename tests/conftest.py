"""What holds for all tests: one thread, set before anything numerical is loaded.

Sums over other numbers of threads round otherwise, so runs in this process and in child processes must agree; one
thread is also what two busy cores can give.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
