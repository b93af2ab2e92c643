import signal

# Where pytest was started in the background, SIGINT is ignored, and whatever a test starts to interrupt inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
