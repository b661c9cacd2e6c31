"""Sums that the server cannot look into (Bonawitz et al., CCS 2017, in the semi-honest form, with
the neighbourhoods of Bell et al., CCS 2020).

A round has four exchanges: clients make keys; they share secrets with each other, sealed; they
train and send their term under masks; those that stay give the shares that take the masks off the
sum. `client` is the client's part, `server` the server's, `messages` what travels between them,
`crypto` and `shamir` what they rest on, `graph` who shares with whom.
"""
