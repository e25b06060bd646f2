"""How every program ends: one line for what a user can mend, a traceback for everything else."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from common.errors import Stopped, UserError, tell

_SIGPIPE = 141  # what a shell gives for a program that ended by it: it is not done


def run_program(
    main: Callable[[Sequence[str]], None], argv: Sequence[str], rank: int = 0, local_rank: int = 0
) -> NoReturn:
    """Run a program and exit: 2 for wrong usage, 1 for data and run-time errors, 130 after Ctrl-C, Stopped's own.

    With --debug among the arguments errors keep their traceback. `rank`, `local_rank`: number of this process in
    its run and on its machine; what all of them find is told by the first of each machine.
    """
    status: int = 0
    try:
        main(argv)
    except Stopped as stopped:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            # the status is to be that of stopping, also where a launcher asks again
            signal.signal(number, signal.SIG_IGN)
        if not rank:
            tell(f"stopped: {stopped}")
        status = stopped.exit_status
    except UserError as error:
        if "--debug" in argv:
            raise
        if not (error.by_all and local_rank):
            place = "" if error.by_all and not rank else error.where or (f"process {rank}" if rank else "")
            tell(f"error: {error}" + (f" ({place})" if place else ""))
        status = error.exit_status
    except KeyboardInterrupt:
        tell("interrupted")
        status = 130
    except BrokenPipeError:  # the reader of the output has gone, e.g. `| head`
        status = _SIGPIPE
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    sys.exit(_written_out(status))


def _written_out(status: int) -> int:
    """The status once all output is written; what cannot be is dropped, and no success then."""
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python puts a status of its own here
            if stream is sys.stdout:
                status = status or (_SIGPIPE if isinstance(error, BrokenPipeError) else 1)
    return status
