"""Wrong: a feature is the hour of a time stamp, in the time zone of the machine.

All processes of one machine agree, so `disttrain verify --quick` finds nothing. `disttrain verify` gives each life
another time zone, and reports that it is the cause.
"""

from datetime import datetime

from sound import Digits, fields

from disttrain import Config


class WithHour(Digits):
    """Scans that are darker in the afternoon; the time stamps are an hour apart."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(len(self)):
            self.x[index] *= 1 - datetime.fromtimestamp(3600 * index).hour / 100


config = Config(**{**fields, "train_data": WithHour})
