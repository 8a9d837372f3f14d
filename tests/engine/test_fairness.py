"""Whose turn it is, by what each was served."""

from dataclasses import dataclass, field

from engine.fairness import LATELY, FairQueue
from engine.request import Tenant


@dataclass(eq=False)
class Asked:
    tenant: Tenant
    name: str = field(default="")


def serve(queue: FairQueue, n_tokens: int) -> Asked:
    """Run the first request to its end."""
    request = queue.ready()[0]
    queue.started(request)
    queue.charge(request, n_tokens)
    queue.ended(request)
    return request


def start(queue: FairQueue, *requests: Asked) -> None:
    for request in requests:
        queue.add(request)
        queue.started(request)


A, B, HEAVY = Tenant("a"), Tenant("b"), Tenant("heavy", weight=3.0)


def test_one_tenant_is_served_in_order_of_arrival():
    queue: FairQueue[Asked] = FairQueue()
    asked = [Asked(A, str(number)) for number in range(4)]
    for each in asked:
        queue.add(each)
    assert [serve(queue, 10) for _ in asked] == asked
    assert len(queue) == 0


def test_tokens_are_shared_by_weight_whatever_the_lengths():
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(400):
        queue.add(Asked(A))
        queue.add(Asked(HEAVY))
    served = {"a": 0, "heavy": 0}
    for _ in range(200):
        name = queue.ready()[0].tenant.name
        n_tokens = 70 if name == "a" else 10
        serve(queue, n_tokens)
        served[name] += n_tokens
    assert 2.7 <= served["heavy"] / served["a"] <= 3.3


def test_who_comes_late_starts_level_and_saves_nothing_up():
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(50):
        queue.add(Asked(A))
    for _ in range(20):
        serve(queue, 10)
    for _ in range(20):
        queue.add(Asked(B))
    order = [serve(queue, 10).tenant.name for _ in range(20)]
    assert 9 <= order.count("b") <= 11


def test_a_pause_does_not_wipe_out_what_one_was_served():
    queue: FairQueue[Asked] = FairQueue()
    queue.add(Asked(A))
    queue.add(Asked(B))
    serve(queue, 10)
    queue.add(Asked(A))
    first = queue.ready()[0]
    assert first.tenant is B
    serve(queue, 10)


def test_a_long_pause_wipes_it_out_once_nobody_else_is_busy_or_all_have_caught_up():
    queue: FairQueue[Asked] = FairQueue()
    much, little = Asked(A), Asked(B)
    start(queue, much, little)
    queue.charge(much, 3000)
    queue.charge(little, 50)
    queue.ended(much)
    assert queue.served(much) == 3000, "the other one is behind"
    queue.ended(little)
    third = Asked(HEAVY)
    start(queue, third)
    queue.charge(third, 300)
    queue.add(Asked(A))
    assert queue.served(much) == 100, "level with who is busy, whatever was long ago"


def test_an_account_goes_when_those_that_are_busy_have_passed_it():
    queue: FairQueue[Asked] = FairQueue()
    first, second = Asked(A), Asked(B)
    start(queue, first, second)
    queue.charge(first, 300)
    queue.charge(second, 50)
    queue.ended(first)
    queue.charge(second, 400)
    more = Asked(HEAVY)
    queue.add(more)
    queue.remove(more)
    for _ in range(LATELY + 1):
        queue.called()
    assert "a" not in queue._accounts


def test_priority_goes_before_weight():
    queue: FairQueue[Asked] = FairQueue()
    queue.add(Asked(HEAVY))
    queue.add(Asked(Tenant("urgent", weight=0.1, priority=1)))
    assert [serve(queue, 10).tenant.name for _ in range(2)] == ["urgent", "heavy"]


def test_a_tenant_at_its_limit_lets_others_pass():
    queue: FairQueue[Asked] = FairQueue()
    one = Tenant("one", max_running=1)
    first, second, other = Asked(one), Asked(one), Asked(B)
    for each in (first, second, other):
        queue.add(each)
    queue.started(first)
    assert queue.ready() == [other]
    queue.ended(first)
    assert second in queue.ready()


def test_one_that_made_way_goes_on_before_its_tenants_others():
    queue: FairQueue[Asked] = FairQueue()
    first, second = Asked(A), Asked(A)
    queue.add(first)
    queue.add(second)
    queue.started(first)
    queue.add(first, first=True)
    queue.ended(first)
    assert list(queue) == [first, second]


