"""The smallest object with a state, for tests of what saves and loads objects."""

from collections.abc import Mapping


class Number:
    """The smallest object with a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.value = state["value"]
