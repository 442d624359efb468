"""Imported first by the loader's fork server: signals meant for the trainer must not reach it or its workers.

A terminal, torchrun and schedulers signal whole process groups; workers that die then look like a bad clip. The trainer
decides when to stop, and its workers end with it.
"""

import os
import signal

os.setpgid(0, 0)
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(_number, signal.SIG_IGN)