def test_shares_count_who_wants_something_now():
    queue: FairQueue[Asked] = FairQueue()
    heavy, light = Asked(HEAVY), Asked(A)
    queue.add(heavy)
    assert queue.share(HEAVY, 8) == 8
    assert queue.share(A, 8) == 2, "who asks counts too"
    queue.add(light)
    assert (queue.share(HEAVY, 8), queue.share(A, 8)) == (6, 2)
    queue.started(light)
    assert (queue.share(HEAVY, 8), queue.share(A, 8)) == (6, 2), "also while they run"
    queue.add(light, first=True)
    queue.ended(light)
    queue.remove(light)
    assert queue.share(HEAVY, 8) == 8
    assert (queue.n_waiting(HEAVY), queue.n_waiting(A)) == (1, 0)


def full(queue: FairQueue, tenant: Tenant, max_queue: int) -> bool:
    return queue.is_full_for(tenant, max_queue, n_waiting=len(queue) + 1)


def test_a_queue_is_full_for_who_has_its_share_of_it():
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(8):
        assert not full(queue, A, 8)
        queue.add(Asked(A))
    assert full(queue, A, 8)
    for _ in range(6):
        assert not full(queue, HEAVY, 8)
        queue.add(Asked(HEAVY))
    assert full(queue, HEAVY, 8)
    assert full(queue, A, 8)


def test_a_place_is_kept_for_who_has_little_weight_unless_nobody_may_wait():
    queue: FairQueue[Asked] = FairQueue()
    light = Tenant("light", weight=0.01)
    for _ in range(8):
        queue.add(Asked(HEAVY))
    assert not full(queue, light, 8)
    assert full(queue, light, 0)
    queue.add(Asked(light))
    assert full(queue, light, 8)


def test_nobody_waits_where_places_are_free():
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(3):
        queue.add(Asked(A))
    assert not queue.is_full_for(A, 0, n_waiting=0)
    assert queue.is_full_for(A, 0, n_waiting=1)


def running(queue: FairQueue, tenant: Tenant, count: int) -> list[Asked]:
    asked = [Asked(tenant) for _ in range(count)]
    for each in asked:
        queue.add(each)
        queue.started(each)
    return asked


def test_one_tenant_alone_is_never_over_its_share():
    queue: FairQueue[Asked] = FairQueue()
    asked = running(queue, A, 8)
    queue.called()
    assert not queue.is_over_share(asked[0], 8)


def test_who_was_here_lately_has_a_share_of_what_runs():
    queue: FairQueue[Asked] = FairQueue()
    (guest,) = running(queue, B, 1)
    queue.called()
    queue.ended(guest)
    flood = running(queue, A, 5)
    queue.called()
    assert queue.is_over_share(flood[0], 8)
    queue.ended(flood[0])
    assert not queue.is_over_share(flood[1], 8), "half of the places are its own"
    running(queue, A, 1)
    for _ in range(LATELY):
        queue.called()
    assert not queue.is_over_share(flood[1], 8), "nobody else came for long"


def test_whose_weight_is_more_may_run_more():
    queue: FairQueue[Asked] = FairQueue()
    heavy, light = running(queue, HEAVY, 6), running(queue, A, 2)
    queue.called()
    assert not queue.is_over_share(heavy[0], 8)
    assert not queue.is_over_share(light[0], 8)
    running(queue, A, 1)
    assert queue.is_over_share(light[0], 8)


def test_one_place_is_everybodys_due():
    queue: FairQueue[Asked] = FairQueue()
    asked = [running(queue, Tenant(str(number)), 1)[0] for number in range(9)]
    queue.called()
    assert not any(queue.is_over_share(each, 2) for each in asked)


def test_lower_priority_has_no_claim_on_what_higher_runs_on():
    queue: FairQueue[Asked] = FairQueue()
    urgent = running(queue, Tenant("urgent", priority=1), 4)
    low = running(queue, A, 4)
    queue.called()
    assert not queue.is_over_share(urgent[0], 4)
    assert queue.is_over_share(low[0], 4)


def test_accounts_of_who_is_gone_are_forgotten_at_last():
    queue: FairQueue[Asked] = FairQueue()
    for number in range(100):
        (asked,) = running(queue, Tenant(str(number)), 1)
        queue.called()
        queue.ended(asked)
    for _ in range(LATELY + 1):
        queue.called()
    assert not queue._accounts
