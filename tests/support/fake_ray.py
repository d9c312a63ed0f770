"""A fake of Ray for the driver of a capture: one process, one call at a time, and actors that die on request.

A seed decides which actor goes next, so that whatever a driver does can be repeated.
"""

import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np


class FakeRayError(Exception):
    """Base of the errors of a call."""


class FakeTaskError(FakeRayError):
    """A call raised an error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class DiedError(BaseException):
    """Raised in an actor to end the actor."""


class Ref:
    """A value, pickled like Ray's, or the call of an actor that will return it."""

    def __init__(
        self, value: Any = None, *, actor: "Actor | None" = None, call: tuple[str, tuple[Any, ...]] = ("", ())
    ):
        self.actor, self.call = actor, call
        self.data = None if actor else pickle.dumps(value)
        self.error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.data is not None or self.error is not None


class Actor:
    """An actor, and its calls that have not started."""

    def __init__(self, ray: "FakeRay", instance: Any, number: int) -> None:
        self.ray, self.instance, self.number = ray, instance, number
        self.waiting: list[Ref] = []
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(remote=lambda *args: self.submit(name, args))

    def submit(self, name: str, args: tuple[Any, ...]) -> Ref:
        ref = Ref(actor=self, call=(name, args))
        self.waiting.append(ref)
        if self.is_dead:
            self.die()
        return ref

    def die(self) -> None:
        self.is_dead = True
        for ref in self.waiting:
            ref.error = FakeRayError(f"The actor {self.number} died unexpectedly.\nMore lines.")
        self.waiting.clear()


Deadly = Callable[[str, Actor], bool]
"""Takes the name of a call that is about to run, or `after` and its name, and says whether the actor dies then."""


class FakeRay:
    """Replaces the module `ray`."""

    exceptions = types.SimpleNamespace(RayError=FakeRayError, RayTaskError=FakeTaskError)

    def __init__(self, seed: int = 0, deadly: Deadly = lambda _name, _actor: False) -> None:
        self.actors: list[Actor] = []
        self._rng, self._deadly = np.random.default_rng(seed), deadly

    def is_initialized(self) -> bool:
        return True

    def available_resources(self) -> dict[str, float]:
        return {}

    def remote(self, kind: type) -> Any:
        def start(*args: Any) -> Actor:
            instance = kind(*pickle.loads(pickle.dumps(args)))
            self.actors.append(Actor(self, instance, len(self.actors)))
            return self.actors[-1]

        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=start))

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get(self, ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        assert ref.data is not None
        return pickle.loads(ref.data)

    def kill(self, actor: Actor) -> None:
        actor.die()

    def wait(self, refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        """Run calls until this many have ended, or until all actors are idle."""
        while timeout and sum(ref.is_done for ref in refs) < num_returns:
            busy = [actor for actor in self.actors if actor.waiting]
            assert busy, "the driver waits for what nobody does"
            self._step(busy[self._rng.integers(len(busy))])
        ready = [ref for ref in refs if ref.is_done][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def _step(self, actor: Actor) -> None:
        ref = actor.waiting[0]
        name, args = ref.call
        try:
            self._perhaps_die(name, actor)
            sent = [self.get(arg) if isinstance(arg, Ref) else pickle.loads(pickle.dumps(arg)) for arg in args]
            value = pickle.dumps(getattr(actor.instance, name)(*sent))
            self._perhaps_die(f"after {name}", actor)
            ref.data = value
        except DiedError:
            actor.die()
            return
        except Exception as error:
            ref.error = FakeTaskError(pickle.loads(pickle.dumps(error)))
        actor.waiting.remove(ref)

    def _perhaps_die(self, name: str, actor: Actor) -> None:
        if self._deadly(name, actor):
            raise DiedError
