"""The lives of engines: started once, never handed out while closing, within the budget, in fair turns."""

import asyncio
import random
from pathlib import Path

import pytest

from engine.request import EngineConfig, EngineUnavailable, ModelLoadFailed, QueueFull, Tenant
from models.placement import Bytes
from server.errors import ModelTooLarge
from server.fleet import PATIENCE_S, Fleet, Member


class FakeClock:
    """Time stands still until `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls = []

    def time(self):
        return self.now

    def call_later(self, delay, callback):
        call = _Call(self, self.now + delay, callback)
        self.calls.append(call)
        return call

    async def advance(self, seconds: float) -> None:
        await settled()
        end = self.now + seconds
        while due := sorted((call for call in self.calls if call.at <= end), key=lambda call: call.at):
            self.now = max(self.now, due[0].at)
            self.calls.remove(due[0])
            due[0].callback()
            await settled()
        self.now = end
        await settled()


class _Call:
    def __init__(self, clock, at, callback):
        self.clock, self.at, self.callback = clock, at, callback

    def cancel(self):
        if self in self.clock.calls:
            self.clock.calls.remove(self)


class FakeEngine:
    def __init__(self, yard, name):
        self.yard, self.name, self.alive, self.closed = yard, name, True, False

    async def close(self):
        self.alive = False
        self.yard.log.append(f"close {self.name}")
        await self.yard.until(self.yard.closing)
        self.closed = True
        self.yard.running.remove(self.name)


class Yard:
    """A fleet of fake engines. `loading` and `closing` hold starts and ends back while they are clear."""

    def __init__(self, *members: Member, budget: int = 100, device: int = 0):
        self.clock = FakeClock()
        self.loading, self.closing = asyncio.Event(), asyncio.Event()
        self.loading.set()
        self.closing.set()
        self.log, self.running = [], []
        self.fails: Exception | None = None
        self.budget = Bytes(budget, device)
        self.configs = {member.name: member.config for member in members}
        self.sizes = {member.name: member.size for member in members}
        self.fleet = Fleet(members, self.start, budget=self.budget, clock=self.clock)

    async def until(self, event):
        await asyncio.sleep(0)
        await event.wait()

    async def start(self, config):
        name = config.model_path.name
        self.log.append(f"start {name}")
        self.running.append(name)
        assert self.running.count(name) == 1, "two engines of one configuration"
        taken = sum((self.sizes[each] for each in self.running), Bytes(0))
        assert taken.within(self.budget), "over the budget"
        try:
            await self.until(self.loading)
            if self.fails:
                raise self.fails
        except BaseException:
            self.log.append(f"gone {name}")
            self.running.remove(name)
            raise
        return FakeEngine(self, name)

    def state(self, name):
        return self.standing(name).state

    def standing(self, name):
        return self.fleet.standing(self.configs[name])

    def lease(self, name, tenant=Tenant()):  # noqa: B008
        return self.fleet.lease(self.configs[name], tenant)


def config(name: str, **fields) -> EngineConfig:
    return EngineConfig(Path(name), **fields)


def member(name: str, size: int = 40, device: int = 0, **fields) -> Member:
    return Member(name, config(name), Bytes(size, device), **fields)


async def settled() -> None:
    """Everything that can run without outside help has run."""
    for _ in range(30):
        await asyncio.sleep(0)


class User:
    """A request: holds a lease from when it gets one until `leave`."""

    def __init__(self, yard, name, tenant=Tenant()):  # noqa: B008
        self.yard, self.name, self.tenant = yard, name, tenant
        self.engine = None
        self.leaving = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        async with self.yard.lease(self.name, self.tenant) as engine:
            assert engine.alive
            assert not engine.closed
            self.engine = engine
            await self.leaving.wait()
            assert engine.alive, "closed under its user"

    @property
    def served(self):
        return self.engine is not None

    async def leave(self):
        self.leaving.set()
        await self.task
        await settled()

    async def cancel(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await settled()


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_twenty_first_requests_start_one_engine_and_all_get_it():
    async def scenario():
        yard = Yard(member("a"))
        yard.loading.clear()
        users = [User(yard, "a") for _ in range(20)]
        await settled()
        assert yard.log == ["start a"]
        assert yard.state("a") == "loading"
        assert yard.standing("a").waiting == 20
        yard.loading.set()
        await settled()
        assert len({id(user.engine) for user in users}) == 1
        assert (yard.state("a"), yard.standing("a").users, yard.standing("a").waiting) == ("ready", 20, 0)
        for user in users:
            await user.leave()
        assert yard.log == ["start a"]
        await yard.fleet.close()
        assert yard.running == []

    run(scenario())


def test_nothing_starts_before_somebody_asks_but_what_is_preloaded():
    async def scenario():
        yard = Yard(member("a"), member("b", preload=True))
        await yard.fleet.preload()
        assert yard.log == ["start b"]
        assert (yard.state("a"), yard.state("b")) == ("unloaded", "ready")
        assert yard.fleet.held == Bytes(40)
        await yard.fleet.close()

    run(scenario())


def test_a_preload_that_fails_says_why():
    async def scenario():
        yard = Yard(member("a", preload=True))
        yard.fails = ModelLoadFailed("broken")
        with pytest.raises(ModelLoadFailed, match="broken"):
            await yard.fleet.preload()
        await yard.fleet.close()
        assert yard.running == []

    run(scenario())


def test_an_engine_ends_after_its_keep_alive_and_not_before():
    async def scenario():
        yard = Yard(member("a", keep_alive_s=60))
        await User(yard, "a").leave()
        await yard.clock.advance(59)
        assert (yard.state("a"), yard.standing("a").idle_s) == ("ready", 59)
        await User(yard, "a").leave()  # begins anew
        await yard.clock.advance(59)
        user = User(yard, "a")
        await settled()
        await yard.clock.advance(1000)  # in use
        assert (yard.state("a"), yard.standing("a").idle_s) == ("ready", None)
        await user.leave()
        await yard.clock.advance(60)
        assert yard.state("a") == "unloaded"
        assert yard.log == ["start a", "close a"]
        await User(yard, "a").leave()
        assert yard.log == ["start a", "close a", "start a"]
        await yard.fleet.close()

    run(scenario())


def test_forever_is_for_ever_and_zero_is_at_once():
    async def scenario():
        yard = Yard(member("a"), member("b", keep_alive_s=0))
        await User(yard, "a").leave()
        await yard.clock.advance(1e9)
        assert yard.state("a") == "ready"
        one, other = User(yard, "b"), User(yard, "b")
        await settled()
        await one.leave()
        assert yard.state("b") == "ready"
        await other.leave()
        assert yard.state("b") == "unloaded"
        await yard.fleet.close()

    run(scenario())


def test_a_request_never_gets_an_engine_that_is_closing():
    async def scenario():
        yard = Yard(member("a", keep_alive_s=5))
        await User(yard, "a").leave()
        yard.closing.clear()
        await yard.clock.advance(5)
        assert yard.state("a") == "closing"
        late = User(yard, "a")
        await settled()
        assert not late.served
        yard.closing.set()
        await settled()
        assert late.served
        assert yard.log == ["start a", "close a", "start a"]
        await late.leave()
        await yard.fleet.close()

    run(scenario())


def test_idle_engines_make_room_least_recently_used_first_and_no_more_than_needed():
    async def scenario():
        yard = Yard(member("a", 30), member("b", 30), member("c", 30), member("d", 50))
        for name in "abc":
            await User(yard, name).leave()
            await yard.clock.advance(1)
        await User(yard, "a").leave()
        user = User(yard, "d")
        await settled()
        assert yard.log[-3:] == ["close b", "close c", "start d"]
        assert user.served
        assert [yard.state(name) for name in "abcd"] == ["ready", "unloaded", "unloaded", "ready"]
        await user.leave()
        await yard.fleet.close()

    run(scenario())


def test_what_could_never_fit_is_refused_with_both_numbers_and_costs_nobody_anything():
    async def scenario():
        yard = Yard(member("a"), member("big", 9_000_000_000), budget=2_000_000_000)
        await User(yard, "a").leave()
        with pytest.raises(ModelTooLarge, match=r"'big' needs 9\.0 GB .* may take 2\.0 GB.*memory_budget_mb"):
            async with yard.lease("big"):
                pass
        assert yard.log == ["start a"]
        await yard.fleet.close()

    run(scenario())


def test_too_much_for_the_gpu_is_told_with_its_own_numbers():
    async def scenario():
        yard = Yard(member("big", 10, 9_000_000_000), device=2_000_000_000)
        told = (
            r"'big' needs 9\.0 GB of GPU memory .* may take 2\.0 GB: lower its gpu_layers.*gpu_memory_budget"
        )
        with pytest.raises(ModelTooLarge, match=told):
            async with yard.lease("big"):
                pass
        await yard.fleet.close()

    run(scenario())


def test_only_engines_that_hold_of_the_memory_that_is_short_make_room():
    async def scenario():
        yard = Yard(
            member("host", 40),
            member("gpu", 10, 60),
            member("other", 10, 60),
            member("both", 70, 60),
            device=100,
        )
        await User(yard, "host").leave()
        await yard.clock.advance(1)
        await User(yard, "gpu").leave()
        await User(yard, "other").leave()  # the GPU is short, and the longest unused engine is not on it
        assert yard.log == ["start host", "start gpu", "close gpu", "start other"]
        await User(yard, "both").leave()
        assert yard.log[4:] == ["close host", "close other", "start both"]
        assert yard.fleet.held == Bytes(70, 60)
        await yard.fleet.close()

    run(scenario())


def test_room_that_busy_engines_hold_is_waited_for():
    async def scenario():
        yard = Yard(member("a", 60), member("b", 60))
        busy, waiting = User(yard, "a"), User(yard, "b")
        await settled()
        assert busy.served
        assert not waiting.served
        await yard.clock.advance(3600)
        assert not waiting.served
        await busy.leave()
        assert waiting.served
        assert yard.log == ["start a", "close a", "start b"]
        await waiting.leave()
        await yard.fleet.close()

    run(scenario())


def test_a_model_in_demand_cannot_keep_another_out():
    """For a while its new requests go first; then they wait until the other had its turn."""

    async def scenario():
        yard = Yard(member("a", 60), member("b", 60))
        first = User(yard, "a")
        await settled()
        other = User(yard, "b")
        await yard.clock.advance(PATIENCE_S - 1)
        second = User(yard, "a")
        await settled()
        assert second.served
        await first.leave()
        assert not other.served
        await yard.clock.advance(1)
        third = User(yard, "a")
        await settled()
        assert not third.served
        await second.leave()
        assert other.served
        await yard.clock.advance(PATIENCE_S)
        assert not third.served
        await other.leave()
        assert third.served
        await third.leave()
        await yard.fleet.close()

    run(scenario())


def test_when_the_one_that_waits_gives_up_the_others_go_on():
    async def scenario():
        yard = Yard(member("a", 60), member("b", 60))
        busy = User(yard, "a")
        await settled()
        impatient = User(yard, "b")
        await yard.clock.advance(PATIENCE_S)
        held_up = User(yard, "a")
        await settled()
        assert not held_up.served
        await impatient.cancel()
        assert held_up.served
        await busy.leave()
        await held_up.leave()
        assert yard.log == ["start a"]
        await yard.fleet.close()

    run(scenario())


def test_a_large_model_that_waits_is_not_overtaken_by_small_ones():
    async def scenario():
        yard = Yard(member("a", 60), member("large", 90), member("small", 30))
        busy = User(yard, "a")
        await settled()
        large = User(yard, "large")
        await yard.clock.advance(1)
        small = User(yard, "small")
        await settled()
        assert not small.served  # its 30 would fit now, and the large one would wait for them too
        await busy.leave()
        assert large.served
        await large.leave()
        assert small.served
        await small.leave()
        await yard.fleet.close()

    run(scenario())


def test_a_load_that_fails_fails_those_that_wait_and_the_next_tries_again():
    async def scenario():
        yard = Yard(member("a"))
        yard.fails = ModelLoadFailed("no such tensor")
        users = [User(yard, "a") for _ in range(5)]
        await settled()
        for user in users:
            with pytest.raises(ModelLoadFailed, match="no such tensor"):
                await user.task
        assert yard.log == ["start a", "gone a"]
        standing = yard.standing("a")
        assert (standing.state, standing.problem, standing.engine) == ("failed", "no such tensor", None)
        assert yard.fleet.held == Bytes(0)
        yard.fails = None
        await User(yard, "a").leave()
        assert (yard.state("a"), yard.standing("a").problem) == ("ready", None)
        await yard.fleet.close()

    run(scenario())


def test_a_load_that_fails_for_an_unforeseen_reason_leaves_nobody_waiting():
    async def scenario():
        yard = Yard(member("a"))
        yard.fails = ZeroDivisionError("odd")
        user = User(yard, "a")
        with pytest.raises(ZeroDivisionError):
            await user.task
        await yard.fleet.close()

    run(scenario())


def test_one_that_gives_up_does_not_stop_the_load_for_the_others():
    async def scenario():
        yard = Yard(member("a"))
        yard.loading.clear()
        leaving, staying = User(yard, "a"), User(yard, "a")
        await settled()
        await leaving.cancel()
        assert yard.standing("a").waiting == 1
        yard.loading.set()
        await settled()
        assert staying.served
        assert yard.standing("a").users == 1
        await staying.leave()
        assert yard.log == ["start a"]
        await yard.fleet.close()

    run(scenario())


def test_when_all_give_up_the_engine_is_there_for_the_next_one_and_nobody_holds_it():
    async def scenario():
        yard = Yard(member("a", keep_alive_s=10))
        yard.loading.clear()
        only = User(yard, "a")
        await settled()
        await only.cancel()
        yard.loading.set()
        await settled()
        assert (yard.state("a"), yard.standing("a").users) == ("ready", 0)
        await yard.clock.advance(10)
        assert yard.state("a") == "unloaded"
        await yard.fleet.close()

    run(scenario())


def test_one_cancelled_in_the_moment_of_its_turn_gives_its_turn_back():
    async def scenario():
        yard = Yard(member("a", keep_alive_s=10))
        yard.loading.clear()
        user = User(yard, "a")
        await settled()
        yard.loading.set()
        while yard.standing("a").users == 0:
            await asyncio.sleep(0)
        assert not user.served
        await user.cancel()
        assert yard.standing("a").users == 0
        await yard.clock.advance(10)
        assert yard.state("a") == "unloaded"
        await yard.fleet.close()

    run(scenario())


def test_a_queue_that_is_full_refuses_at_once():
    async def scenario():
        small = Member("a", config("a", n_parallel=1, max_queue=2), Bytes(10))
        yard = Yard(small)
        yard.loading.clear()

        async def wait():
            async with yard.fleet.lease(small.config):
                pass

        tasks = [asyncio.create_task(wait()) for _ in range(3)]
        await settled()
        with pytest.raises(QueueFull, match="3 requests are waiting"):
            await wait()
        yard.loading.set()
        await asyncio.gather(*tasks)
        await yard.fleet.close()

    run(scenario())


FLOOD, GUEST = Tenant("flood"), Tenant("guest")


def test_a_flood_of_one_key_leaves_others_their_share_of_the_places_to_wait():
    async def scenario():
        yard = Yard(Member("a", config("a", n_parallel=2, max_queue=4), Bytes(10)))
        yard.loading.clear()
        flood = [User(yard, "a", FLOOD) for _ in range(6)]
        await settled()
        guests = [User(yard, "a", GUEST) for _ in range(2)]
        await settled()
        for tenant in (FLOOD, GUEST):
            with pytest.raises(QueueFull, match="8 requests are waiting"):
                async with yard.lease("a", tenant):
                    pass
        yard.loading.set()
        await settled()
        assert all(user.served for user in [*flood, *guests])
        for user in [*flood, *guests]:
            await user.leave()
        await yard.fleet.close()

    run(scenario())


def test_who_gives_up_waiting_leaves_its_place_to_its_own_key_and_to_others():
    async def scenario():
        yard = Yard(Member("a", config("a", n_parallel=1, max_queue=1), Bytes(10)))
        yard.loading.clear()
        flood = [User(yard, "a", FLOOD) for _ in range(2)]
        await settled()
        await flood.pop().cancel()
        assert yard.standing("a").waiting == 1
        flood.append(User(yard, "a", FLOOD))
        await settled()
        assert yard.standing("a").waiting == 2
        with pytest.raises(QueueFull):
            async with yard.lease("a", FLOOD):
                pass
        yard.fails = ModelLoadFailed("no such tensor")
        yard.loading.set()
        await settled()
        for user in flood:
            with pytest.raises(ModelLoadFailed):
                await user.task
        assert yard.standing("a").waiting == 0
        await yard.fleet.close()

    run(scenario())


def test_those_that_wait_get_their_engine_in_the_order_of_asking_whatever_their_keys():
    """In this order the engine, which has the same places, takes them all."""

    async def scenario():
        yard = Yard(member("a"))
        yard.loading.clear()
        order = []

        async def ask(number, tenant):
            async with yard.lease("a", tenant):
                order.append(number)

        tenants = [FLOOD, GUEST, FLOOD, FLOOD, GUEST, Tenant("third"), FLOOD]
        tasks = [asyncio.create_task(ask(number, tenant)) for number, tenant in enumerate(tenants)]
        await settled()
        yard.loading.set()
        await asyncio.gather(*tasks)
        assert order == list(range(len(tenants)))
        await yard.fleet.close()

    run(scenario())


def test_closing_while_one_loads_leaves_no_process_and_nobody_waiting():
    async def scenario():
        yard = Yard(member("a"), member("b"), member("c", 90))
        busy = User(yard, "b")
        await settled()
        yard.loading.clear()
        loading, queued = User(yard, "a"), User(yard, "c")
        await settled()
        assert sorted(yard.running) == ["a", "b"]
        await yard.fleet.close()
        assert yard.running == []
        for user in (loading, queued):
            with pytest.raises(EngineUnavailable, match="the server stops"):
                await user.task
        await busy.cancel()
        with pytest.raises(EngineUnavailable):
            async with yard.lease("a"):
                pass
        assert yard.clock.calls == []
        assert yard.log.count("start c") == 0

    run(scenario())


def test_an_engine_that_does_not_end_as_it_should_does_not_stop_the_others(caplog):
    async def scenario():
        yard = Yard(member("a", 60), member("b", 60))
        user = User(yard, "a")
        await settled()

        async def fail():
            yard.running.remove("a")
            raise OSError("stuck")

        user.engine.close = fail
        user.engine.alive = True
        await user.leave()
        other = User(yard, "b")
        await settled()
        assert other.served
        await other.leave()
        await yard.fleet.close()

    run(scenario())
    assert "the engine of a did not end as it should" in caplog.text


def test_a_process_that_died_is_told_and_still_handed_out_to_wait_for_its_restart():
    async def scenario():
        yard = Yard(member("a"))
        user = User(yard, "a")
        await settled()
        user.engine.alive = False
        assert yard.state("a") == "down"
        user.engine.alive = True
        await user.leave()
        await yard.fleet.close()

    run(scenario())


def test_the_engine_of_a_lease_is_found_and_without_one_it_is_an_error():
    async def scenario():
        yard = Yard(member("a"))
        with pytest.raises(EngineUnavailable):
            yard.fleet.engine(config("a"))
        async with yard.lease("a") as engine:
            assert yard.fleet.engine(config("a")) is engine
        await yard.fleet.close()

    run(scenario())


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_the_budget_holds_and_everybody_is_served(seed):
    """Random arrivals, leaves, cancels, failures and pauses; the fakes check each start and each lease."""

    async def scenario():
        chance = random.Random(seed)
        yard = Yard(
            *(
                member(
                    name,
                    chance.choice([20, 35, 60, 95]),
                    chance.choice([0, 0, 30, 70, 100]),
                    keep_alive_s=chance.choice([None, 0, 3]),
                )
                for name in "abcde"
            ),
            device=100,
        )
        users: list[User] = []
        for _ in range(300):
            await happen(yard, users, chance)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        yard.loading.set()
        yard.closing.set()
        yard.fails = None
        for user in users:
            user.leaving.set()
        for _ in range(50):
            await yard.clock.advance(PATIENCE_S)
        for user in users:
            assert user.task.done(), "somebody was never served"
            if error := user.task.exception():
                assert isinstance(error, ModelLoadFailed)
        assert all(yard.standing(name).users == yard.standing(name).waiting == 0 for name in "abcde")
        await yard.fleet.close()
        assert yard.running == []
        assert yard.clock.calls == []

    run(scenario())


async def happen(yard: Yard, users: list[User], chance: random.Random) -> None:
    """One thing, by chance; who leaves or is cancelled is no longer among `users`."""
    match chance.choice(["come"] * 6 + ["leave"] * 6 + ["cancel", "time", "slow", "close", "fail"]):
        case "come":
            users.append(User(yard, chance.choice("abcde"), chance.choice([FLOOD, GUEST])))
        case "leave" if users:
            users[chance.randrange(len(users))].leaving.set()
        case "cancel" if users:
            users.pop(chance.randrange(len(users))).task.cancel()
        case "time":
            await yard.clock.advance(chance.choice([0.5, 2, 6]))
        case "slow" | "close" as which:
            event = yard.loading if which == "slow" else yard.closing
            event.clear() if event.is_set() else event.set()
        case "fail":
            yard.fails = None if yard.fails else ModelLoadFailed("by chance")
