"""Policy and ledger of a client, or of all clients of one host: the last word before anything private is computed.

Delta, accountant and unit are the operator's: those of the policy and those of the ledger are the same numbers, and terms
that name others are refused. A ledger that is given as an opener is opened, and made where it does not exist, only for a
request that the policy admits: neither a hello nor a refused request writes anything.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fed_dpprune.errors import ClientFault, LedgerError
from fed_dpprune.federation.terms import RoundTerms
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Ledger, Request
from fed_dpprune.privacy.policy import ClientPolicy

_log = logging.getLogger(__name__)
OPERATORS = ("delta", "accountant", "unit")


class LedgerGuard:
    """Policy first, then the ledger: a request is refused, replayed, or charged and committed.

    Args:
        ledger: Open for charging, or what opens it when it is first needed.
        policy: Set by whoever runs the clients; no message can weaken it. Delta, accountant and unit that it leaves out
            are those of an open ledger.
        nominal_sizes: N_c by partition id, declared by whoever runs the clients.
        data: Fingerprint of the data, remembered in the ledger when it is first opened; other data warn in the log.

    Raises:
        LedgerError: The ledger counts at another delta, by another accountant or for another unit than the policy says.
        ValueError: An opener with a policy that leaves one of the three out.
    """

    def __init__(
        self,
        ledger: Ledger | Callable[[], Ledger],
        policy: ClientPolicy,
        nominal_sizes: Mapping[int, int],
        data: Callable[[], str] | None = None,
    ) -> None:
        self.policy, self._sizes, self._data = policy, nominal_sizes, data
        self._open: Callable[[], Ledger] | None = None
        self._ledger: Ledger | None = None
        self._opening = threading.Lock()
        if isinstance(ledger, Ledger):
            self._ledger = self._adopted(ledger)
        else:
            missing = [name for name in OPERATORS if getattr(policy, name) is None]
            if missing:
                raise ValueError(f"a ledger that is not open yet needs a policy with its own {missing[0]}")
            self._open = ledger

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened now if it was not yet."""
        with self._opening:
            if self._ledger is None and self._open is not None:
                self._ledger = self._adopted(self._open())
            assert self._ledger is not None
            return self._ledger

    def _adopted(self, ledger: Ledger) -> Ledger:
        own = {"delta": ledger.delta, "accountant": ledger.accountant, "unit": ledger.unit}
        for name, value in own.items():
            wanted = getattr(self.policy, name)
            if wanted is not None and wanted != value:
                fix = "one delta, accountant and unit hold for policy and ledger; set the policy's to the ledger's"
                raise LedgerError(str(ledger.path), f"its {name} is {value!r}, not {wanted!r}", fix)
        self.policy = replace(self.policy, delta=ledger.delta, accountant=ledger.accountant, unit=ledger.unit)
        if self._data is not None and not ledger.remember_data(self._data()):
            _log.warning("%s was opened with other data; what was spent before still counts", ledger.path)
        return ledger

    def screen(self, terms: RoundTerms) -> None:
        """The policy alone, without the ledger: `admit` asks it again.

        Raises:
            ClientFault: The policy refuses; nothing was opened or written.
        """
        verdict = self._verdict(terms)
        if verdict is not None:
            raise verdict

    def admit(self, terms: RoundTerms) -> bytes | None:
        """Charge one request; the stored reply when it is a replay of an answered one.

        Raises:
            ClientFault: The policy or the budget refuses; nothing was written.
        """
        (outcome,) = self.admit_many([terms])
        if isinstance(outcome, ClientFault):
            raise outcome
        return outcome

    def admit_many(self, batch: Sequence[RoundTerms]) -> list[bytes | ClientFault | None]:
        """`admit` for many clients in one commit: for each its stored reply, None when newly charged, or the refusal."""
        outcomes: list[bytes | ClientFault | None] = [self._verdict(terms) for terms in batch]
        wanted = [place for place, outcome in enumerate(outcomes) if outcome is None]
        if not wanted:
            return outcomes
        charges = self.ledger.charge_many([self._request(batch[place]) for place in wanted], self.policy.max_epsilon)
        for place, charge in zip(wanted, charges, strict=True):
            outcomes[place] = charge if isinstance(charge, ClientFault) else charge.reply
        return outcomes

    def _verdict(self, terms: RoundTerms) -> ClientFault | None:
        if terms.client not in self._sizes:
            return ClientFault("config-mismatch", f"client {terms.client} is not one of this host")
        try:
            self.policy.check(
                noise_multiplier=terms.noise_multiplier,
                sample_rate=terms.sample_rate,
                steps=terms.steps,
                delta=terms.delta,
                clip_norm=terms.clip_norm,
                provenance=terms.provenance,
                nominal_size=self._sizes[terms.client],
                accountant=terms.accountant,
                unit=terms.unit,
            )
        except ClientFault as fault:
            return fault
        return None

    @staticmethod
    def _request(terms: RoundTerms) -> Request:
        entry = Entry(terms.noise_multiplier, terms.sample_rate, terms.steps)
        return Request(str(terms.client), terms.key, terms.run, terms.round, (entry,), terms.rounds)

    def keep(self, terms: RoundTerms, reply: bytes) -> bytes:
        """Store a reply before it leaves; what comes back is what may leave (another process may have been first)."""
        return self.ledger.store_reply(terms.key, reply)
