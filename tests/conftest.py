"""What holds for every test."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs this in the background has Ctrl-C ignored, and so would every child that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
