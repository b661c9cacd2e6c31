"""Asynchronous rounds: the server advances after K answers (FedBuff, Nguyen et al., AISTATS 2022).

At any time `clients_per_round` clients train. Each was given the factors that were published then,
and a round ends when K answers of its phase are there; the others go on. An answer to an order of
round t that counts in round u is `s = u - t` rounds old, and counts `(1 + s)^-½` as much as a fresh
one. The published factors move as in rounds that wait: by one decoded message a round, so what a
client must hold is proven by the same hashes, and a round's sum is the same exact sum.

With alternation an answer belongs to a phase: B's change cannot be summed with A's. There are two
buffers, one a phase, and a round takes K answers out of its own. To refuse what comes in the other
phase's round would throw away every answer that is one round late, and every second of those that
are later. So an answer's age is counted in rounds of both phases, as both factors move what it was
computed from, and the first round that can take a late one of B is two rounds on (`supply` says
which phase a client is given, so that neither buffer runs over while the other is waited for).
"""
