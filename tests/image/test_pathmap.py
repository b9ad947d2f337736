"""Values by path, against the plain dictionary that they stand for."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from containerkit.image.layers.members import is_below
from containerkit.image.layers.pathmap import PathMap

PATHS = st.lists(st.sampled_from([b"a", b"b", b"ab", b"c"]), max_size=5).map(b"/".join)


class Machine(RuleBasedStateMachine):
    """Everything that can be done to one, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = PathMap[int]()
        self.model: dict[bytes, int] = {}

    @rule(path=PATHS, value=st.integers())
    def put(self, path: bytes, value: int) -> None:
        self.paths[path] = value
        self.model[path] = value

    @rule(path=PATHS)
    def discard(self, path: bytes) -> None:
        self.paths.discard(path)
        self.model.pop(path, None)

    @rule(path=PATHS.filter(bool))
    def drop(self, path: bytes) -> None:
        self.paths.drop(path)
        self.model = {each: value for each, value in self.model.items() if each != path and not is_below(each, path)}

    @rule(path=PATHS)
    def look(self, path: bytes) -> None:
        assert (path in self.paths) == (path in self.model)
        below = self.paths.below(path)
        assert sorted(below) == sorted(each for each in self.model if is_below(each, path))
        places = {each: place for place, each in enumerate(below)}
        assert all(places.get(os.path.dirname(each), -1) < place for each, place in places.items())

    @invariant()
    def same(self) -> None:
        assert dict(self.paths.items()) == self.model
        assert set(self.paths) == self.model.keys()
        assert bool(self.paths) == bool(self.model)


TestPathMap = Machine.TestCase
TestPathMap.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
