"""Where the agents of a launch agree, and how an agent that comes later finds those that run already.

*Contract*: each meeting of the agents (torch's rendezvous) has an agreement of its own, under a name that its first
agent makes up. The store remembers the newest. An agent that starts joins it in place if somebody gives signs of life
there, and if there is room for one host more; it waits for room.

*Cost*: nothing in a store in which no agents have met; otherwise a second of watching.
"""

import time
import uuid
from typing import Any

from disttrain.launching.generations import AgreementStore
from disttrain.launching.membership import Agreement
from disttrain.launching.procedures import Beats
from disttrain.launching.recovery_variables import Recovery

_ROOT = "disttrain/recovery/"
_MEETING = "disttrain/recovery"
_SIGNS_WITHIN_S = 2.0
_ROOM_EVERY_S = 1.0


def agreement_of(handler: Any, meeting: Any, is_first: bool, silence_s: float) -> Recovery:
    """Return where the agents that have just met agree; `meeting` is a store of this meeting alone."""
    newest = _newest(handler)
    if is_first:
        nonce = uuid.uuid4().hex
        handler.store.set(newest, nonce)
        meeting.set(_MEETING, nonce)
    return _at(handler, meeting.get(_MEETING).decode(), silence_s)


def join_running(handler: Any, silence_s: float) -> Recovery | None:
    """Return where the agents of this launch agree whose ranks run already; None if none run."""
    newest = _newest(handler)
    if not handler.store.check([newest]):
        return None
    where = _at(handler, handler.store.get(newest).decode(), silence_s)
    place = AgreementStore(where)
    while _is_running(place):
        state = place.state()
        if len(state.came) - len(_silent_hosts(state)) < handler.most:
            return where
        time.sleep(_ROOM_EVERY_S)
    return None


def _newest(handler: Any) -> str:
    return f"{_ROOT}newest/{handler.get_run_id()}"


def _at(handler: Any, nonce: str, silence_s: float) -> Recovery:
    return Recovery(handler.store.host, handler.store.port, _ROOT + nonce, "", silence_s)


def _silent_hosts(state: Agreement) -> set[str]:
    """Return the hosts all of whose ranks are silent or gone."""
    living = {name.rpartition("/")[0] for name in state.alive if name not in state.away}
    return {*state.came} - living


def _is_running(place: AgreementStore) -> bool:
    """Return True if the ranks of this agreement run: nothing ends them, and an agent gives signs of life."""
    before: dict[str, str] = {}
    deadline = time.monotonic() + _SIGNS_WITHIN_S
    while time.monotonic() < deadline:
        state = place.state()
        if state.restart is not None or state.finished or not state.alive:
            return False
        signs = dict(zip(state.came, place.run(_signs(state.came)), strict=True))
        if any(before.get(host, sign) != sign for host, sign in signs.items()):
            return True
        before = {**signs, **before}
        time.sleep(_ROOM_EVERY_S / 10)
    return False


def _signs(hosts: tuple[str, ...]) -> Any:
    return (yield Beats(hosts))
