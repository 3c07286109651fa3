"""Contenders x jobs over one transport on one backing, interleaved: every job runs on one contender after the other before the next job."""

import time

from . import fio
from .contenders import Place, start_all
from .server import BenchError


def measure(cells, backing, transport, folder, options, say):
    """Adds `options.rounds` samples to each cell. Fewer rounds (but one) where `options.deadline` would be passed."""
    place = Place(folder, options.size, transport, options.binary)
    contenders = start_all(options.contenders, place, say)
    try:
        for contender in contenders:
            fio.fill(contender)
        for number in range(options.rounds):
            began = time.monotonic()
            one_round(cells, backing, transport, contenders, number, options, say)
            took = time.monotonic() - began
            say(f"{backing}, {transport}: round {number + 1} of {options.rounds} done in {took:.0f} s")
            if options.deadline and time.monotonic() + took > options.deadline and number + 1 < options.rounds:
                say(f"stopped after {number + 1} rounds: another would take longer than wanted")
                break
    finally:
        for contender in contenders:
            contender.remove()


def one_round(cells, backing, transport, contenders, number, options, say):
    # Who comes first is another one each round: what one leaves behind is not always the same one's burden.
    turn = number % max(len(contenders), 1)
    for job in options.jobs:
        for contender in [*contenders[turn:], *contenders[:turn]]:
            if options.quick and contender.server is None and job.endswith("-x4"):
                continue
            try:
                figures = fio.run(contender, job, options.seconds)
            except BenchError as error:
                if contender.name == "nbdmirror":
                    raise
                say(f"no figure: {contender.name}, {job}: {error}")
                continue
            cells.add(backing, transport, contender.name, job, figures)
            if backing == "disk" or not contender.place.direct:
                contender.settle()
