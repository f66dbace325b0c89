"""Has the program FAULT_OF do what FAULT says ("hang", "garbage" for the native engine's runner, or an exit status) once the file FAULT_WHEN is there.

Python runs this at its start wherever the folder is in PYTHONPATH.
"""

import ctypes
import os
import signal
import threading
import time


def main():
    with open("/proc/self/cmdline", "rb") as f:
        words = f.read().split(b"\0")
    if os.environ.get("FAULT_OF", "").encode() not in [os.path.basename(w) for w in words[:4]]:
        return
    what, when = os.environ["FAULT"], os.environ["FAULT_WHEN"]

    def wait():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not os.path.exists(when):
            time.sleep(0.05)
        try:
            os.unlink(when)  # of several processes one does it
        except FileNotFoundError:
            return
        if what == "garbage":
            for fd in os.listdir("/proc/self/fd"):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                        os.write(int(fd), b"Segmentation fault")
                except OSError:
                    pass  # that of the listing, which is closed
            return
        if what != "hang":
            os._exit(int(what))
        libc = ctypes.PyDLL(None)  # its calls keep the interpreter: no other thread goes on
        while True:
            libc.sleep(1 << 30)

    threading.Thread(target=wait, daemon=True).start()


main()
