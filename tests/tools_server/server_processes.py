"""What becomes of the processes below a server."""

import os
import time


def survivors(pids):
    """Those of `pids` that are not gone within 10 s."""
    for _ in range(100):
        pids = {pid for pid in pids if os.path.exists(f"/proc/{pid}")}
        if not pids:
            break
        time.sleep(0.1)
    return pids
