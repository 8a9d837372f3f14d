"""Whose turn it is: waiting requests by tenant, and an account of the tokens that each was served.

Of tenants of equal priority, the one goes first that was served fewest tokens for its weight: under load they
get tokens in proportion to their weights, whatever the lengths and numbers of their requests (virtual token
counters, Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Who comes back after a pause
starts level with those that are busy: nobody saves up. Within a tenant it is first come, first served. Pure.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Protocol, TypeVar


class Charged(Protocol):
    """What the queue asks of a tenant (request.Tenant is one)."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def max_running(self) -> int | None: ...


class Waiting(Protocol):
    """What it asks of a request."""

    @property
    def tenant(self) -> Charged: ...


W = TypeVar("W", bound=Waiting)

# Calls that a tenant is reckoned with after its last request, some ten seconds. Until then whoever runs more
# than its share is slowed down (8 chats wrote 8 to 15 % less, RAG 17 %); after it, who asks again finds calls
# that may take as long as the stall allows.
LATELY = 300


@dataclass(slots=True)
class Account(Generic[W]):
    """One tenant: what it was served, what runs and what waits."""

    tenant: Charged
    served: float = 0.0  # tokens over weight
    n_running: int = 0
    last_call: int = 0  # in which it had a request
    waiting: deque[W] = field(default_factory=deque)

    @property
    def is_active(self) -> bool:
        return bool(self.waiting or self.n_running)

    @property
    def rank(self) -> tuple[float, float, float]:
        """Priority, else tokens served, else what runs; the smallest goes first."""
        return -self.tenant.priority, self.served, self.n_running / self.tenant.weight

    @property
    def may_run(self) -> bool:
        """Whether its own limit lets another one run."""
        limit = self.tenant.max_running
        return limit is None or self.n_running < limit


class FairQueue(Generic[W]):
    """Requests in, the next one out."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account[W]] = {}
        self._n_calls = 0
        self._weight: float | None = None  # of all who are active; None: to be added up

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def __iter__(self) -> Iterator[W]:
        for account in self._accounts.values():
            yield from account.waiting

    def add(self, request: W, *, first: bool = False) -> None:
        """Queue a request behind its tenant's others, or before them (it was running already)."""
        account = self._account(request.tenant)
        if not account.is_active:
            busy = [each.served for each in self._accounts.values() if each.is_active]
            account.served = max([account.served, *([min(busy)] if busy else [])])
        account.tenant = request.tenant
        self._weight = None
        if first:
            account.waiting.appendleft(request)
        else:
            account.waiting.append(request)

    def called(self) -> None:
        """Another call begins: what "lately" is reckoned from."""
        self._n_calls += 1
        for account in self._accounts.values():
            if account.is_active:
                account.last_call = self._n_calls
        if not all(map(self._was_active_lately, self._accounts.values())):
            self._forget()

    def remove(self, request: W) -> None:
        """A request will not run."""
        account = self._account(request.tenant)
        account.waiting.remove(request)
        self._forget()

    def ready(self) -> list[W]:
        """The first request of every tenant that may run one, the most deserving tenant first."""
        accounts = [each for each in self._accounts.values() if each.waiting and each.may_run]
        return [account.waiting[0] for account in sorted(accounts, key=lambda account: account.rank)]

    def rank(self, request: W) -> tuple[float, float, float]:
        """How deserving a request is, waiting or running; the smallest goes first."""
        return self._account(request.tenant).rank

    def started(self, request: W) -> None:
        """A request of `ready` runs now."""
        account = self._account(request.tenant)
        account.waiting.remove(request)
        account.n_running += 1

    def ended(self, request: W) -> None:
        """A running request does not run any more."""
        account = self._account(request.tenant)
        account.n_running -= 1
        self._forget()

    def charge(self, request: W, n_tokens: int) -> None:
        """Tokens were computed for a request."""
        self._account(request.tenant).served += n_tokens / request.tenant.weight

    def served(self, request: W) -> float:
        """What the request's tenant was served, in tokens over weight."""
        return self._account(request.tenant).served

    def n_running(self, request: W) -> int:
        """Running requests of the same tenant."""
        return self._account(request.tenant).n_running

    def n_waiting(self, tenant: Charged) -> int:
        """Requests of a tenant that wait."""
        account = self._accounts.get(tenant.name)
        return 0 if account is None else len(account.waiting)

    def is_full_for(self, tenant: Charged, max_queue: int, *, n_waiting: int) -> bool:
        """Whether another request of this tenant would be one too many; `n_waiting`: who would wait with it.

        A flood of one tenant does not shut the door on others: each may have its share of the queue, and one
        request at least.
        """
        if n_waiting <= max_queue:
            return False
        least = min(1, max_queue)
        return self.n_waiting(tenant) + 1 > max(least, self.share(tenant, max_queue))

    def share(self, tenant: Charged, n_places: int) -> float:
        """Places that are due to a tenant beside all others who want some now, by weight."""
        if self._weight is None:
            self._weight = sum(each.tenant.weight for each in self._accounts.values() if each.is_active)
        account = self._accounts.get(tenant.name)
        own = account.tenant.weight if account is not None and account.is_active else 0.0
        return _due(tenant, self._weight - own, n_places)

    def is_over_share(self, request: W, n_places: int) -> bool:
        """Whether the request's tenant runs on places that are others', who asked lately and may do so again.

        Tenants of lower priority have no such claim.
        """
        tenant, account = request.tenant, self._account(request.tenant)
        if account.n_running <= 1:  # nobody's share is less, and most tenants run no more
            return False
        others = sum(
            each.tenant.weight
            for each in self._accounts.values()
            if each is not account
            and each.tenant.priority >= tenant.priority
            and (each.is_active or self._was_active_lately(each))
        )
        return others > 0 and account.n_running > _due(tenant, others, n_places)

    def _was_active_lately(self, account: Account[W]) -> bool:
        return self._n_calls - account.last_call <= LATELY

    def _account(self, tenant: Charged) -> Account[W]:
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant)
        return account

    def _forget(self) -> None:
        """Accounts of who is gone are kept for a while, then only while they say more than a newcomer's."""
        self._weight = None
        busy = [each.served for each in self._accounts.values() if each.is_active]
        least = min(busy, default=inf)
        self._accounts = {
            name: each
            for name, each in self._accounts.items()
            if each.is_active or each.served > least or self._was_active_lately(each)
        }
        if not busy:  # what they were served is nobody's loss: who comes first would start before them
            for account in self._accounts.values():
                account.served = 0.0


def _due(tenant: Charged, others: float, n_places: int) -> float:
    """Places of a tenant beside others of so much weight: rounded, since sums of weights are not exact, and a
    share may be a whole number."""
    return round(n_places * tenant.weight / (tenant.weight + others), 6)
