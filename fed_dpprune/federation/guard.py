"""Policy and ledger of a client, or of all clients of one host: the last word before anything private is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fed_dpprune.errors import ClientFault
from fed_dpprune.federation.terms import RoundTerms
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Ledger, Request
from fed_dpprune.privacy.policy import ClientPolicy


class LedgerGuard:
    """Policy first, then the ledger: a request is refused, replayed, or charged and committed.

    Args:
        ledger: Open for charging.
        policy: Set by whoever runs the clients; no message can weaken it.
        nominal_sizes: N_c by partition id, declared by whoever runs the clients.
    """

    def __init__(self, ledger: Ledger, policy: ClientPolicy, nominal_sizes: Mapping[int, int]) -> None:
        self.ledger, self.policy, self._sizes = ledger, policy, nominal_sizes

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
        charges = self.ledger.charge_many([self._request(batch[place]) for place in wanted], self.policy.max_epsilon)
        for place, charge in zip(wanted, charges, strict=True):
            outcomes[place] = charge if isinstance(charge, ClientFault) else charge.reply
        return outcomes

    def _verdict(self, terms: RoundTerms) -> ClientFault | None:
        try:
            self.policy.check(
                noise_multiplier=terms.noise_multiplier,
                sample_rate=terms.sample_rate,
                steps=terms.steps,
                delta=terms.delta,
                clip_norm=terms.clip_norm,
                provenance=terms.provenance,
                nominal_size=self._sizes[terms.client],
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
