"""What an exit status says, for launchers and scripts around them. 128 + n: ended by signal n."""

BAD_INPUT = 2
"""The one line above says which setting, and what to do."""
STOPPED = 75
"""Asked to stop, and everything is saved: start it again to go on (sysexits.h: EX_TEMPFAIL)."""
LOST_PEER = 76
"""Of a rank: another rank is gone. That one is the cause, this one keeps its traceback in run_dir/failures."""
TIMED_OUT = 77
"""Of a rank: another rank did not answer within parallel.timeout_minutes."""
